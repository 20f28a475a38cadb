"""How often each key of the rows was read, was refused, or was read by nothing; counted row by row, and summed over chunks and files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

Owner = Literal["row", "message", "call"]
Use = Literal["read", "refused", "unused"]

MOST_KEYS = 1_000
"""Distinct keys that are counted by name; data with a new key in every row must not fill the memory."""
OTHERS = "…"
"""The name under which the others are counted."""
_MOST_SHOWN = 20
"""Of the keys that nothing reads, to a person."""


class KeyUse(NamedTuple):
    """One key in one place: whose it is, and what became of it.

    `suggestion` is the key that was probably meant; empty where none looks like it.
    """

    of: Owner
    key: str
    use: Use
    suggestion: str = ""


@dataclass(frozen=True, slots=True)
class KeyCount:
    """A key, in how many places it had this use, and the origin of the first row."""

    of: Owner
    key: str
    use: Use
    count: int
    first: str
    suggestion: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "of": self.of,
            "key": self.key,
            "use": self.use,
            "count": self.count,
            "first": self.first,
            "suggestion": self.suggestion or None,
        }


class KeyCounts:
    """Counts in the order in which keys first appear; rows must come in order."""

    def __init__(self) -> None:
        self._counts: dict[tuple[Owner, str, Use], KeyCount] = {}

    def add(self, counts: Iterable[KeyCount]) -> None:
        """Add counts of later rows."""
        for count in counts:
            name = (count.of, count.key, count.use)
            if name not in self._counts and len(self._counts) >= MOST_KEYS:
                count = replace(count, key=OTHERS, suggestion="")
                name = (count.of, OTHERS, count.use)
            if before := self._counts.get(name):
                count = replace(
                    before,
                    count=before.count + count.count,
                    suggestion=before.suggestion or count.suggestion,
                )
            self._counts[name] = count

    def add_row(self, origin: str, uses: Iterable[KeyUse]) -> None:
        """Add the keys of one row."""
        self.add(KeyCount(use.of, use.key, use.use, 1, origin, use.suggestion) for use in uses)

    @property
    def counts(self) -> list[KeyCount]:
        return list(self._counts.values())


def summed(parts: Iterable[Iterable[KeyCount]]) -> list[KeyCount]:
    """The counts of several sources, in their order."""
    counts = KeyCounts()
    for part in parts:
        counts.add(part)
    return counts.counts


def unused_keys(counts: Iterable[KeyCount]) -> list[KeyCount]:
    """Those that nothing reads; first those that look misspelt, then the commonest."""
    unused = [count for count in counts if count.use == "unused"]
    return sorted(unused, key=lambda count: (not count.suggestion, -count.count))


def in_words(counts: Sequence[KeyCount]) -> str:
    """`id (1,200, first chats.jsonl:1), of messages: mood (2, first chats.jsonl:7)`; the first ones of many."""
    groups = [[count for count in counts[:_MOST_SHOWN] if count.of == owner] for owner in ("row", "message", "call")]
    shown = []
    for group in filter(None, groups):
        names = ", ".join(map(_in_words, group))
        shown.append(names if group[0].of == "row" else f"of {group[0].of}s: {names}")
    more = [f"and {len(counts) - _MOST_SHOWN:,} more"] if len(counts) > _MOST_SHOWN else []
    return "; ".join([*shown, *more])


def _in_words(one: KeyCount) -> str:
    guess = f'; did you mean "{one.suggestion}"?' if one.suggestion else ""
    return f"{one.key} ({one.count:,}, first {one.first}{guess})"
