"""Which of a model's repeated layers are trained: `--layers last:16`, for every method that adapts layers.

    last:4 of 28 layers ─► layers 24 to 27 ─► names that begin with model.layers.24. to model.layers.27.

Layers are counted from 0 at the bottom, as in their names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import mlx.nn as nn
from pydantic import field_validator

from mlx_sft.console import many
from mlx_sft.errors import USAGE, UserError
from mlx_sft.model.head import repeated_layers
from mlx_sft.model.names import transformers_name
from mlx_sft.settings import Settings

_PART = re.compile(r"(?P<end>first|last):(?P<count>\d{1,6})|(?P<low>\d{1,6})(?:-(?P<high>\d{1,6}))?", re.ASCII)
_NUMBER = re.compile(r"\.(\d{1,6})\.", re.ASCII)
_EXAMPLE = "write last:16, first:4, 8-15, or 0,2,4-6"


class LayersSettings(Settings):
    """The settings of a method that trains all layers, or some."""

    layers: str | None = None
    """Train these layers only: last:16, first:4, 8-15 or 0,2,4-6, counted from 0 at the bottom. Where not given, all."""

    @field_validator("layers", mode="before")
    @classmethod
    def _readable_layers(cls, value: Any) -> Any:
        parts = value if isinstance(value, list | tuple) else [value]
        if value is None or not all(isinstance(part, int | str) for part in parts):
            return value
        written = ",".join(str(part) for part in parts).replace(" ", "")
        for part in written.split(","):
            found = _PART.fullmatch(part)
            if found is None or int(found["count"] or 1) == 0 or int(found["high"] or 10**6) < int(found["low"] or 0):
                raise ValueError(f"{part!r} does not name layers; {_EXAMPLE}")
        return written


def layer_number(name: str) -> int | None:
    """The number of the layer that a module or a weight is in, by its name in transformers; None outside of the layers."""
    found = _NUMBER.search(name)
    return int(found[1]) if found else None


def written_layers(numbers: Iterable[int]) -> str:
    """0, 2, 4, 5, 6 → `0,2,4-6`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def chosen_layers(layers: str | None, number: int) -> list[int]:
    """The layers that a setting names in a model with so many, or all; raises `UserError` for one that the model does not have."""
    if layers is None:
        return list(range(number))
    chosen: set[int] = set()
    for found in _PART.finditer(layers):  # it is readable, as the settings are
        if found["end"]:
            count = int(found["count"])
            named = range(count) if found["end"] == "first" else range(number - count, number)
        else:
            named = range(int(found["low"]), int(found["high"] or found["low"]) + 1)
        if named.start < 0 or named.stop > number:
            what = f"{found[0]}: this model has {many(number, 'layer')}, 0 to {number - 1}"
            hint = f"give some of them, such as last:{min(4, number)}"
            raise UserError(what, where="layers", hint=hint, exit_code=USAGE)
        chosen.update(named)
    return sorted(chosen)


def layer_prefixes(model: nn.Module) -> list[str]:
    """How the names in transformers of what is in each repeated layer begin: `model.layers.0.`, ..."""
    layers = repeated_layers(model)
    paths = {id(module): path for path, module in model.named_modules()}
    return [transformers_name(f"{paths[id(layer)]}.") for layer in layers]


def in_layers(model: nn.Module, names: Collection[str], layers: str | None) -> list[str]:
    """Those of the names in transformers that are in these layers, or in none; with None all of them."""
    if layers is None:
        return list(names)
    prefixes = layer_prefixes(model)
    chosen = chosen_layers(layers, len(prefixes))
    left_out = tuple(prefix for number, prefix in enumerate(prefixes) if number not in chosen)
    return [name for name in names if not name.startswith(left_out)]


def layers_to_transform(layers: str | None, modules: Iterable[str]) -> dict[str, Any]:
    """What PEFT's config says of the layers that were trained: their numbers, and what stands before these in the modules' names."""
    numbered = {module: number for module in modules if (number := layer_number(module)) is not None}
    if layers is None or not numbered:
        return {"layers_to_transform": None, "layers_pattern": None}
    before = {module.partition(f".{number}.")[0].rpartition(".")[2] for module, number in numbered.items()}
    return {"layers_to_transform": sorted(set(numbered.values())), "layers_pattern": sorted(before)}


def layers_of_config(config: Mapping[str, Any], modules: Iterable[str]) -> str | None:
    """The layers that PEFT's config names, where those of the file's modules are among them; None where it names none, or others."""
    stated = config.get("layers_to_transform")
    named = [number for number in (stated if isinstance(stated, list) else [stated]) if type(number) is int]
    numbers = {number for module in modules if (number := layer_number(module)) is not None}
    return written_layers(numbers) if numbers and numbers.issubset(named) else None
