"""Attention where the device's own has no gradient: composed of plain operations, which every device can differentiate.

Metal's kernels have none for attention sinks, for masks that are trained, and for some head sizes and lengths; which, depends on MLX's
version. So the device is asked before the first step (`device.py`).
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx


def composed_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: str | mx.array | None = None,
    sinks: mx.array | None = None,
    **_: Any,
) -> mx.array:
    """What `mx.fast.scaled_dot_product_attention` computes, with its arguments; the scores of every query and key exist at once.

    Args:
        q: [rows, heads, queries, d].
        k, v: [rows, kv_heads, keys, d]; query head i looks at key head i // (heads // kv_heads).
        mask: `causal`, or an array that says which scores count or what is added to them.
        sinks: [heads], a score more for each query, whose value is nothing.
    """
    rows, heads, queries = q.shape[:3]
    kv_heads, keys = k.shape[1:3]
    grouped = (scale * q).reshape(rows, kv_heads, heads // kv_heads, queries, -1)
    scores = (grouped @ k[:, :, None].swapaxes(-1, -2)).astype(mx.float32)
    if isinstance(mask, str):
        mask = mx.arange(keys)[None] <= mx.arange(keys - queries, keys)[:, None]
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        per_head = mask.shape[1] == heads and heads > 1
        mask = mask.reshape(mask.shape[0], kv_heads, -1, *mask.shape[2:]) if per_head else mask[:, :, None]
        scores = mx.where(mask, scores, -math.inf) if mask.dtype == mx.bool_ else scores + mask
    if sinks is not None:
        column = sinks.astype(mx.float32).reshape(1, kv_heads, -1, 1, 1)
        scores = mx.concatenate([mx.broadcast_to(column, (*scores.shape[:-1], 1)), scores], axis=-1)
    weights = mx.softmax(scores, axis=-1)[..., -keys:].astype(v.dtype)
    return (weights @ v[:, :, None]).reshape(rows, heads, queries, -1)
