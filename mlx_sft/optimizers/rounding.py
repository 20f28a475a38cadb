"""Stochastic rounding: a float32 becomes one of the two bfloat16 beside it, and its mean is the float32 itself.

    bits of a float32   s eeeeeeee mmmmmmm | mmmmmmmmmmmmmmmm   the left half is a bfloat16
    + 16 random bits                         rrrrrrrrrrrrrrrr   carry into the left half with the probability (right half) / 2^16

A step that is much smaller than the distance to the next bfloat16 is then taken sometimes, where rounding to nearest would never take
it (Gupta et al. 2015, https://arxiv.org/abs/1502.02551). torchao's `bf16_stochastic_round` is the same.
"""

from __future__ import annotations

import math

import mlx.core as mx


def stochastically_rounded(values: mx.array, bits: mx.array) -> mx.array:
    """Float32 → bfloat16 of the same shape; a number that bfloat16 has stays as it is, and so do infinity and NaN.

    Args:
        bits: Random, uint16 [as `values`].
    """
    carried = (values.view(mx.uint32) + bits) >> 16
    rounded = carried.astype(mx.uint16).view(mx.bfloat16)
    return mx.where(mx.isfinite(values), rounded, values.astype(mx.bfloat16))


def random_bits(shape: tuple[int, ...], key: mx.array) -> mx.array:
    """16 random bits for each number, uint16: a key is split into others, of 64 random bits each, because MLX has no function for bits."""
    size = math.prod(shape)
    return mx.random.split(key, -(-size // 4)).view(mx.uint16).reshape(-1)[:size].reshape(shape)
