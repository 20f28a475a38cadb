"""LoRA adapters as mlx-lm's own files, for `mlx_lm.generate --adapter-path` and what else reads them.

```
adapter_config.json    {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": {"rank", "scale", "dropout", "keys"}}
adapters.safetensors   <module>.lora_a [in, r] and <module>.lora_b [r, out], float32
```
mlx-lm puts an adapter on the modules that `keys` names, in the last `num_layers` layers, -1 standing for all. Knows nothing of models.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sft.convert.arrays import write_arrays
from mlx_sft.errors import UserError
from mlx_sft.mappings import read_json
from mlx_sft.methods.lora import LoraSettings
from mlx_sft.runs import to_json, write_file, write_file_with
from mlx_sft.safetensors_file import open_safetensors, read_float32

CONFIG = "adapter_config.json"
WEIGHTS = "adapters.safetensors"

_HALVES = {"lora_A": "lora_a", "lora_B": "lora_b"}
_IN_A_LAYER = re.compile(r"(?:.*?\.)?\d+\.(?P<key>.+)")

_EVERY_LAYER = -1


def write_adapter(folder: Path, settings: LoraSettings, parameters: dict[str, mx.array], base_model: str) -> None:
    """Write an adapter.

    Args:
        folder: Made where it does not exist.
        settings: Its shape and scale.
        parameters: `<module>.lora_A` [r, in] and `<module>.lora_B` [out, r].
        base_model: Name or path of the base model.

    Raises:
        UserError: If it changes something outside of the layers, where mlx-lm puts no adapter.
    """
    arrays: dict[str, mx.array] = {}
    keys: set[str] = set()
    for name, value in parameters.items():
        module, _, half = name.rpartition(".")
        place = _IN_A_LAYER.fullmatch(module)
        if place is None:
            hint = "export it with --format peft, or merged"
            raise UserError(f"mlx-lm has no place for an adapter on {module}", where=str(folder), hint=hint)
        keys.add(place["key"])
        arrays[f"{module}.{_HALVES[half]}"] = mx.contiguous(value.T)
    write_file_with(folder / WEIGHTS, lambda path: write_arrays(path, arrays, {"format": "mlx"}))
    config: dict[str, Any] = {
        "model": base_model,
        "fine_tune_type": "lora",
        "num_layers": _EVERY_LAYER,  # where one has no adapter of ours, mlx-lm's is zero
        "lora_parameters": {
            "rank": settings.rank,
            "scale": settings.scale,
            "dropout": settings.dropout,
            "keys": sorted(keys),
        },
    }
    write_file(folder / CONFIG, to_json(config))


def read_adapter(folder: Path) -> tuple[float, dict[str, mx.array]]:
    """The scale and the parameters of an adapter that `write_adapter` wrote, under our names."""
    ours = {theirs: half for half, theirs in _HALVES.items()}
    parameters = {}
    for tensor in open_safetensors(folder / WEIGHTS).tensors:
        module, _, half = tensor.name.rpartition(".")
        parameters[f"{module}.{ours[half]}"] = mx.array(read_float32(tensor)).T
    scale: float = read_json(folder / CONFIG)["lora_parameters"]["scale"]
    return scale, parameters
