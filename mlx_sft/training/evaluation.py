"""What an evaluation finds out, summed up over all its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.batches import Batch
from mlx_sft.objectives import Weighting


@dataclass(frozen=True)
class Evaluation:
    """Sums over a set of examples.

    Attributes:
        loss: The objective's: for SFT the weighted mean over supervised tokens, in nats.
        token_accuracy: Share of supervised tokens that are the likeliest, weighted alike.
        exact_match: Share of the examples of which every supervised token is the likeliest: where an example is one answer, those that
            greedy decoding gives as they are written.
        own: What the objective says of itself.
        perplexity: exp(loss), up to a loss of 700, beyond which it is no number of float64; None where the loss is no cross-entropy.
    """

    loss: float
    token_accuracy: float
    exact_match: float
    tokens: int
    supervised_tokens: int
    own: Mapping[str, float] = field(default_factory=dict)
    perplexity: float | None = None

    @classmethod
    def of(
        cls,
        batches: Sequence[Batch],
        weighting: Weighting,
        found: Sequence[tuple[NDArray[np.float32], NDArray[np.uint32]]],
        counted: Sequence[NDArray[np.float32]],
    ) -> Evaluation:
        """Of micro-batches of which log p of the targets and the likeliest tokens were found.

        Args:
            counted: What each target weighs in the accuracy.
        """
        hits = [likeliest == batch.targets for (_, likeliest), batch in zip(found, batches, strict=True)]
        loss = weighting.loss
        if loss is None:
            loss = -_weighed([log_p for log_p, _ in found], weighting.weights) / weighting.normalizer
        return cls(
            loss=loss,
            token_accuracy=_weighed(hits, counted) / sum(float(own.sum(dtype=np.float64)) for own in counted),
            exact_match=_all_hit(hits, batches, counted),
            tokens=sum(batch.tokens for batch in batches),
            supervised_tokens=sum(len(batch.targets) for batch in batches),
            own=weighting.metrics,
            perplexity=math.exp(min(loss, 700.0)) if weighting.loss is None else None,
        )


def _all_hit(
    hits: Sequence[NDArray[np.bool_]], batches: Sequence[Batch], weights: Sequence[NDArray[np.float32]]
) -> float:
    """The share of the rows that have no miss, of those that have a weight."""
    found = []
    for hit, batch, own in zip(hits, batches, weights, strict=True):
        counted, misses = (np.bincount(batch.owners, of, len(batch.lengths)) for of in (own != 0, ~hit & (own != 0)))
        found.append(misses[counted > 0] == 0)
    return float(np.mean(np.concatenate(found)))


def _weighed(values: Sequence[NDArray[Any]], weights: Sequence[NDArray[np.float32]]) -> float:
    """Σ weight · value over the positions of all micro-batches."""
    return sum(float((one * own).sum(dtype=np.float64)) for one, own in zip(values, weights, strict=True))
