"""What became of each key of the rows, in exactly one of five columns; counted row by row, and summed over chunks and files.

read      by the row format, by training, or by the chat template, which names it
unused    by nothing
refused   which makes its row bad
null      it is there and says nothing
bad       a row's own, where the row could not be read; what is inside of it is not looked at
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

Owner = Literal["row", "message", "call", "part", "tool"]
Use = Literal["read", "unused", "refused", "null", "bad"]

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


@dataclass(slots=True)
class KeyCount:
    """A key, in how many places it had this use, and the origin of the first row."""

    of: Owner
    key: str
    use: Use
    count: int
    first: str
    suggestion: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"suggestion": self.suggestion or None}


class KeyCounts:
    """Counts in the order in which keys first appear; rows must come in order."""

    def __init__(self) -> None:
        self._counts: dict[tuple[Owner, str, Use], KeyCount] = {}

    def add(self, counts: Iterable[KeyCount]) -> None:
        """Add counts of later rows."""
        for one in counts:
            name = one.of, one.key, one.use
            if name not in self._counts and len(self._counts) >= MOST_KEYS:
                name, one = (one.of, OTHERS, one.use), replace(one, key=OTHERS, suggestion="")
            if found := self._counts.get(name):
                found.count += one.count
                found.suggestion = found.suggestion or one.suggestion
            else:
                self._counts[name] = replace(one)

    def add_row(self, origin: str, uses: Iterable[KeyUse]) -> None:
        """Add the keys of one row."""
        self.add(KeyCount(of, key, use, 1, origin, suggestion) for of, key, use, suggestion in uses)

    @property
    def counts(self) -> list[KeyCount]:
        return list(self._counts.values())


def summed(parts: Iterable[Iterable[KeyCount]]) -> list[KeyCount]:
    """The counts of several sources, in their order."""
    counts = KeyCounts()
    for part in parts:
        counts.add(part)
    return counts.counts


def columns(counts: Iterable[KeyCount]) -> dict[str, dict[str, int]]:
    """For each owner how many keys there are, `all`, and how many in each column; those of which there are none are left out."""
    table: dict[str, Counter[str]] = {}
    for one in counts:
        table.setdefault(one.of, Counter())[one.use] += one.count
    return {
        owner: {"all": table[owner].total()} | {use: table[owner][use] for use in get_args(Use)}
        for owner in get_args(Owner)
        if owner in table
    }


def unused_keys(counts: Iterable[KeyCount]) -> list[KeyCount]:
    """Those that nothing reads; first those that look misspelt, then the commonest."""
    unused = [count for count in counts if count.use == "unused"]
    return sorted(unused, key=lambda count: (not count.suggestion, -count.count))


def in_words(counts: Sequence[KeyCount]) -> str:
    """`id (1,200, first chats.jsonl:1), of messages: mood (2, first chats.jsonl:7)`; the first ones of many."""
    groups = [[count for count in counts[:_MOST_SHOWN] if count.of == owner] for owner in get_args(Owner)]
    shown = []
    for group in filter(None, groups):
        names = ", ".join(map(_in_words, group))
        shown.append(names if group[0].of == "row" else f"of {group[0].of}s: {names}")
    more = [f"and {len(counts) - _MOST_SHOWN:,} more"] if len(counts) > _MOST_SHOWN else []
    return "; ".join([*shown, *more])


def _in_words(one: KeyCount) -> str:
    guess = f'; did you mean "{one.suggestion}"?' if one.suggestion else ""
    return f"{one.key} ({one.count:,}, first {one.first}{guess})"
