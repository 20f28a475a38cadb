"""Quantized weights of a frozen base, in MLX's own forms: groups of a row share a scale."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.errors import USAGE, UserError
from mlx_sft.model.head import floating_weights
from mlx_sft.model.linears import quantized_modules
from mlx_sft.model.names import transformers_name


class Quantization(NamedTuple):
    """`bits` for each number, in groups of `group_size` along a row; `mode` is MLX's name for the kind of quantization."""

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
        The `quantization` that mlx-lm writes into such a model's `config.json`.
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


_READ_IN_MXFP4 = ("gpt_oss",)
"""Families that are published with experts in mxfp4, which mlx-lm reads bit for bit."""


def _method(config: dict[str, Any]) -> str:
    return str((config.get("quantization_config") or {}).get("quant_method", "unknown"))


def stored_quantization(path: Path, config: dict[str, Any], quantize: str | None) -> dict[str, Any] | None:
    """How a checkpoint's weights are quantized in a form that MLX computes with as it is; None where they are not.

    Raises:
        UserError: If they are in another form, or quantized already where `quantize` asks for it again.
    """
    if (path / "hf_quant_config.json").is_file():  # NVIDIA's way to say it
        config = config | {"quantization_config": {"quant_method": "modelopt"}}
    stated = config.get("quantization")
    if stated is None and "quantization_config" not in config:
        return None
    if stated is None and config["model_type"] in _READ_IN_MXFP4 and _method(config) == "mxfp4":
        stated = QUANTIZATIONS["mxfp4"]._asdict()
    if not isinstance(stated, dict) or not all(type(stated.get(name)) is int for name in ("group_size", "bits")):
        raise UserError(
            f"this checkpoint is quantized by another library ({_method(config)}), which cannot be trained exactly",
            where=str(path),
            hint="give the original in bfloat16, float16 or float32, with --quantize 4 where memory is short, "
            "or a checkpoint that mlx-lm quantized",
        )
    if quantize is not None:
        what = f"this checkpoint is quantized already, to {stated['bits']} bits"
        raise UserError(what, where=str(path), hint="leave --quantize out", exit_code=USAGE)
    return stated


def quantize_as_stored(model: nn.Module, stated: dict[str, Any], packed: set[str] | None) -> None:
    """Give a model whose weights are placeholders the quantized modules of a checkpoint that mlx-lm quantized.

    Args:
        stated: The `quantization` of its `config.json`.
        packed: The modules that are quantized; None where that is not known: then all that can be.
    """
    quantization = Quantization(stated["group_size"], stated["bits"], stated.get("mode", "affine"))
    _quantize(model, quantization, lambda path, _: (packed is None or path in packed) and stated.get(path, True))


def _quantize(
    model: nn.Module, quantization: Quantization, how: Callable[[str, nn.Module], bool | dict[str, Any]]
) -> None:
    """Quantize the weights whose rows are whole groups; `how` says of a path and a module whether and how."""
    group_size, bits, mode = quantization

    def chosen(path: str, module: Any) -> bool | dict[str, Any]:
        return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0 and how(path, module)

    nn.quantize(model, group_size, bits, mode=mode, class_predicate=chosen)


def dequantized(module: Any, part: Callable[[mx.array], mx.array] = lambda array: array) -> mx.array:
    """A quantized weight, or this part of its rows, as plain numbers in the precision of its scales."""
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


def plain_weight(module: Any) -> mx.array:
    """The weight of a linear module or an embedding as numbers, whether it is quantized or not."""
    weight: mx.array = dequantized(module) if "scales" in module else module.weight
    return weight


def round_trip(weight: mx.array, quantization: Quantization) -> mx.array:
    """A weight quantized and dequantized again, in its own precision; rows are independent of each other."""
    group_size, bits, mode = quantization
    packed, scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
    back: mx.array = mx.dequantize(packed, scales, biases[0] if biases else None, group_size, bits, mode=mode)
    return back.astype(weight.dtype)


class WeightRow(NamedTuple):
    """The first row of a weight as plain numbers; of a stack of experts, the first row of the last expert."""

    numbers: mx.array
    quantized: bool


def first_rows(model: nn.Module) -> dict[str, WeightRow]:
    """The first row of every floating or quantized weight, by its name in transformers; nothing is computed yet."""
    packed = {f"{name}.weight" for name, _ in quantized_modules(model)}
    return {name: WeightRow(row, name in packed) for name, row in weights_by_name(model, _first).items()}


def _first(weight: mx.array) -> mx.array:
    if weight.ndim == 0:
        return weight[None]
    return weight[-1, :1] if weight.ndim > 2 else weight[:1]


def weights_by_name(
    model: nn.Module, part: Callable[[mx.array], mx.array] = lambda array: array
) -> dict[str, mx.array]:
    """Every weight, or this part of it, as plain numbers, by its name in transformers; those of quantized ones are not computed yet."""
    weights = {transformers_name(path): part(weight) for path, weight in floating_weights(model).items()}
    return weights | {f"{name}.weight": dequantized(module, part) for name, module in quantized_modules(model)}
