"""What each layer of a model keeps of a token for its backward pass, counted from its modules, whose values need not be there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_sft.cpu.fast_core import fast_core
from mlx_sft.model.blocks import Block, calls_attention, find_blocks, is_linear
from mlx_sft.model.head import SplitModel
from mlx_sft.model.linears import weight_shape

_FUSED_HEADS = (64, 72, 80, 96, 128, 192, 256)
"""Sizes of a head for which Metal computes attention in one piece."""


@dataclass(frozen=True)
class LayerCounts:
    """Numbers that one layer keeps for each token, in the model's precision.

    Attributes:
        states: Its input.
        light: What its norms are of, what its products are of, and what the products of its input give.
        off: The same, and what lies between the products of attention.
        features: Inputs and outputs of all its products.
        norms: Widths of the norms between its blocks.
        scores: Numbers kept besides, for each token and each position: where MLX's own attention on the CPU keeps its scores.
        weights: Numbers that one token is multiplied with.
        attended: Width of attention's result.
        heads: Of attention that the device computes in one piece; 0 where there is none, or it keeps its scores.
        keys: Width of its keys.
        trained: Whether something of it is trained.
    """

    states: int
    light: int
    off: int
    features: int
    norms: int
    scores: int
    weights: int
    attended: int
    trained: bool
    heads: int = 0
    keys: int = 0


def count_layers(split: SplitModel, *, fused: bool, composes_attention: bool = False) -> list[LayerCounts]:
    """Of each layer of a model that a method is attached to; the arguments are those of `Footprint.of`."""
    probe = mx.zeros((1, 8), mx.int32)
    blocks = find_blocks(split.layers, lambda: split.hidden_states(probe))  # whose result is never computed
    composed = composes_attention or not fused
    return [_count(layer, found, fused, composed) for layer, found in zip(split.layers, blocks, strict=True)]


def _count(layer: nn.Module, blocks: dict[str, Block], fused: bool, composed: bool) -> LayerCounts:
    norms = [child for child in layer.children().values() if _is_norm(child)]
    products = list(_products(layer))
    # A norm keeps its input, and where it is made of several operations, a multiple of it; its result too where its own weight is trained.
    widths = {id(norm): int(norm.weight.shape[-1]) for norm in norms}
    light = sum(widths[id(norm)] * ((1 if fused else 2) + (1 if _trains(norm) else 0)) for norm in norms)
    light += sum(getattr(product, "kept_numbers", 0) for product in products)  # of an adapter beside it
    off, scores, attended, heads, keys = light, 0, 0, 0, 0
    inside: set[int] = set()
    for block in blocks.values():
        first, last = [block.module[name] for name in block.first], block.module[block.last]
        inside |= {id(module) for module in (*first, last)}
        given = sum(_widths(module)[1] for module in first)
        kept = given + (_widths(first[0])[0] if any(map(_trains, first)) else 0)
        light += kept
        off += kept
        if not block.positionwise:
            off += _between(block, fused)
            attended += _widths(last)[0]
            if composed or not _is_one_piece(block):
                without = not fused and fast_core(block) is not None
                scores += 0 if without else 2 * _heads(block.module)
            else:
                heads, keys = heads + _heads(block.module), keys + _widths(block.module[block.first[-1]])[1]
    for module in products:
        if id(module) not in inside:
            light += sum(_widths(module))
            off += sum(_widths(module))
    states = _widths(products[0])[0] if products else 0
    features, weights = (sum(count(_widths(product)) for product in products) for count in (sum, math.prod))
    norm_widths, trained = sum(widths.values()), _trains(layer)
    return LayerCounts(states, light, off, features, norm_widths, scores, weights, attended, trained, heads, keys)


def _is_one_piece(block: Block) -> bool:
    """Whether it is attention that a GPU computes in one piece, or no attention at all."""
    if not any(hasattr(block.module, name) for name in _HEADS):
        return True
    return (
        calls_attention(block.module) and _widths(block.module[block.last])[0] // _heads(block.module) in _FUSED_HEADS
    )


def _between(block: Block, fused: bool) -> int:
    """What attention keeps besides its products' results: turned queries and keys where these were normalized, and its result."""
    queries_and_keys = sum(_widths(block.module[name])[1] for name in block.first[:-1])
    normalized = any(_is_norm(child) for child in block.module.children().values())
    result = _widths(block.module[block.last])[0]
    return (queries_and_keys if normalized else 0) + result


def _products(module: nn.Module) -> Iterator[Any]:
    """The modules inside that multiply with weights, those with an adapter beside them as one."""
    for child in module.children().values():
        for part in child if isinstance(child, list) else [child]:
            if is_linear(part) or getattr(getattr(getattr(part, "linear", part), "weight", None), "ndim", 0) == 3:
                yield part
            elif isinstance(part, nn.Module):
                yield from _products(part)


def _widths(product: Any) -> tuple[int, int]:
    """In and out; of several experts' matrices, those that one token goes through are taken for one."""
    outputs, inputs = weight_shape(getattr(product, "linear", product))[-2:]
    return inputs, outputs


def _is_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Module) and not is_linear(module) and isinstance(weight, mx.array) and weight.ndim == 1


_HEADS = ("n_heads", "num_heads", "num_attention_heads", "n_head")


def _heads(attention: nn.Module) -> int:
    return next((int(getattr(attention, name)) for name in _HEADS if hasattr(attention, name)), 1)


def _trains(module: nn.Module) -> bool:
    return bool(tree_flatten(module.trainable_parameters()))
