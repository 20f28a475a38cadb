"""Causal attention that never holds the square of scores: blocks of queries, each against the keys up to its own end.

    queries      keys 0 1 2 3 4 5        A block's scores exist alone: they become its rows of the result and the logarithm of
    0 1  ─►          ■ ·                 each row's sum, which is kept. Backward makes the scores again, block by block.
    2 3  ─►          ■ ■ ■ ·             Keys after a block's last query are never looked at: half of the square.
    4 5  ─►          ■ ■ ■ ■ ■ ·         ■ seen, · masked

FlashAttention-2's equations (Dao 2023, https://arxiv.org/abs/2307.08691, section 3.1) in array operations, for the CPU backend, whose
own attention builds and keeps the square. There may be more keys than queries, whose first ones then lie in front of all queries. It takes
no padding, and has no second derivative.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from mlx_sft.cpu.elementwise import exponential, row_sums
from mlx_sft.model.order import after

_BLOCK_ROWS = 64
_FEWEST_ROWS = 32
_BLOCK_BYTES = 12 * 2**20


def block_rows(rows: int, heads: int, length: int) -> int:
    """Queries of each row in a block: blocks of one size, 64 or just under, or as few as 32 so that float32 scores fit 12 MiB.

    A short block skips more of the square and stays in the processor's cache; a very short one makes products slow. About six
    blocks of scores exist at a time in the backward pass.
    """
    most = min(_BLOCK_ROWS, max(_FEWEST_ROWS, _BLOCK_BYTES // (4 * rows * heads * length)))
    blocks = -(-length // most)
    return -(-length // blocks)


def causal_attention(
    queries: mx.array, keys: mx.array, values: mx.array, scale: float, *, block: int | None = None
) -> mx.array:
    """softmax(scale · queries keysᵀ, masked) values: what `mx.fast.scaled_dot_product_attention` gives with `mask="causal"`.

    Between forward and backward it keeps queries, keys, values and a number for each query and head.

    Args:
        queries: [rows, heads, length, d].
        keys: [rows, kv_heads, n + length, d], of which every query sees the first n; query head i looks at key head
            i // (heads // kv_heads).
        values: [rows, kv_heads, n + length, d_v].
        scale: What a query's product with a key is multiplied by.
        block: Queries of each row at a time; None for `block_rows`.

    Returns:
        [rows, heads, length, d_v] in the queries' dtype, computed in float32. In memory positions come before heads: the product
        that follows attention reads it so, without a copy.
    """
    size = block or block_rows(*queries.shape[:3])

    # Every array comes in as an argument: a closure over a traced array breaks `mx.compile`.
    @mx.custom_function
    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return _forward(queries, keys, values, scale, size)

    @attend.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        queries, keys, values = primals
        return _backward(queries, keys, values, outputs[1], cotangents[0], scale, size)

    outputs: Any = attend(queries, keys, values)
    attended: mx.array = outputs[0]
    return attended


def _forward(queries: mx.array, keys: mx.array, values: mx.array, scale: float, size: int) -> tuple[mx.array, mx.array]:
    """The result, and log Σ exp(score) of each query, [rows, heads, length, 1] in float32."""
    heads, length, kv_heads = *queries.shape[1:3], keys.shape[1]
    in_front = keys.shape[2] - length
    keys, values = _precise(keys), _precise(values)
    results: list[mx.array] = []
    log_sums: list[mx.array] = []
    for start in range(0, length, size):
        end = min(start + size, length)
        block = after([*results[-1:], *log_sums[-1:]], _grouped(queries[:, :, start:end], kv_heads) * scale)
        seen = in_front + end
        scores = _scores(block, keys[:, :, :seen], in_front + start, seen)
        highest = scores.max(axis=-1, keepdims=True)
        exponentials = exponential(scores - highest)
        total = row_sums(exponentials)
        result = _by_head(exponentials @ values[:, :, :seen] / total, heads)
        results.append(result.astype(queries.dtype).swapaxes(1, 2))
        log_sums.append(_by_head(highest + mx.log(total), heads))
    attended = mx.contiguous(mx.concatenate(results, axis=1)).swapaxes(1, 2)
    return attended, mx.concatenate(log_sums, axis=2)


def _backward(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    log_sums: mx.array,
    cotangent: mx.array,
    scale: float,
    size: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """Gradients of queries, keys and values; from the last block to the first, so that a block's own keys are done with it."""
    dtypes = (queries.dtype, keys.dtype, values.dtype)
    heads, length, kv_heads = *queries.shape[1:3], keys.shape[1]
    in_front = keys.shape[2] - length
    keys, values = _precise(keys), _precise(values)
    for_queries: list[mx.array] = []
    for_keys: list[mx.array] = []
    for_values: list[mx.array] = []
    sums: list[mx.array] = []
    for start in reversed(range(0, length, size)):
        end = min(start + size, length)
        rows = (slice(None), slice(None), slice(start, end))
        done = [*sums, *for_queries[-1:], *for_keys[-1:], *for_values[-1:]]
        block = after(done, _grouped(queries[rows], kv_heads) * scale)
        for_block = _grouped(cotangent[rows], kv_heads)
        seen = in_front + end
        scores = _scores(block, keys[:, :, :seen], in_front + start, seen)
        probabilities = exponential(scores - _grouped(log_sums[rows], kv_heads))
        for_scores = for_block @ values[:, :, :seen].swapaxes(-1, -2)
        for_scores = (for_scores - row_sums(for_scores * probabilities)) * probabilities
        products = [for_scores.swapaxes(-1, -2) @ block, probabilities.swapaxes(-1, -2) @ for_block]
        sums = (
            [product + later[:, :, :seen] for product, later in zip(products, sums, strict=True)] if sums else products
        )
        for_queries.append((_by_head(for_scores @ keys[:, :, :seen], heads) * scale).astype(dtypes[0]))
        # The addition copies: a view would keep a whole sum alive.
        own = in_front + start if start else 0
        for_keys.append((sums[0][:, :, own:] + 0).astype(dtypes[1]))
        for_values.append((sums[1][:, :, own:] + 0).astype(dtypes[2]))
    return _joined(for_queries), _joined(for_keys), _joined(for_values)


def _scores(queries: mx.array, keys: mx.array, start: int, end: int) -> mx.array:
    """Masked scores [rows, kv_heads, group · (end − start), end] of scaled and grouped queries from `start` on.

    The mask is added: choosing among scores with `mx.where` takes ten times as long on the CPU. It is minus infinity, where
    `exponential` is quick; at any number that underflows it is slow. A query sees itself, so that every row has a finite score.
    """
    scores = queries @ keys.swapaxes(-1, -2)
    seen = mx.arange(end)[None] <= mx.arange(start, end)[:, None]
    by_group = scores.reshape(*scores.shape[:2], -1, *seen.shape)
    return (by_group + mx.where(seen, 0.0, -math.inf)).reshape(scores.shape)


def _grouped(x: mx.array, kv_heads: int) -> mx.array:
    """[rows, heads, length, d] → [rows, kv_heads, group · length, d] in float32: heads that share keys, one after another."""
    return _precise(x).reshape(x.shape[0], kv_heads, -1, x.shape[-1])


def _by_head(x: mx.array, heads: int) -> mx.array:
    """The inverse of `_grouped`."""
    return x.reshape(x.shape[0], heads, -1, x.shape[-1])


def _joined(blocks: list[mx.array]) -> mx.array:
    """Blocks of positions, the last first, as one array."""
    return mx.concatenate(blocks[::-1], axis=2)


def _precise(x: mx.array) -> mx.array:
    return x.astype(mx.float32)
