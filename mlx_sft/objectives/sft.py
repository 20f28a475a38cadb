"""Supervised fine-tuning: the mean cross-entropy over a step's supervised tokens, each with its row's weight.

The mean is over the step, not over micro-batches, so that a step's update is the same however it is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mlx_sft.objectives import LogProbs, Objective, Weighting

if TYPE_CHECKING:
    from mlx_sft.data.batches import Batch


class SFT(Objective):
    """The objective `sft`."""

    name: ClassVar = "sft"

    def describe(self) -> str:
        return "supervised fine-tuning"

    def weigh(self, batches: Sequence[Batch], log_probs: LogProbs | None = None) -> Weighting:
        normalizer = sum(float(batch.weights.sum(dtype=np.float64)) for batch in batches)
        return Weighting([batch.weights for batch in batches], normalizer)
