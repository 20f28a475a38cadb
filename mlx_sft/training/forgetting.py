"""How far a model has moved on text that it was not trained on: the divergence of its predictions from those of the base.

    KL = mean over positions of Σ over tokens of p(token) · (log p(token) − log q(token)),   p of the base, q of the trained model

In nats a token; 0 where nothing changed. The base is the model before any adapter is on it. Of it is kept what enters the head, where no
training changes that; else its predictions at fewer positions, because they are as wide as the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console
from mlx_sft.data.batches import MicroBatch, collate
from mlx_sft.data.dataset import Examples, check_vocabulary
from mlx_sft.data.pipeline import ReadingProgress
from mlx_sft.data.prepare import PreparedData, prepare_file
from mlx_sft.errors import UserError
from mlx_sft.model.head import SplitModel
from mlx_sft.training.step import to_float

TEXTS = Path(__file__).with_name("general.jsonl")
"""Some pages of general knowledge in English."""

_LONGEST, _SHORTEST = 512, 16
"""Tokens of a row at the most, where rows that are trained on are long, and where they are short."""
_SHARE, _FEWEST_TOKENS, MOST_TOKENS = 0.05, 128, 2048
"""Of the tokens that are trained on between two evaluations so many are read at each, forward alone; and bounds of that."""
_MOST_NUMBERS = 2**24
"""Of log-probabilities that a run keeps of the base, float32: 64 MB, which are 110 positions of Qwen3's vocabulary."""
_AT_ONCE = 2**21
"""Of log-probabilities that are computed at once."""


def general_rows(
    config: TrainConfig, file: str | None, tokenizer: object, progress: ReadingProgress | None, longest: int = _LONGEST
) -> Examples:
    """The rows of a file, in any form that training takes by itself, with the chat template of the run; `TEXTS` where there is none.

    Args:
        longest: Tokens of a row.

    Raises:
        UserError: If they cannot be read.
    """
    plain = TrainConfig(
        model=config.model, chat_template=config.chat_template, chat_template_kwargs=config.chat_template_kwargs,
        max_length=min(config.max_length, longest), data_cache=config.data_cache, data_workers=1,
    )  # fmt: skip
    return prepare_file(file or str(TEXTS), plain, tokenizer, progress)[0]


class ForgettingMeter:
    """Measures models against the base.

    Args:
        split: The base.
        examples: General rows; their supervised positions are compared.
        vocabulary: Tokens of the model.
        most_numbers: Of log-probabilities that are kept.
    """

    def __init__(
        self, split: SplitModel, examples: Examples, vocabulary: int, most_numbers: int = _MOST_NUMBERS
    ) -> None:
        split.model.eval()
        self._examples = examples
        self._rows_at_once = max(1, _AT_ONCE // vocabulary)
        self._every = max(1, -(-int(examples.supervised_tokens.sum()) // max(1, most_numbers // vocabulary)))
        self._states: list[mx.array] | None = []
        self._log_probs: list[NDArray[np.float32]] = []
        for states in self._entering_the_head(split):
            self._states.append(states)
            of_row = [np.array(_log_probs(split, part)) for part in self._parts(states[:: self._every])]
            self._log_probs.append(np.concatenate(of_row))

    @classmethod
    def of_run(
        cls, config: TrainConfig, data: PreparedData, split: SplitModel, vocabulary: int, console: Console
    ) -> ForgettingMeter | None:
        """That of a run, before its method is attached; None where none is asked for, or nothing is evaluated.

        Raises:
            UserError: If the rows that were given cannot be read.
        """
        if not (config.forgetting and data.valid):
            return None
        try:
            # No longer than what is trained on, so that they take no more memory than that.
            longest = min(_LONGEST, max(_SHORTEST, int(data.train.needed_lengths.max())))
            examples = general_rows(config, config.general_data, data.tokenizer, None, longest)
            check_vocabulary(examples, vocabulary)
        except UserError as error:
            if config.general_data is not None:
                raise
            console.note(f"forgetting is not measured: {error.what}")
            return None
        most = _tokens_at_each(config, data.train) if config.general_data is None else MOST_TOKENS
        kept = max(1, int(np.searchsorted(np.cumsum(examples.lengths), most, side="right")))
        if config.general_data is not None and kept < len(examples):
            console.note(f"forgetting is measured on the first {kept} of {len(examples):,} general rows")
        return cls(split, examples[:kept], vocabulary)

    def settle(self, *, head_is_frozen: bool) -> None:
        """Keep of the base what is needed: what enters a head that stays as it is, or else its predictions."""
        if head_is_frozen:
            self._log_probs = []
        else:
            self._states = None

    def measured(self, split: SplitModel) -> float:
        """The mean divergence of a model's predictions from those of the base."""
        total, positions = 0.0, 0
        for index, states in enumerate(self._entering_the_head(split)):
            after = states if self._states is not None else states[:: self._every]
            before = self._states[index] if self._states is not None else mx.array(self._log_probs[index])
            for p, q in zip(self._parts(before), self._parts(after), strict=True):
                log_p = _log_probs(split, p) if self._states is not None else p
                log_q = _log_probs(split, q)
                total += to_float((mx.exp(log_p) * (log_p - log_q)).sum(axis=-1).sum())
            positions += len(after)
        return total / positions

    def _entering_the_head(self, split: SplitModel) -> Iterator[mx.array]:
        """[positions, hidden] of each row in turn."""
        for index in range(len(self._examples)):
            batch = collate(self._examples, MicroBatch((index,), max(1, int(self._examples.needed_lengths[index]))))
            states = split.hidden_states(mx.array(batch.token_ids))
            found = states.reshape(-1, states.shape[-1])[mx.array(batch.positions)]
            mx.eval(found)
            yield found

    def _parts(self, states: mx.array) -> Iterator[mx.array]:
        return (states[first : first + self._rows_at_once] for first in range(0, len(states), self._rows_at_once))


def _tokens_at_each(config: TrainConfig, train: Examples) -> int:
    """Of `TEXTS`, by what is trained on from one evaluation to the next: a function of settings and data, so that it can be repeated."""
    rows = len(train) if config.eval_every == "epoch" else config.eval_every * config.batch_size
    between = rows * int(train.lengths.sum()) / len(train)
    return int(min(MOST_TOKENS, max(_FEWEST_TOKENS, _SHARE * between)))


def _log_probs(split: SplitModel, states: mx.array) -> mx.array:
    """[positions, vocabulary] log p of every token, float32."""
    logits = split.logits(states).astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
