"""NEFTune: uniform noise on the embeddings in training (Jain et al. 2023, https://arxiv.org/abs/2310.05914).

    embeddings of a conversation [L, d] + uniform(-1, 1) · alpha / √(L · d)

L is the conversation's own number of tokens. The noise of a token follows from the seed, the step, the number of its conversation and
its place there, so that neither how a step is cut nor where a run was interrupted changes it. A conversation that a step has several
times has other noise each time: they are counted in the order of the micro-batches, in which equal ones follow one another in any cut.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_sft.data.batches import Batch, Span
from mlx_sft.methods.virtual_tokens import EmbeddingsOf

Draw = tuple[mx.array, mx.array]
"""For each token of a micro-batch its random key [rows, width, 2], and the bound of its noise [rows, width]."""

_MOST_TOKENS = 2**22
"""Of a conversation, so that the keys of its repetitions are others."""


class Neftune:
    """The noise of a model's embeddings.

    Args:
        alpha: Above 0.

    Raises:
        UserError: If the model has no embeddings that are known.
    """

    def __init__(self, model: nn.Module, alpha: float) -> None:
        self._embeddings, self._alpha = EmbeddingsOf(model), alpha

    def draw(self, batches: Sequence[Batch], key: mx.array) -> list[Draw]:
        """What the noise of a step's micro-batches is made of.

        Args:
            key: Of the step.
        """
        own_key, before = mx.random.split(key, 2)[1], Counter[int]()
        return [self._of_batch(batch, own_key, before) for batch in batches]

    def _of_batch(self, batch: Batch, key: mx.array, before: Counter[int]) -> Draw:
        rows, width = batch.token_ids.shape
        spans = batch.spans or [Span(row * width, (row + 1) * width) for row in range(rows)]
        words, bounds = np.zeros((rows * width, 2), np.uint32), np.zeros(rows * width, np.float32)
        for span, example, length in zip(spans, batch.examples, batch.lengths, strict=True):
            own = slice(span.start, span.end)
            words[own, 0] = example
            words[own, 1] = np.arange(span.shared, span.length) + before[example] * _MOST_TOKENS
            bounds[own] = self._alpha / math.sqrt(length * self._embeddings.width)
            before[example] += 1
        keys = key + mx.array(words)
        return keys.reshape(rows, width, 2), mx.array(bounds).reshape(rows, width)

    def added(self, draw: Draw | None) -> AbstractContextManager[None]:
        """Within the block the embeddings have the noise; with None they are as they are."""
        if draw is None:
            return nullcontext()
        (rows, width, _), numbers = draw[0].shape, self._embeddings.width
        uniform = mx.vmap(lambda key: mx.random.uniform(-1, 1, (numbers,), key=key))(draw[0].reshape(-1, 2))
        return self._embeddings.noisy(uniform.reshape(rows, width, numbers) * draw[1][..., None])
