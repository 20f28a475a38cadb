"""A model of which each process has a part: mlx-lm's own `shard` divides the heads of attention and the width of the MLP.

    q, k, v, gate, up    of the weight each process has rows       the input is whole ─► a part of the outputs
    o, down              of the weight each process has columns    a part of the inputs ─► added up over the processes, whole

Embeddings, norms and head are whole in each. What goes forward is added up behind each block, and its gradient in front of each (Shoeybi et
al. 2019, "Megatron-LM", https://arxiv.org/abs/1909.08053). The gradient of `all_sum` is the identity in MLX: what comes behind it is
computed in each process alike, and counts once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import sum_gradients

from mlx_sft.errors import UserError
from mlx_sft.model.linears import SPLIT, SPLIT_OUTPUTS, is_quantized, linear_modules

FAMILIES = frozenset({"gpt_oss", "llama", "ministral3", "mistral", "qwen2", "qwen3", "qwen3_moe"})
"""Families of which tests/training/test_sharded.py compares loss and gradients of both; those of DeepSeek and of
MiniMax M2 lose a part of the gradients where mlx-lm splits them."""

_HEADS = ("n_heads", "num_heads", "num_attention_heads", "n_kv_heads", "num_kv_heads", "num_key_value_heads")


def shard(model: nn.Module, group: Any, where: str, *, loaded: bool = True) -> None:
    """Keep of a model, whose weights are not loaded yet, the part of this process; one weight after another is read, and its part kept.

    Args:
        group: The processes, of `mx.distributed`.
        where: The model's name, for messages.
        loaded: Whether it has weights, and not placeholders that must not be computed.

    Raises:
        UserError: Where mlx-lm cannot split it, or not among so many processes.
    """
    processes = group.size()
    family = str(getattr(model, "model_type", ""))
    if family not in FAMILIES or not hasattr(model, "shard"):
        hint = f"leave --shard-base out; {', '.join(sorted(FAMILIES))} can be split"
        raise UserError(f"--shard-base does not know how to split models of type {family}", where=where, hint=hint)
    heads = sorted({count for module in model.modules() for count in _heads_of(module)})
    if any(count % processes for count in heads):
        fitting = [str(n) for n in range(2, gcd(*heads) + 1) if gcd(*heads) % n == 0]
        hint = f"start {' or '.join(fitting)} processes" if fitting else "leave --shard-base out"
        what = f"its heads ({', '.join(map(str, heads))}) cannot be divided among {processes} processes"
        raise UserError(what, where=where, hint=hint)
    whole = {path: (module, module.weight) for path, module in linear_modules(model).values()}
    try:
        model.shard(group)
    except ValueError as error:
        groups = ", in whole groups of quantized numbers" if any(map(is_quantized, model.modules())) else ""
        what = f"the widths of its layers cannot be divided among {processes} processes{groups}"
        hint = "start another number of processes" + (", or take the base in another form" if groups else "")
        raise UserError(what, where=where, hint=hint) from error
    for path, module in linear_modules(model).values():
        before, weight = whole.pop(path)
        module._joined = getattr(before, "_joined", False)
        module._is_part = isinstance(module, SPLIT) and (not loaded or _is_plain_part(module, weight))
        del before, weight  # or the whole would stay in memory
    model._split = True


def is_split(model: nn.Module) -> bool:
    """Whether a model is what `shard` made of it."""
    return bool(getattr(model, "_split", False))


def is_part(module: Any) -> bool:
    """Whether a linear module is a part by rows or by columns, in the order of the processes; mlx-lm splits some in other ways."""
    return bool(getattr(module, "_is_part", False))


def own_part(array: mx.array, axis: int, group: Any) -> mx.array:
    """Of an array that each process has whole, what belongs to this one along an axis, which is the last or the one before it."""
    length = array.shape[axis] // group.size()
    own = slice(group.rank() * length, (group.rank() + 1) * length)
    return array[..., own] if axis == -1 else array[..., own, :]


def product(part: Any, x: mx.array) -> mx.array:
    """x times this process's part of a weight, and nothing besides: no bias, and nothing that other processes would have to do with."""
    if not is_quantized(part):
        plain: mx.array = x @ part.weight.T
        return plain
    return mx.quantized_matmul(
        x, part.weight, scales=part.scales, biases=part.get("biases"),
        transpose=True, group_size=part.group_size, bits=part.bits, mode=part.mode,
    )  # fmt: skip


def of_one_input(products: Sequence[Any], x: mx.array) -> list[mx.array]:
    """What modules give of x. Where each process has a part of their outputs, the gradient of x is added up over the processes once.

    Each module by itself would add up its own.
    """
    parts = [getattr(module, "linear", module) for module in products]
    if not all(isinstance(part, SPLIT_OUTPUTS) for part in parts):
        return [module(x) for module in products]
    x = sum_gradients(parts[0].group)(x)
    return [
        module.of_shared(x) if module is not part else with_bias(product(part, x), part)
        for module, part in zip(products, parts, strict=True)
    ]


def with_bias(result: mx.array, part: Any) -> mx.array:
    """The result of a product, with the bias of a module that has one."""
    return result + part.bias if "bias" in part else result


def _heads_of(module: nn.Module) -> Iterator[int]:
    return (count for name in _HEADS if isinstance(count := vars(module).get(name), int))


def _is_plain_part(module: Any, whole: mx.array) -> bool:
    """Whether it has the rows or columns of the whole that are this process's; its own are in memory then, and not the whole."""
    axis = -2 if isinstance(module, SPLIT_OUTPUTS) else -1
    expected = own_part(whole, axis, module.group)
    if expected.shape != module.weight.shape:
        return False
    same = mx.array_equal(expected, module.weight)
    mx.eval(module.parameters(), same)
    return bool(same.item())
