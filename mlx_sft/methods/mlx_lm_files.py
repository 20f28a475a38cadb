"""LoRA adapters as mlx-lm's own files, for `mlx_lm.generate --adapter-path`, mlx-swift-lm and what else reads them.

```
adapter_config.json    {"fine_tune_type": "lora" or "dora", "num_layers": 28, "lora_parameters": {"rank", "scale", "dropout", "keys"}}
adapters.safetensors   <module>.lora_a [in, r] and <module>.lora_b [r, out], float32; of experts [experts, r, in] and [experts, out, r]
```
mlx-lm puts an adapter on the modules that `keys` names, in the last `num_layers` layers. One of them that has none of ours has one of
zeros there, which changes nothing. mlx-lm itself writes -1 where all layers are meant, at which mlx-swift-lm ends the program: it takes
that many from the end of a list. Knows nothing of models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sft.errors import UserError
from mlx_sft.files import read_json, to_json
from mlx_sft.methods.layers import layer_number
from mlx_sft.methods.lora_settings import MAGNITUDE, LoraSettings
from mlx_sft.safetensors_file import read_arrays, write_arrays
from mlx_sft.writing import make_folder, write_file, write_file_with

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"

_PARTS = {"lora_A": "lora_a", "lora_B": "lora_b", MAGNITUDE: "m"}
_IN_A_LAYER = re.compile(r"(?:.*?\.)?\d+\.(?P<key>.+)")


def write_adapter(
    folder: Path,
    settings: LoraSettings,
    parameters: dict[str, mx.array],
    base_model: str,
    paths: Mapping[str, str],
    depth: int,
) -> None:
    """Write an adapter.

    Args:
        folder: Made where it does not exist.
        settings: Its shape and scale.
        parameters: `<module>.lora_A` [r, in] and `<module>.lora_B` [out, r].
        base_model: Name or path of the base model.
        paths: mlx-lm's name of each module, by its name in transformers.
        depth: How many layers the base has.

    Raises:
        UserError: If it changes something outside of the layers, where mlx-lm puts no adapter, or modules have ranks of their own.
    """
    hint = "export it with --format peft, or merged"
    if settings.also_train:
        what = f"mlx-lm's form has no place for {', '.join(settings.also_train)}, which --also-train trained in full"
        raise UserError(what, where=str(folder), hint=hint)
    if settings.train_new_tokens:
        raise UserError("mlx-lm's form has no place for the rows of new tokens", where=str(folder), hint=hint)
    scales = {settings.scale_of(name.rpartition(".")[0]) for name in parameters}
    if len(scales) > 1 or settings.rank_pattern:
        raise UserError("mlx-lm's form has one rank and one scale for all modules", where=str(folder), hint=hint)
    scale = scales.pop()
    arrays: dict[str, mx.array] = {}
    keys: set[str] = set()
    for name, value in parameters.items():
        name, _, half = name.rpartition(".")
        module = paths.get(name, name)
        place = _IN_A_LAYER.fullmatch(module)
        if place is None:
            raise UserError(f"mlx-lm has no place for an adapter on {module}", where=str(folder), hint=hint)
        keys.add(place["key"])
        arrays[f"{module}.{_PARTS[half]}"] = mx.contiguous(value.T) if value.ndim == 2 else value
    make_folder(folder)
    write_file_with(folder / WEIGHTS, lambda path: write_arrays(path, arrays, {"format": "mlx"}))
    config: dict[str, Any] = {
        "model": base_model,
        "fine_tune_type": "dora" if settings.dora else "lora",
        "num_layers": depth - min(number for name in parameters if (number := layer_number(name)) is not None),
        "lora_parameters": {
            "rank": settings.rank,
            "scale": scale,
            "dropout": settings.dropout,
            "keys": sorted(keys),
        },
    }
    write_file(folder / CONFIG, to_json(config))


def read_adapter(folder: Path, paths: Mapping[str, str]) -> tuple[float, dict[str, mx.array]]:
    """The scale and the parameters of an adapter that `write_adapter` wrote, under the names that it was given."""
    names = {path: name for name, path in paths.items()}
    ours = {theirs: half for half, theirs in _PARTS.items()}
    parameters = {}
    for name, value in read_arrays(folder / WEIGHTS):
        module, _, half = name.rpartition(".")
        parameters[f"{names.get(module, module)}.{ours[half]}"] = mx.array(value.T if value.ndim == 2 else value)
    scale: float = read_json(folder / CONFIG)["lora_parameters"]["scale"]
    return scale, parameters
