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
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlx_sft.errors import UserError
from mlx_sft.files import read_json, to_json
from mlx_sft.methods.layers import layer_number, written_layers
from mlx_sft.methods.lora_settings import HALVES, MAGNITUDE, LoraSettings
from mlx_sft.methods.peft_rules import LONGEST_NAME, MOST_FEATURES, in_a_layer
from mlx_sft.model.names import transformers_name
from mlx_sft.safetensors_file import open_safetensors, read_float32, write_arrays
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
        raise UserError(what, hint=hint)
    if settings.train_new_tokens:
        raise UserError("mlx-lm's form has no place for the rows of new tokens", hint=hint)
    if settings.dora and any(name.endswith(f".{MAGNITUDE}") and value.ndim > 1 for name, value in parameters.items()):
        raise UserError("mlx-lm has no DoRA of experts", hint="export it merged")
    scales = {settings.scale_of(name.rpartition(".")[0]) for name in parameters}
    if len(scales) > 1 or settings.rank_pattern:
        raise UserError("mlx-lm's form has one rank and one scale for all modules", hint=hint)
    scale = scales.pop()
    arrays: dict[str, mx.array] = {}
    keys: set[str] = set()
    for name, value in parameters.items():
        name, _, half = name.rpartition(".")
        module = paths.get(name, name)
        place = _IN_A_LAYER.fullmatch(module)
        if place is None:
            raise UserError(f"mlx-lm has no place for an adapter on {module}", hint=hint)
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


def holds_adapter(folder: Path) -> bool:
    """Whether a folder's `adapter_config.json` is mlx-lm's, and not PEFT's, whose file has the same name."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return config.get("peft_type") is None and bool({"fine_tune_type", "lora_parameters"} & config.keys())


def base_model_name(folder: Path) -> str:
    """The name or path of the model that mlx-lm trained the adapter on; an empty string where it does not say."""
    name = read_json(folder / CONFIG).get("model")
    return name if isinstance(name, str) else ""


def read_adapter(folder: Path) -> tuple[LoraSettings, dict[str, mx.array]]:
    """Read an adapter that this package or mlx-lm wrote; the parameters become float32, with their names in transformers.

    What is trained is what the file has tensors of: mlx-lm leaves the other modules of `keys` and `num_layers` as they are.

    Raises:
        UserError: Where files are missing or damaged, or hold whole weights and no adapter.
    """
    stated, is_dora = _stated(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"not an adapter folder of mlx-lm: no {WEIGHTS}", where=str(folder))
    ours = {theirs: half for half, theirs in _PARTS.items()}
    parameters = {}
    for tensor in open_safetensors(folder / WEIGHTS).tensors:
        module, _, part = tensor.name.rpartition(".")
        if part not in ours or not module or (part == "m" and not is_dora):
            hint = "only lora_a and lora_b are read, and m of DoRA"
            raise UserError(f"unknown tensor {tensor.name[:LONGEST_NAME]}", where=str(folder / WEIGHTS), hint=hint)
        if max(tensor.shape, default=0) >= MOST_FEATURES or len(module) > LONGEST_NAME:
            what = f"{tensor.name[:LONGEST_NAME]} is larger than any module of a model"
            raise UserError(what, where=str(folder / WEIGHTS))
        value = mx.array(read_float32(tensor))
        parameters[f"{transformers_name(module)}.{ours[part]}"] = value.T if value.ndim == 2 else value
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
    _check_shapes(parameters, modules, stated.rank, is_dora, folder / WEIGHTS)
    target, layers = _where(modules)
    settings = LoraSettings.model_construct(
        rank=stated.rank,
        alpha=stated.scale * stated.rank,
        dropout=stated.dropout,
        dora=is_dora,
        target=target,
        layers=layers,
    )
    return settings, parameters


class _Stated(BaseModel):
    """What mlx-lm's config says in numbers; its scale is alpha / rank."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    rank: int = Field(ge=1)
    scale: float
    dropout: float = Field(default=0.0, ge=0, lt=1)


def _stated(path: Path) -> tuple[_Stated, bool]:
    """The numbers, and whether it is DoRA."""
    config = read_json(path)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        what = (
            "this is no adapter: it holds whole weights of the model"
            if kind == "full"
            else "only lora and dora are read"
        )
        hint = "put them into the model with `mlx_lm.fuse`, and give the folder that it writes as --model"
        raise UserError(f"fine_tune_type is {kind!r}; {what}", where=str(path), hint=hint)
    try:
        return _Stated.model_validate(config.get("lora_parameters")), kind == "dora"
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(["lora_parameters", *map(str, first["loc"])])
        raise UserError(f"{place}: {first['msg']}", where=str(path)) from error


def _check_shapes(parameters: dict[str, mx.array], modules: list[str], rank: int, is_dora: bool, where: Path) -> None:
    """Raise `UserError` unless every module has all its parts, of this rank."""
    if not modules:
        raise UserError("this adapter has no tensors", where=str(where))
    for module in modules:
        for half, theirs in _PARTS.items():
            value = parameters.get(f"{module}.{half}")
            if value is None and (half != MAGNITUDE or is_dora):
                raise UserError(f"{module}.{theirs} is missing", where=str(where))
            if value is None or half == MAGNITUDE:
                continue
            if value.ndim not in (2, 3) or value.shape[-2 if half == HALVES[0] else -1] != rank:
                raise UserError(
                    f"{module}.{theirs} is {list(value.shape)}, and rank {rank} asks for another", where=str(where)
                )


def _where(modules: list[str]) -> tuple[list[str], str | None]:
    """Targets and layers that stand for these modules: names in a layer where each of the layers has all of them, else each module."""
    numbers = {number for module in modules if (number := layer_number(module)) is not None}
    names = sorted({in_a_layer(module) for module in modules})
    if len(names) * len(numbers) != len(modules):
        return sorted(modules), None
    return names, written_layers(numbers)
