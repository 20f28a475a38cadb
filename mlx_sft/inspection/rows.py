"""One row as it is shown: what became of it, and its tokens with what is learnt of them, turn by turn.

Knows a row and its tokens; knows nothing of which rows are shown, or where.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

import numpy as np

from mlx_sft.data.encode import View
from mlx_sft.data.formats import Conversation, Document, Item
from mlx_sft.data.mask.traced_rendering import NOBODY

Fate = Literal["kept", "truncated", "dropped", "bad"]
Part = Literal["train", "valid", ""]
"""What a row is used for; "" for one that is lost."""

_LONGEST_STRING = 400
_MOST_ITEMS = 20
_LONGEST_RAW = 4000


@dataclass(frozen=True, slots=True)
class Turn:
    """Consecutive tokens that the same message wrote.

    Attributes:
        message: Its index; None for what the template writes of itself, and for plain text.
        role: `user`, `assistant`, ...; `template`, `text` or `tokens` where there is no message.
        start, end: The tokens, half-open.
        supervised_tokens: Those of them that are learnt.
    """

    message: int | None
    role: str
    start: int
    end: int
    supervised_tokens: int


@dataclass(frozen=True, slots=True)
class ShownExample:
    """An example and its text, whole; learnt are the tokens before `cut_at` that have a weight.

    Attributes:
        pieces: The text of each token.
        special: Whether each is one of the tokenizer's special tokens.
        cut_at: Tokens that are left within max_length.
    """

    origin: str
    pieces: list[str]
    token_ids: list[int]
    weights: list[float]
    special: list[bool]
    turns: list[Turn]
    cut_at: int

    @classmethod
    def of(cls, view: View, item: Item, special_ids: frozenset[int], max_length: int) -> ShownExample:
        """The view of an example that was made of this item."""
        example = view.example
        token_ids: list[int] = example.token_ids.tolist()
        return cls(
            example.origin,
            view.pieces,
            token_ids,
            [round(weight, 4) for weight in example.loss_weights.tolist()],
            [token_id in special_ids for token_id in token_ids],
            list(_turns(view, item)),
            min(len(token_ids), max_length),
        )

    @property
    def supervised_tokens(self) -> int:
        return sum(weight != 0 for weight in self.weights[: self.cut_at])

    def to_json(self) -> dict[str, Any]:
        turns = [
            {
                "message": turn.message,
                "role": turn.role,
                "tokens": turn.end - turn.start,
                "supervised_tokens": turn.supervised_tokens,
            }
            for turn in self.turns
        ]
        return {
            "origin": self.origin,
            "tokens": len(self.token_ids),
            "supervised_tokens": self.supervised_tokens,
            "cut_at": self.cut_at,
            "turns": turns,
            "pieces": self.pieces,
            "token_ids": self.token_ids,
            "weights": self.weights,
        }


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row, what became of it, and why.

    Attributes:
        number: Of the row among those of all sources read for the same part, from 0.
        signs: What is suspicious about it, in the order of `screening.SIGNS`.
        duplicate_of: The origin of the first row with the same tokens and weights, or one example of them, where it is an
            earlier one.
        left_out: Turns of which the chat template leaves out words.
        examples: What it became, or would have; none for a bad row.
        raw: The row as JSON, shortened; empty where it could not even be read.
    """

    origin: str
    number: int
    source: str
    part: Part
    fate: Fate
    reason: str = ""
    hint: str = ""
    signs: tuple[str, ...] = ()
    duplicate_of: str | None = None
    left_out: int = 0
    examples: list[ShownExample] = field(default_factory=list)
    raw: str = ""

    @property
    def tokens(self) -> int:
        """Whole, before anything is cut."""
        return sum(len(example.token_ids) for example in self.examples)

    @property
    def supervised_tokens(self) -> int:
        return sum(example.supervised_tokens for example in self.examples)

    def to_json(self) -> dict[str, Any]:
        return {
            "origin": self.origin,
            "source": self.source,
            "part": self.part,
            "fate": self.fate,
            "reason": self.reason,
            "hint": self.hint,
            "signs": list(self.signs),
            "duplicate_of": self.duplicate_of,
            "turns_with_text_left_out": self.left_out,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "examples": [example.to_json() for example in self.examples],
            "raw": self.raw,
        }


def _turns(view: View, item: Item) -> Iterator[Turn]:
    elsewhere = "text" if isinstance(item, Document) else "tokens"
    roles = [str(message["role"]) for message in item.messages] if isinstance(item, Conversation) else []
    learnt, start = view.example.loss_weights != 0, 0
    for owner, tokens in groupby(view.token_to_message.tolist()):
        end = start + len(list(tokens))
        if owner < 0 and not start and isinstance(item, Conversation):
            owner = _system_at_start("".join(view.pieces[:end]), item)
        role = roles[owner] if 0 <= owner < len(roles) else "template" if roles else elsewhere
        yield Turn(owner if owner >= 0 else None, role, start, end, int(np.count_nonzero(learnt[start:end])))
        start = end


def _system_at_start(text: str, conversation: Conversation) -> int:
    """The first message where the template writes it outside its loop over messages, as many do with a system message."""
    first = conversation.messages[0]
    words = str(first.get("content") or "").strip()
    return 0 if first["role"] in ("system", "developer") and words and words in text else NOBODY


def raw_json(value: Any) -> str:
    """A row as JSON on one line, its long strings and lists shortened."""
    text = json.dumps(_shortened(value), ensure_ascii=False)
    return text if len(text) <= _LONGEST_RAW else f"{text[:_LONGEST_RAW]}…"


def _shortened(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _LONGEST_STRING:
        return f"{value[:_LONGEST_STRING]}… (and {len(value) - _LONGEST_STRING:,} characters more)"
    if isinstance(value, dict):
        return {str(key)[:_LONGEST_STRING]: _shortened(item) for key, item in list(value.items())[:_MOST_ITEMS]}
    if isinstance(value, list):
        more = [f"… (and {len(value) - _MOST_ITEMS:,} more)"] if len(value) > _MOST_ITEMS else []
        return [_shortened(item) for item in value[:_MOST_ITEMS]] + more
    return value
