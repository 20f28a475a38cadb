"""The linear modules of a model: plain or quantized, single or one for each expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_sft.model.names import transformers_name

EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
_QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)
_LINEAR = (nn.Linear, nn.QuantizedLinear, *EXPERTS)


def linear_modules(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Every linear module's path in the model and the module, by its name in transformers, in the model's order."""
    found = [(path, module) for path, module in model.named_modules() if type(module) in _LINEAR]
    return {transformers_name(path): (path, module) for path, module in sorted(found, key=lambda one: _natural(one[0]))}


def weight_shape(linear: Any) -> tuple[int, ...]:
    """[out, in] of a linear module or an embedding, [experts, out, in] of a layer's experts."""
    shape: tuple[int, ...] = linear.weight.shape
    return (*shape[:-1], linear.scales.shape[-1] * linear.group_size) if is_quantized(linear) else shape


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module with a quantized weight, by its name in transformers."""
    for path, module in model.named_modules():
        if is_quantized(module):
            yield transformers_name(path), module


def is_quantized(module: Any) -> bool:
    """Whether its weight is packed, with a scale for each group of numbers."""
    return isinstance(module, _QUANTIZED)


def _natural(path: str) -> list[tuple[int, str]]:
    """`layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
