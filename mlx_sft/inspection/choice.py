"""Which rows are shown: the first, one that is asked for, those of a kind, or for a page the notable ones and a sample.

Knows columns and notes; reads no row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.report import Note, SourceReport
from mlx_sft.data.screening import SIGNS
from mlx_sft.data.store import Examples
from mlx_sft.errors import USAGE, UserError
from mlx_sft.inspection.rows import Part
from mlx_sft.inspection.table import first_of_equals

LOST_OR_CUT = ("truncated", "dropped", "bad")
ONLY: tuple[str, ...] = ("kept", *LOST_OR_CUT, "suspicious", *SIGNS, "duplicate", "left-out")
"""The kinds of rows that can be asked for."""

_ROW_NAME = re.compile(r"(?:(.*)[:\[])?([0-9]+)\]?(?:#[0-9]+)?", re.DOTALL)
"""A source, which may hold brackets itself, the number of a row, and that of one of its examples, such as `#2`."""


@dataclass(frozen=True)
class Group:
    """Sources whose rows are numbered together, and what became of their rows: to train on, to validate on, or notes."""

    sources: list[SourceReport]
    parts: dict[Part, Examples]
    notes: dict[str, Note] = field(default_factory=dict)

    @classmethod
    def of(cls, sources: list[SourceReport], parts: dict[Part, Examples]) -> Group:
        return cls(sources, parts, {note.origin: note for source in sources for note in source.notes})

    @cached_property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)

    @cached_property
    def first_equals(self) -> dict[Part, NDArray[np.int64]]:
        """Of each example of a part, the index of the first that equals it."""
        return {part: first_of_equals(examples) for part, examples in self.parts.items()}

    def duplicate_of(self, part: Part, index: int) -> str | None:
        """The origin of an earlier row that an example equals."""
        first = int(self.first_equals[part][index])
        return None if first == index else self.parts[part].row_origin(first)

    def examples_of(self, number: int) -> tuple[Part, list[int]]:
        """The part that a row is used for, and the indices of its examples there."""
        for part, examples in self.parts.items():
            first, end = np.searchsorted(examples.rows, [number, number + 1]).tolist()
            if end > first:
                return part, list(range(first, end))
        return "", []


@dataclass
class Wanted:
    """Rows of a group, by their number or by their origin."""

    numbers: set[int] = field(default_factory=set)
    origins: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.numbers) + len(self.origins)


def first_rows(groups: list[Group], limit: int) -> list[Wanted]:
    """The first rows, whatever became of them."""
    wanted = []
    for group in groups:
        numbers = set(range(min(limit, group.rows)))
        limit -= len(numbers)
        wanted.append(Wanted(numbers))
    return wanted


def row_named(groups: list[Group], name: str) -> list[Wanted]:
    """The row `17` (the line of a .jsonl, the index of a .json), or `chats.jsonl:17` where there are several sources.

    `chats.jsonl:17#2`, the name of one of its examples, names the row too.

    Raises:
        UserError: where the name is none of a row.
    """
    parts = _ROW_NAME.fullmatch(name)
    if parts is None:
        hint = "give the number of a line, as --row 17, or a row's origin, as --row chats.jsonl:17"
        raise UserError(f"not the name of a row: {name}", hint=hint, exit_code=USAGE)
    source, number = parts[1], parts[2].lstrip("0") or "0"
    wanted = []
    for group in groups:
        names = [report.name for report in group.sources if not source or _is_called(report.name, source)]
        wanted.append(
            Wanted(origins={origin for called in names for origin in (f"{called}:{number}", f"{called}[{number}]")})
        )
    if not any(wanted):
        known = ", ".join(report.name for group in groups for report in group.sources)
        raise UserError(f"no data is called {source}", hint=f"there is {known}", exit_code=USAGE)
    return wanted


def _is_called(name: str, asked: str) -> bool:
    return name == asked or name.endswith(f"/{asked}")


def rows_of_kind(groups: list[Group], only: str, limit: int) -> list[Wanted]:
    """The first rows of a kind.

    Raises:
        UserError: where there is no such kind.
    """
    if only not in ONLY:
        raise UserError(f"no kind of rows is called {only}", hint=f"known are {', '.join(ONLY)}", exit_code=USAGE)
    wanted = []
    for group in groups:
        if only in LOST_OR_CUT:
            origins = (note.origin for note in group.notes.values() if note.fate == only)
            one = Wanted(origins=set(islice(origins, limit)))
        else:
            numbers = sorted(number for part in group.parts for number in _first_of(group, part, only, limit))
            one = Wanted(set(numbers[:limit]))
        limit -= len(one)
        wanted.append(one)
    return wanted


def _first_of(group: Group, part: Part, only: str, limit: int) -> list[int]:
    """The numbers of the first rows of a part that are of a kind."""
    rows = group.parts[part].rows
    numbers: dict[int, None] = {}  # the turns of a row share its number
    for index in _indices(group, part, only):
        numbers[int(rows[index])] = None
        if len(numbers) >= limit:
            break
    return list(numbers)


def _indices(group: Group, part: Part, only: str) -> Iterable[int]:
    """The indices of the examples of a kind, in order."""
    examples = group.parts[part]
    if only == "kept":
        return (index for index in range(len(examples)) if examples.row_origin(index) not in group.notes)
    if only == "left-out":
        return (index for index in range(len(examples)) if examples[index].facts.turns_with_text_left_out)
    if only == "duplicate":
        found = group.first_equals[part] != np.arange(len(examples))
    elif only == "suspicious":
        found = examples.signs != 0
    else:
        found = (examples.signs >> SIGNS.index(only) & 1).astype(bool)
    indices: list[int] = np.flatnonzero(found).tolist()
    return indices


def notable_rows(groups: list[Group], limit: int) -> list[Wanted]:
    """For a page: rows that lost something, suspicious, equal and the longest ones first, and an even sample of the others.

    No kind takes more than a fifth of the page while others want it.
    """
    wanted = [Wanted() for _ in groups]
    if sum(group.rows for group in groups) <= limit:
        return first_rows(groups, limit)
    a_kind = max(1, limit // 5)
    for only in ("bad", "dropped", "truncated", "suspicious", "duplicate"):
        for one, more in zip(wanted, rows_of_kind(groups, only, min(a_kind, limit - _sum(wanted))), strict=True):
            one.numbers |= more.numbers
            one.origins |= more.origins
    for which, number in _longest(groups, min(a_kind // 4, limit - _sum(wanted))):
        wanted[which].numbers.add(number)
    used = [sum(len(examples) for examples in group.parts.values()) for group in groups]
    left = limit - _sum(wanted)
    for one, group, examples in zip(wanted, groups, used, strict=True):
        one.numbers |= set(_sample(group, left * examples // max(1, sum(used))))
    return wanted


def _sum(wanted: list[Wanted]) -> int:
    return sum(map(len, wanted))


def _longest(groups: list[Group], limit: int) -> Iterator[tuple[int, int]]:
    found = [
        (int(examples.lengths[index]), which, int(examples.rows[index]))
        for which, group in enumerate(groups)
        for examples in group.parts.values()
        for index in np.argsort(-examples.lengths.astype(np.int64), kind="stable")[:limit].tolist()
    ]
    for _, which, number in sorted(found, reverse=True)[:limit]:
        yield which, number


def _sample(group: Group, size: int) -> list[int]:
    """Evenly spaced among the rows of which something is learnt."""
    rows = np.unique(np.concatenate([examples.rows for examples in group.parts.values()]))
    if size <= 0 or not len(rows):
        return []
    return rows[np.linspace(0, len(rows) - 1, min(size, len(rows))).astype(np.int64)].tolist()  # type: ignore[no-any-return]
