"""Sums as fast as the backend allows. Knows nothing of what they are of."""

from __future__ import annotations

import mlx.core as mx


def row_sums(x: mx.array) -> mx.array:
    """Σ over the last axis, which stays. As a product: `sum` takes several times as long on the CPU."""
    return x @ mx.ones((x.shape[-1], 1))
