"""What lies between a block's products, computed by operations of our own where those are the same and cost less: on the CPU.

There MLX's attention keeps a score of every position with every other, and its exponentials are slow. On a GPU the model's own
code is as good. Whether an operation is the same is not read off names: both are computed on random numbers and compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_sft.cpu.attention import causal_attention
from mlx_sft.cpu.elementwise import silu_product
from mlx_sft.model.blocks import Block
from mlx_sft.model.linears import part_shape

Core = Callable[..., mx.array]
"""`core(projected, x, *args, **kwargs)`, as `Block.core`."""

_ROWS, _LENGTH = 2, 5


def fast_core(block: Block) -> Core | None:
    """An operation that computes what `block.core` does; None where there is none, or the model's own is as good."""
    if mx.default_device() != mx.Device(mx.cpu):
        return None
    candidates: list[Core] = [_gated, _gated_in_other_order] if block.positionwise else [_attention_of(block)]
    arguments = () if block.positionwise else ("causal", None)
    return next((core for core in candidates if _same(block, core, arguments)), None)


def _same(block: Block, core: Core, arguments: tuple[Any, ...]) -> bool:
    """Whether both give the same for random products."""
    x = mx.zeros((_ROWS, _LENGTH, 1))
    widths = [_width(block.module[name]) for name in block.first]
    keys = mx.random.split(mx.random.key(0), len(widths) + 1)
    projected = [2 * mx.random.normal((_ROWS, _LENGTH, w), key=key) for w, key in zip(widths, keys, strict=False)]
    try:
        own, other = block.core(projected, x, *arguments), core(projected, x, *arguments)
    except (AttributeError, TypeError, ValueError):
        return False
    if own.shape != other.shape:
        return False
    return bool((mx.abs(own - other).max() <= 1e-5 * mx.abs(own).max()).item())


def _width(product: Any) -> int:
    return part_shape(getattr(product, "linear", product))[0]


def _gated(projected: list[mx.array], x: mx.array) -> mx.array:
    gate, up = projected
    return silu_product(gate, up)


def _gated_in_other_order(projected: list[mx.array], x: mx.array) -> mx.array:
    up, gate = projected
    return silu_product(gate, up)


def _attention_of(block: Block) -> Core:
    """Grouped-query attention with rotary positions, and norms of queries and keys where the module has them."""
    module = block.module

    def core(projected: list[mx.array], x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if not isinstance(mask, str):
            return block.core(projected, x, mask, cache)
        rows, length, _ = x.shape
        queries, keys, values = (
            p.reshape(rows, length, count, -1) for p, count in zip(projected, counts(), strict=True)
        )
        queries, keys = norm("q_norm", queries), norm("k_norm", keys)
        queries, keys, values = (heads.transpose(0, 2, 1, 3) for heads in (queries, keys, values))
        if cache is None:
            queries, keys = module.rope(queries), module.rope(keys)
        else:
            queries, keys = (module.rope(heads, offset=cache.offset) for heads in (queries, keys))
            keys, values = cache.update_and_fetch(keys, values)
        out = causal_attention(queries, keys, values, module.scale)
        return out.transpose(0, 2, 1, 3).reshape(rows, length, -1)

    def counts() -> tuple[Any, Any, Any]:
        heads, kv_heads = (
            next((getattr(module, name) for name in names if hasattr(module, name)), None)
            for names in (
                ("n_heads", "num_heads", "num_attention_heads"),
                ("n_kv_heads", "num_kv_heads", "num_key_value_heads"),
            )
        )
        return heads, kv_heads, kv_heads

    def norm(name: str, heads: mx.array) -> mx.array:
        result: mx.array = getattr(module, name)(heads) if name in module else heads
        return result

    return core
