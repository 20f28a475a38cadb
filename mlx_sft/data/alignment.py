"""Where a tokenizer's tokens stand in a text: which of them overlap a span, which message each is part of, what it looks like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.mask.traced_rendering import NOBODY, Integers, Span


@dataclass(frozen=True, slots=True)
class Alignment:
    """The characters `text[starts[i]:ends[i]]` that token i stands for; every token stands for at least one.

    Args:
        text: What was tokenized.
        starts: Shape (n,).
        ends: Shape (n,).
        added: Shape (n,), whether a token is one of the tokenizer's added tokens.
    """

    text: str
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    added: NDArray[np.bool_]

    @classmethod
    def of(cls, text: str, offsets: NDArray[np.int64], added: NDArray[np.bool_]) -> Alignment:
        """From a tokenizer's offsets, shape (n, 2), as if they tiled the text.

        Some tokenizers leave out the spaces around a token, down to nothing for a token that is a space; and the tokens
        of one character of several bytes share its place, the later ones in some tokenizers with a width of 0.
        """
        starts, ends = offsets[:, 0], offsets[:, 1]
        reached = np.maximum.accumulate(np.concatenate([[0], ends[:-1]])) if len(ends) else ends
        starts = np.minimum(starts, reached)
        return cls(text, np.where(starts == ends, np.maximum(starts - 1, 0), starts), ends, added)

    def supervised(self, spans: Sequence[Span]) -> NDArray[np.bool_]:
        """Which tokens are supervised so that the model learns to write the spans: those that overlap one. Shape (n,).

        Left out are a token that goes past the end of a span and shares only white space with it, and an added token
        that began before the span (one that swallows the white space behind it).
        """
        mask = np.zeros(len(self.starts), bool)
        for first, last in spans:
            overlaps = (self.starts < last) & (self.ends > first) & ~(self.added & (self.starts < first))
            for index in np.flatnonzero(overlaps & (self.ends > last)):
                overlaps[index] = not self.text[max(first, self.starts[index]) : last].isspace()
            mask |= overlaps
        return mask

    def token_to_message(self, char_to_message: Integers) -> Integers:
        """The message of each token, which is that of its first character. Shape (n,)."""
        if not len(char_to_message):
            return np.full(len(self.starts), NOBODY, np.int32)
        return char_to_message[np.minimum(self.starts, len(char_to_message) - 1)]

    def pieces(self) -> list[str]:
        """The text in one piece a token; the later tokens of one character have none."""
        reached = np.maximum.accumulate(np.concatenate([[0], self.ends])).tolist()
        reached[-1] = len(self.text) if len(self.ends) else 0
        return [self.text[first:last] for first, last in pairwise(reached)]
