"""What became of the rows of one source: kept, truncated, dropped or bad, each with its reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from mlx_sft.data.example import Fate, Note
from mlx_sft.data.key_counts import KeyCount
from mlx_sft.data.template import NO_FACTS, Facts
from mlx_sft.data.token_counts import NO_COUNTS, TokenCounts


@dataclass
class SourceReport:
    """The rows of one source. `rows == kept + dropped + bad`; a truncated row is kept.

    Args:
        name: The source, as a person would name it.
        sha256: Of its bytes, where it is a file.
        format: The format of its rows; None where they have none in common.
        kept: The number of rows that gave examples.
        examples: The number of these examples; more than the rows where turns or pieces of text are examples of their own.
        split: Rows of text that were too long, and are in several pieces.
        tokens: What became of every token of the rows that could be read.
        facts: What the chat template did to the examples, summed.
        first: The origins of the first rows for each field of `Facts` that is not 0, and of those that were too long, as `too_long`.
        signs: How many of the examples are suspicious in each way.
        notes: One for each row that was truncated, dropped or bad.
        keys: What became of the rows' keys.
    """

    name: str
    sha256: str | None
    format: str | None = None
    kept: int = 0
    examples: int = 0
    split: int = 0
    tokens: TokenCounts = NO_COUNTS
    facts: Facts = NO_FACTS
    first: dict[str, list[str]] = field(default_factory=dict)
    signs: Counter[str] = field(default_factory=Counter)
    notes: list[Note] = field(default_factory=list)
    keys: list[KeyCount] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"SourceReport({self.name}: {in_words(self)})"

    @property
    def truncated(self) -> int:
        return self._count("truncated")

    @property
    def dropped(self) -> int:
        return self._count("dropped")

    @property
    def bad(self) -> int:
        return self._count("bad")

    @property
    def rows(self) -> int:
        return self.kept + self.dropped + self.bad

    def _count(self, fate: Fate) -> int:
        return sum(note.fate == fate for note in self.notes)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sha256": self.sha256,
            "format": self.format,
            **fates(self),
            "examples": self.examples,
            "split": self.split,
            "supervised_tokens": self.tokens.supervised,
            "supervised_tokens_lost": self.tokens.supervised_lost,
            "tokens": self.tokens.to_json(),
            **asdict(self.facts),
            "signs": dict(self.signs),
            "keys": [key.to_json() for key in self.keys],
            "reasons": reasons(self.notes),
            "not_simply_kept": [asdict(note) for note in self.notes],
        }


class Fates(Protocol):
    """The rows of a source, or of all of them."""

    @property
    def rows(self) -> int: ...
    @property
    def kept(self) -> int: ...
    @property
    def truncated(self) -> int: ...
    @property
    def dropped(self) -> int: ...
    @property
    def bad(self) -> int: ...


def fates(report: Fates) -> dict[str, int]:
    """How many rows there are, and how many of them are kept, truncated, dropped and bad."""
    return {fate: getattr(report, fate) for fate in ("rows", "kept", "truncated", "dropped", "bad")}


def in_words(report: Fates) -> str:
    """`5 rows, 4 kept, ...`."""
    return ", ".join(f"{number:,} {fate}" for fate, number in fates(report).items())


def reasons(notes: Iterable[Note]) -> list[dict[str, Any]]:
    """Notes that differ only in numbers and quoted words, counted: `fate`, `reason`, `count` and the `first` origin."""
    groups: dict[tuple[str, ...], list[Note]] = {}
    for note in notes:
        groups.setdefault((note.fate, *_PARTICULAR.split(note.reason)[::2]), []).append(note)
    return [
        {"fate": group[0].fate, "reason": _in_common(group), "count": len(group), "first": group[0].origin}
        for group in sorted(groups.values(), key=len, reverse=True)
    ]


_PARTICULAR = re.compile(r"""('[^']*'|"[^"]*"|\b\d[\d,.]*\b)""")


def _in_common(notes: list[Note]) -> str:
    """`616 tokens, cut to 512` and `700 tokens, cut to 512` → `… tokens, cut to 512`."""
    parts = zip(*(_PARTICULAR.split(note.reason) for note in notes), strict=True)
    return "".join(part[0] if len(set(part)) == 1 else "…" for part in parts)
