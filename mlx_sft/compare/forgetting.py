"""How far a model has moved on text that it was not trained on: the divergence of its predictions from those of the base.

    KL = mean over positions of Σ over tokens of p(token) · (log p(token) − log q(token)),   p of the base, q of the trained model

In nats a token; 0 where nothing changed.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.batches import MicroBatch, collate
from mlx_sft.data.dataset import Examples
from mlx_sft.evaluate import bound
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import LoadedModel
from mlx_sft.model.vocabulary import vocabulary_size

_MOST_NUMBERS = 2**26
"""Of log-probabilities that are kept of the base, float32: 256 MB, which are 441 positions of Qwen3's vocabulary."""


def predictions(loaded: LoadedModel, examples: Examples) -> Iterator[NDArray[np.float32]]:
    """log p of every token at supervised positions of each example in turn, [positions, vocabulary]: at all of them, or at as many of
    each, spread over it, as can be kept."""
    split, most = SplitModel(loaded.model), _MOST_NUMBERS // vocabulary_size(loaded.model, loaded.config)
    every = max(1, -(-int(examples.supervised_tokens.sum()) // most))
    split.run_body = bound(loaded).run_body
    split.model.eval()
    for index in range(len(examples)):
        batch = collate(examples, MicroBatch((index,), max(1, int(examples.needed_lengths[index]))))
        hidden_states = split.hidden_states(mx.array(batch.token_ids))
        logits = split.logits(hidden_states.reshape(-1, hidden_states.shape[-1])[mx.array(batch.positions[::every])])
        precise = logits.astype(mx.float32)
        yield np.array(precise - mx.logsumexp(precise, axis=-1, keepdims=True))


def kl_from(base: list[NDArray[np.float32]], loaded: LoadedModel, examples: Examples) -> float:
    """The mean divergence of a model's predictions from those of the base."""
    total, positions = 0.0, 0
    for before, after in zip(base, predictions(loaded, examples), strict=True):
        total += float((np.exp(before) * (before - after)).sum(dtype=np.float64))
        positions += len(before)
    return total / positions
