"""One small micro-step that is measured before a run begins, so that what was counted is set right by what is taken.

It learns nothing, writes nothing and draws no random number. Knows nothing of what is chosen with the result.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_sft.data.batches import Batch
from mlx_sft.methods import Parameters
from mlx_sft.training.memory import Footprint
from mlx_sft.training.step import Learner

PROBE_TOKENS = 256
"""Enough for what grows with the tokens to stand out from what does not."""

_SUPERVISED = 16
"""So few that the layers are measured, and not the logits."""

_TRUSTED = (0.9, 1.5)
"""A small step that takes less than was counted says little of a large one; one that takes much more measured something else."""


@dataclass(frozen=True)
class Probe:
    """What a measurement found.

    Attributes:
        correction: Measured bytes for each that was predicted, of those that grow with the tokens.
        seconds: What it took.
    """

    correction: float
    seconds: float


def probe(learner: Learner, parameters: Parameters, footprint: Footprint, tokens: int) -> Probe:
    """Measure the peak of a micro-batch of one row, in the learner's mode.

    Args:
        tokens: Of the row, at most; `PROBE_TOKENS` are enough.
    """
    started = time.perf_counter()
    length = min(tokens, PROBE_TOKENS)
    predicted = footprint.predict(learner.mode, length, supervised=min(length, _SUPERVISED))
    expected = max(1, predicted.kept + predicted.passing)
    before, limit = mx.get_active_memory(), mx.get_memory_limit()
    mx.reset_peak_memory()
    if footprint.held:
        mx.set_memory_limit(before + predicted.limit - predicted.weights - predicted.trained)
    try:
        mx.eval(learner.gradient(parameters, [_row(length)]))
    finally:
        mx.set_memory_limit(limit)
    correction = (mx.get_peak_memory() - before) / expected
    low, high = _TRUSTED
    return Probe(min(high, max(low, correction)), time.perf_counter() - started)


def _row(length: int) -> Batch:
    """A row of one token over and over."""
    positions = np.arange(length, dtype=np.int32)[-_SUPERVISED:]
    return Batch(
        token_ids=np.zeros((1, length), np.int32),
        positions=positions,
        targets=np.zeros(len(positions), np.int32),
        weights=np.ones(len(positions), np.float32),
        tokens=length,
        needed_tokens=length,
    )
