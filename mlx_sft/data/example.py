"""`Example`: token ids with the weight of each in the loss, and as text again; `Outcome`: what became of a row."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.key_counts import KeyUse
from mlx_sft.data.mask.trace import Integers
from mlx_sft.data.screening import SIGNS
from mlx_sft.data.splitting import BREAK, pieces
from mlx_sft.data.template import NO_FACTS, Facts
from mlx_sft.data.tokenizer import decoded

Fate = Literal["truncated", "dropped", "bad"]

IGNORED = -100
"""The label of a token that is not supervised, as in PyTorch."""
SPAN = np.dtype([("start", "<i4"), ("end", "<i4"), ("weight", "<f4")])
"""A stretch of tokens of equal weight in the loss."""
_HALF_A_CHARACTER = "\ufffd"
_LONGEST_CHARACTER = 4  # bytes, and so tokens


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the model sees it.

    Weights and labels are *not* shifted: what is said at i is about `token_ids[i]`, which is predicted from the tokens
    before it; so the first token is never supervised.

        token_ids      <|im_start|> user ...  assistant \\n  Hi    <|im_end|> \\n
        loss_weights   0            0    ...  0         0   1     1          0
        labels         -100         -100 ...  -100      -100 Hi    <|im_end|> -100

    Args:
        origin: The row it came from, `chats.jsonl:17`.
        token_ids: int32, shape (n,).
        loss_weights: float32, shape (n,): a token's weight in the mean loss, 0 where it is not supervised.
        facts: What a person should know about it.
        breaks: Of dtype `splitting.BREAK`: where it may be split; none where it must stay in one piece, as a conversation must.
    """

    origin: str
    token_ids: NDArray[np.int32]
    loss_weights: NDArray[np.float32]
    facts: Facts = NO_FACTS
    breaks: NDArray[np.void] = field(default_factory=lambda: np.zeros(0, BREAK))

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def labels(self) -> NDArray[np.int32]:
        """int32, shape (n,): the token itself where it is supervised, else -100."""
        return np.where(self.loss_weights != 0, self.token_ids, np.int32(IGNORED))

    @property
    def supervised_tokens(self) -> int:
        return int(np.count_nonzero(self.loss_weights))

    @property
    def needed_length(self) -> int:
        """Tokens that must be computed: those before the last supervised one, which needs no prediction; 0 where none is."""
        return int(np.flatnonzero(self.loss_weights).max(initial=0))

    def truncated(self, length: int) -> Example:
        """Its first `length` tokens."""
        return replace(self, token_ids=self.token_ids[:length], loss_weights=self.loss_weights[:length])

    def pieces(self, longest: int) -> list[tuple[int, int]]:
        """The tokens, half-open, of each piece of at most `longest`; it alone where it is no longer, or may not be split."""
        if not len(self.breaks):
            return [(0, len(self))]
        return list(pieces(self.breaks, len(self), longest))

    def in_pieces(self, longest: int) -> list[Example]:
        """Its pieces, `chats.jsonl:17#1` and so on; the first token of each is not supervised, as nothing stands before it."""
        found = []
        for number, (start, end) in enumerate(self.pieces(longest), 1):
            weights = self.loss_weights[start:end].copy()
            weights[:1] = 0
            found.append(Example(f"{self.origin}#{number}", self.token_ids[start:end], weights))
        return found

    def digest(self) -> bytes:
        """SHA-256 of its tokens and weights, the same on every machine; equal only for equal examples."""
        return hashlib.sha256(
            self.token_ids.astype("<i4").tobytes() + self.loss_weights.astype("<f4").tobytes()
        ).digest()


@dataclass(frozen=True, slots=True)
class Note:
    """A row that was truncated, dropped or bad: where it is, what became of it, why, and what would help."""

    origin: str
    fate: Fate
    reason: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a row: examples, of which each has something to train on, or a note that says why there are none.

    Attributes:
        origin: The row's; those of its examples begin with it.
        signs: Those of `screening.SIGNS` that it shows.
        mixed: Whether the note is that the row has another format than its source.
        keys: What became of its keys; none where it is no object.
    """

    origin: str
    examples: Sequence[Example]
    signs: frozenset[str] = frozenset()
    note: Note | None = None
    mixed: bool = False
    keys: Sequence[KeyUse] = ()

    @property
    def sign_mask(self) -> int:
        """The signs as bits, in the order of `SIGNS`."""
        return sum(1 << bit for bit, name in enumerate(SIGNS) if name in self.signs)


@dataclass(frozen=True, slots=True)
class View:
    """An example beside the text it was made from.

    Args:
        example: As it is trained on.
        pieces: The text of each token, as it stands in the rendered text; "" for the later tokens of one character.
        token_to_message: int32, shape (n,): the index of the message that each token was written for, -1 for none.
    """

    example: Example
    pieces: list[str]
    token_to_message: Integers

    def in_pieces(self, longest: int) -> list[View]:
        """The views of the example's pieces; itself where it is in one."""
        bounds = self.example.pieces(longest)
        if len(bounds) == 1:
            return [self]
        return [
            View(example, self.pieces[start:end], self.token_to_message[start:end])
            for example, (start, end) in zip(self.example.in_pieces(longest), bounds, strict=True)
        ]


def decoded_segments(tokenizer: Any, example: Example) -> list[tuple[str, bool]]:
    """An example as text, in pieces that are supervised (True) or not, in order; special tokens are shown."""
    supervised = example.loss_weights != 0
    bounds = [0, *(np.flatnonzero(supervised[1:] != supervised[:-1]) + 1).tolist(), len(example)]
    segments, before = [], ""
    for first, last in pairwise(bounds):
        # From the start each time: some decoders change the first token of what they are given.
        text = decoded(tokenizer, example.token_ids[:last].tolist())
        segments.append((text[len(before) :], bool(supervised[first])))
        before = text
    return segments


def decoded_pieces(tokenizer: Any, token_ids: list[int]) -> list[str]:
    """The text of each token where there is no text but theirs; the later tokens of one character have none."""
    pieces = [""] * len(token_ids)
    first = 0
    for after in range(1, len(token_ids) + 1):
        text = decoded(tokenizer, token_ids[first:after])
        if not text.endswith(_HALF_A_CHARACTER) or after - first == _LONGEST_CHARACTER or after == len(token_ids):
            pieces[first], first = text, after
    return pieces


def spans_of(loss_weights: NDArray[np.float32]) -> NDArray[np.void]:
    """The stretches of equal weight other than 0, shape (spans,) of dtype `SPAN`; `weights_of` is the inverse."""
    bounds = np.flatnonzero(loss_weights[1:] != loss_weights[:-1]) + 1
    starts = np.concatenate([[0], bounds]) if len(loss_weights) else bounds
    spans = np.zeros(len(starts), SPAN)
    spans["start"] = starts
    spans["end"] = np.concatenate([bounds, [len(loss_weights)]])[: len(starts)]
    spans["weight"] = loss_weights[starts]
    supervised: NDArray[np.void] = spans[spans["weight"] != 0]
    return supervised


def weights_of(spans: NDArray[np.void], length: int) -> NDArray[np.float32]:
    """float32, shape (length,): the weight of each token; spans may reach beyond the length."""
    weights = np.zeros(length, np.float32)
    for start, end, weight in spans.tolist():
        weights[start:end] = weight
    return weights
