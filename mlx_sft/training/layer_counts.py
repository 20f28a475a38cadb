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
from mlx_sft.model.blocks import Block, calls_attention, find_blocks, is_linear, names_in
from mlx_sft.model.head import SplitModel
from mlx_sft.model.linears import is_experts, part_shape
from mlx_sft.model.stored_form import ShiftedRMSNorm
from mlx_sft.training.gated_delta import UPDATE, chunked_holds

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
        recurrent: Of the state of linear attention, where that is computed position by position.
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
    recurrent: int = 0


def count_layers(split: SplitModel, *, fused: bool, composes_attention: bool = False) -> list[LayerCounts]:
    """Of each layer of a model that a method is attached to; the arguments are those of `Footprint.of`."""
    probe = mx.zeros((1, 8), mx.int32)
    blocks = find_blocks(split.layers, lambda: split.hidden_states(probe))  # whose result is never computed
    composed = composes_attention or not fused
    linear = any(_is_linear_attention(block.module) for found in blocks for block in found.values())
    loops = linear and not (fused and chunked_holds(split.model_dtype()))
    return [_count(layer, found, fused, composed, loops) for layer, found in zip(split.layers, blocks, strict=True)]


def _count(layer: nn.Module, blocks: dict[str, Block], fused: bool, composed: bool, loops: bool) -> LayerCounts:
    norms = [child for child in layer.children().values() if _is_norm(child)]
    products = list(_products(layer))
    # A norm keeps its input, and where it is made of several operations, a multiple of it; its result too where its own weight is trained.
    widths = {id(norm): int(norm.weight.shape[-1]) for norm in norms}
    light = sum(widths[id(norm)] * (_inputs_kept(norm, fused) + (1 if _trains(norm) else 0)) for norm in norms)
    light += sum(times * getattr(product, "kept_numbers", 0) for product, times in products)  # of an adapter beside it
    light += sum(
        getattr(child, "kept_numbers", 0) for child in layer.children().values()
    )  # of one behind a part of the layer
    off, scores, attended, heads, keys, recurrent = light, 0, 0, 0, 0, 0
    inside: set[int] = set()
    for block in blocks.values():
        first, last = [block.module[name] for name in block.first], block.module[block.last]
        inside |= {id(module) for module in (*first, last)}
        given = sum(_widths(module)[1] for module in first)
        kept = given + (_widths(first[0])[0] if any(map(_trains, first)) else 0)
        light += kept
        off += kept
        if _is_linear_attention(block.module):
            between, state = _of_linear_attention(block.module)
            off, recurrent = off + between, recurrent + (state if loops else 0)
        elif not block.positionwise:
            off += _between(block, fused)
            attended += _widths(last)[0]
            if composed or not _is_one_piece(block):
                without = not fused and fast_core(block) is not None
                scores += 0 if without else 2 * _heads(block.module)
            else:
                heads, keys = heads + _heads(block.module), keys + _widths(block.module[block.first[-1]])[1]
    for module, times in products:
        if id(module) not in inside:
            light += times * sum(_widths(module))
            off += times * sum(_widths(module))
    states = _widths(products[0][0])[0] if products else 0
    features, weights = (
        sum(times * count(_widths(product)) for product, times in products) for count in (sum, math.prod)
    )
    norm_widths, trained = sum(widths.values()), _trains(layer)
    return LayerCounts(
        states, light, off, features, norm_widths, scores, weights, attended, trained, heads, keys, recurrent
    )


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


_LINEAR_ATTENTION = ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")


def _is_linear_attention(module: nn.Module) -> bool:
    return names_in(module, UPDATE) and all(hasattr(module, name) for name in _LINEAR_ATTENTION)


def _of_linear_attention(module: Any) -> tuple[int, int]:
    """What it keeps besides its products' results, and the size of its state.

    Kept are, of queries, keys and values, the convolution's results and their activations; normalized queries and keys; and of the
    result itself, its norm and its product with the gate.
    """
    queries_and_keys, values = 2 * module.num_k_heads * module.head_k_dim, module.num_v_heads * module.head_v_dim
    return 3 * queries_and_keys + 5 * values, values * module.head_k_dim


_CHOSEN = ("num_experts_per_tok", "top_k")
"""What mlx-lm's mixtures call how many experts a token goes through."""


def _products(module: nn.Module, chosen: int = 1) -> Iterator[tuple[Any, int]]:
    """The modules inside that multiply with weights, those with an adapter beside them as one, and how often each does so a token.

    Args:
        chosen: How many experts a token goes through, as a module around this one says it.
    """
    chosen = next((own for name in _CHOSEN if isinstance(own := getattr(module, name, None), int)), chosen)
    for child in module.children().values():
        for part in child if isinstance(child, list) else [child]:
            if is_experts(getattr(part, "linear", part)):
                yield part, chosen
            elif is_linear(part):
                yield part, 1
            elif isinstance(part, nn.Module):
                yield from _products(part, chosen)


def _widths(product: Any) -> tuple[int, int]:
    """In and out; of several experts' matrices, those of one."""
    outputs, inputs = part_shape(getattr(product, "linear", product))[-2:]
    return inputs, outputs


def _inputs_kept(norm: Any, fused: bool) -> int:
    """How many arrays of the size of its input a norm keeps: one in float32 where it computes in that."""
    if not fused:
        return 2
    return int(4 // norm.weight.dtype.size) if isinstance(norm, ShiftedRMSNorm) else 1


def _is_norm(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Module) and not is_linear(module) and isinstance(weight, mx.array) and weight.ndim == 1


_HEADS = ("n_heads", "num_heads", "num_attention_heads", "n_head")


def _heads(attention: nn.Module) -> int:
    return next((int(getattr(attention, name)) for name in _HEADS if hasattr(attention, name)), 1)


def _trains(module: nn.Module) -> bool:
    return bool(tree_flatten(module.trainable_parameters()))
