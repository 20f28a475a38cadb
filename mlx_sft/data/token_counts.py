"""What became of every token of the rows that could be read, in exactly one column; the columns add up to all of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True)
class TokenColumn:
    """So many tokens that are supervised, and so many that are only read."""

    supervised: int = 0
    context: int = 0

    def __add__(self, other: TokenColumn) -> TokenColumn:
        return TokenColumn(self.supervised + other.supervised, self.context + other.context)

    def __sub__(self, other: TokenColumn) -> TokenColumn:
        return TokenColumn(self.supervised - other.supervised, self.context - other.context)

    @property
    def all(self) -> int:
        return self.supervised + self.context


EMPTY_COLUMN = TokenColumn()


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """The tokens of a source's examples, or of all sources'.

    Attributes:
        trained_on: Those of the examples to train on, as they are trained on.
        held_out: Those of the examples to validate on.
        cut_off: Those behind the longest length of examples that are kept.
        dropped: Those of examples that are left out for their length.
        first_of_pieces: Of the context, the tokens that begin a later piece of a text that was split, and are not supervised for that:
            nothing stands before them.
    """

    trained_on: TokenColumn = EMPTY_COLUMN
    held_out: TokenColumn = EMPTY_COLUMN
    cut_off: TokenColumn = EMPTY_COLUMN
    dropped: TokenColumn = EMPTY_COLUMN
    first_of_pieces: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        return TokenCounts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(TokenCounts)))

    @property
    def columns(self) -> dict[str, TokenColumn]:
        """By name; each token is in one of them."""
        return {name: getattr(self, name) for name in ("trained_on", "held_out", "cut_off", "dropped")}

    @property
    def all(self) -> int:
        return sum(tokens.all for tokens in self.columns.values())

    @property
    def supervised(self) -> int:
        """Those that were supervised before anything was split, cut or dropped for its length."""
        return sum(tokens.supervised for tokens in self.columns.values()) + self.first_of_pieces

    @property
    def supervised_lost(self) -> int:
        """How many of these were cut off, or dropped with their row."""
        return self.cut_off.supervised + self.dropped.supervised

    def to_json(self) -> dict[str, Any]:
        return {"all": self.all, **asdict(self)}


NO_COUNTS = TokenCounts()
