"""Quantized weights of a frozen base, in MLX's own forms: groups of a row share a scale. Knows nothing of what is trained beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.errors import UserError
from mlx_sft.model.head import floating_weights
from mlx_sft.model.linears import quantized_modules
from mlx_sft.model.names import transformers_name


class Quantization(NamedTuple):
    """How numbers are quantized: `bits` each, in groups of `group_size` along a row, in the way that MLX calls `mode`."""

    group_size: int
    bits: int
    mode: str


QUANTIZATIONS = {
    "4": Quantization(64, 4, "affine"),
    "8": Quantization(64, 8, "affine"),
    "mxfp4": Quantization(32, 4, "mxfp4"),
}
"""By the name that `--quantize` takes."""


def quantize(model: nn.Module, name: str) -> dict[str, Any]:
    """Quantize every weight that `mlx_lm.convert` would, embeddings and head included.

    Returns:
        What mlx-lm writes into `config.json` of such a model as `quantization`.
    """
    stated: dict[str, Any] = QUANTIZATIONS[name]._asdict()
    of_family = getattr(model, "quant_predicate", None) or (lambda path, module: True)

    def how(path: str, module: nn.Module) -> bool | dict[str, Any]:
        chosen: bool | dict[str, Any] = of_family(path, module)
        if isinstance(chosen, dict):
            stated[path] = chosen
        return chosen

    _quantize(model, QUANTIZATIONS[name], how)
    return stated


def stored_quantization(config: dict[str, Any], where: str) -> dict[str, Any] | None:
    """How a checkpoint's weights are quantized in MLX's own form; None where they are not.

    Raises:
        UserError: If they are in another form.
    """
    stated = config.get("quantization")
    if stated is None and "quantization_config" not in config:
        return None
    if not isinstance(stated, dict) or not all(type(stated.get(name)) is int for name in ("group_size", "bits")):
        kind = (config.get("quantization_config") or {}).get("quant_method", "unknown")
        raise UserError(
            f"this checkpoint is quantized by another library ({kind}), which cannot be trained exactly",
            where=where,
            hint="give the original in bfloat16, float16 or float32, with --quantize 4 where memory is short, "
            "or a checkpoint that mlx-lm quantized",
        )
    return stated


def quantize_as_stored(model: nn.Module, stated: dict[str, Any], packed: set[str] | None) -> None:
    """Give a model whose weights do not matter the shapes of a checkpoint that mlx-lm quantized.

    Args:
        stated: What its `config.json` says.
        packed: The modules that are; None where that is not known, and all that can be are taken to be.
    """
    quantization = Quantization(stated["group_size"], stated["bits"], stated.get("mode", "affine"))
    _quantize(model, quantization, lambda path, _: (packed is None or path in packed) and stated.get(path, True))


def _quantize(
    model: nn.Module, quantization: Quantization, how: Callable[[str, nn.Module], bool | dict[str, Any]]
) -> None:
    """Weights whose rows are whole groups, where and as `how` says of a path and a module."""
    group_size, bits, mode = quantization

    def chosen(path: str, module: Any) -> bool | dict[str, Any]:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0 and how(path, module)

    nn.quantize(model, group_size, bits, mode=mode, class_predicate=chosen)


def dequantized(module: Any, part: Callable[[mx.array], mx.array] = lambda array: array) -> mx.array:
    """The numbers that a quantized weight, or this part of its rows, stands for, in the precision of its scales."""
    biases = module.get("biases")
    numbers: mx.array = mx.dequantize(
        part(module.weight),
        part(module.scales),
        None if biases is None else part(biases),
        module.group_size,
        module.bits,
        mode=module.mode,
    )
    return numbers


def round_trip(weight: mx.array, quantization: Quantization) -> mx.array:
    """What is left of a weight once it is quantized, in its own precision; rows are independent of each other."""
    group_size, bits, mode = quantization
    packed, scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
    back: mx.array = mx.dequantize(packed, scales, biases[0] if biases else None, group_size, bits, mode=mode)
    return back.astype(weight.dtype)


class WeightRow(NamedTuple):
    """The first row of a weight, of a stack the first of its last matrix; of a quantized one the numbers that it stands for."""

    numbers: mx.array
    quantized: bool


def first_rows(model: nn.Module) -> dict[str, WeightRow]:
    """Of every floating or quantized weight, by its name in transformers; nothing is computed yet."""
    floating = {transformers_name(path): weight for path, weight in floating_weights(model).items()}
    rows = {name: WeightRow(_first(weight), False) for name, weight in floating.items()}
    packed = {f"{name}.weight": module for name, module in quantized_modules(model)}
    return rows | {name: WeightRow(dequantized(module, _first), True) for name, module in packed.items()}


def _first(weight: mx.array) -> mx.array:
    return weight[-1, :1] if weight.ndim > 2 else weight[:1]


def weights_by_name(model: nn.Module) -> dict[str, mx.array]:
    """Every floating weight by its name in transformers; for a quantized one the numbers that it stands for, not yet computed."""
    weights = {transformers_name(path): weight for path, weight in floating_weights(model).items()}
    return weights | {f"{name}.weight": dequantized(module) for name, module in quantized_modules(model)}
