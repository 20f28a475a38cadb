"""How many operations a run takes, and from that how long: an estimate, made of the products alone.

a token     2 a weight forward, 2 backward for the layers that a gradient goes through, 2 more for weights that are trained themselves
attention   2 · width of a row · width of attention's result forward, 2.5 times that backward: half of the square, as it is causal
the head    4 a weight, for supervised positions alone
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_sft.training.memory import Footprint
from mlx_sft.training.recompute import Mode

REACHED = 0.7
"""The share of the speed of products that steps are taken to reach; norms, activations and the optimizer take the rest."""

_FORWARDS_AGAIN: dict[Mode, int] = {"off": 0, "light": 0, "layers": 1, "blocks": 2}
"""How often the backward pass computes a layer's products again."""

_ATTENTION_AGAIN: dict[Mode, int] = {"off": 0, "light": 1, "layers": 1, "blocks": 2}


@dataclass(frozen=True)
class Work:
    """What is computed in an epoch.

    Attributes:
        tokens: Of all rows, those that go through the model.
        squares: Σ length² of the rows.
        supervised: Positions that the head computes.
    """

    tokens: int
    squares: int
    supervised: int

    @classmethod
    def of(cls, lengths: NDArray[Any], supervised: int) -> Work:
        """Of rows of these lengths."""
        long = lengths.astype(np.int64)
        return cls(int(long.sum()), int((long * long).sum()), supervised)


def operations(footprint: Footprint, mode: Mode, work: Work) -> float:
    """Floating-point operations of an epoch."""
    full = footprint.trains_weights
    upper = sum(layer.weights for layer in footprint.layers)
    lower = sum(layer.weights for layer in footprint.below)
    a_token = 2 * (upper + lower) + (4 if full else 2) * upper + 2 * _FORWARDS_AGAIN[mode] * upper
    if not full:
        a_token += 6 * footprint.trainable
    attended = sum(layer.attended for layer in footprint.layers)
    only_forward = sum(layer.attended for layer in footprint.below)
    a_square = 2 * only_forward + (7 + 2 * _ATTENTION_AGAIN[mode]) * attended
    head = (6 if full else 4) * footprint.hidden * footprint.vocabulary
    return float(a_token * work.tokens + a_square * work.squares + head * work.supervised)


def seconds(operations: float, teraflops: float) -> float:
    """At a machine's speed of products."""
    return operations / (REACHED * teraflops * 1e12)
