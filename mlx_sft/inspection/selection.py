"""Which rows are shown: the first, one by its name, those of one kind, or for a page the notable ones and a sample.

Rows are chosen by what the survey of the data found; the files are not read again here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Note
from mlx_sft.data.findings import FACT_FINDINGS
from mlx_sft.data.pairs import content_ids, first_equals
from mlx_sft.data.prepare import PreparedData
from mlx_sft.data.report import SourceReport
from mlx_sft.data.screening import SIGNS
from mlx_sft.data.sources import Source
from mlx_sft.errors import USAGE, UserError

Part = Literal["train", "valid", ""]
"""What a row is used for; "" for one that is lost."""

Selection = set[int | tuple[int, str]]
"""Rows, each by its number, or by the index of its source and its origin."""

LOST_OR_CUT = ("truncated", "dropped", "bad")
FACT_OF = {one.name: one.fact for one in FACT_FINDINGS}
FINDINGS = (*FACT_OF, "also-in-train")
"""Findings that are of some examples and not of others."""
ONLY: tuple[str, ...] = ("kept", *LOST_OR_CUT, "suspicious", *SIGNS, "duplicate", *FINDINGS)
"""The kinds of rows that can be asked for."""

_ROW_NAME = re.compile(r"(?:(.*)[:\[])?([0-9]+)\]?(?:#[0-9]+)*", re.DOTALL)
"""A source, which may hold brackets itself, the number of a row, and that of one of its examples, such as `#2` or `#2#1`."""


@dataclass(frozen=True)
class SurveyedRows:
    """All rows of the data, numbered from 0 through all sources, and what became of them.

    Attributes:
        sources: What became of those to train on, then of those to validate on.
        located: Where the rows of each are.
        parts: The examples that are used.
        offsets: What to add to an example's row number in each part, which counts from the part's own first source.
        compared: Whether the examples of a row are compared.
    """

    sources: list[SourceReport]
    located: list[Source]
    parts: dict[Part, Examples]
    offsets: dict[Part, int]
    compared: bool = False

    @classmethod
    def of(cls, prepared: PreparedData, train_sources: int) -> SurveyedRows:
        """Rows of a survey whose first sources are to train on; without others, validation rows are held out of these."""
        sources = prepared.report.sources
        trained = sum(source.rows for source in sources[:train_sources])
        offset = trained if len(sources) > train_sources else 0
        parts: dict[Part, Examples] = {"train": prepared.train, "valid": prepared.valid}
        compared = bool(prepared.report.train.pairs or prepared.report.valid.pairs)
        return cls(sources, prepared.sources, parts, {"train": 0, "valid": offset}, compared)

    @property
    def count(self) -> int:
        return sum(source.rows for source in self.sources)

    @cached_property
    def notes(self) -> dict[str, Note]:
        """The notes of rows that were not simply kept, by origin."""
        return {note.origin: note for source in self.sources for note in source.notes}

    @cached_property
    def first_equals(self) -> dict[Part, NDArray[np.int64]]:
        """For each example of a part, the index of the first that equals it."""
        return {part: first_equals(examples, compared=self.compared) for part, examples in self.parts.items()}

    def numbers(self, part: Part) -> NDArray[np.int64]:
        """The row number of each example of a part, in order."""
        return self.parts[part].rows.astype(np.int64) + self.offsets[part]

    def duplicate_of(self, part: Part, index: int) -> str | None:
        """The origin of an earlier row that an example equals."""
        first = int(self.first_equals[part][index])
        return None if first == index else self.parts[part].row_origin(first)

    def found(self, part: Part, name: str) -> NDArray[np.int32]:
        """How often a finding is in each example of a part; `also-in-train` are those to validate on that equal one to train on."""
        return self._shared[part] if name == "also-in-train" else self.parts[part].fact(FACT_OF[name])

    @cached_property
    def _shared(self) -> dict[Part, NDArray[np.int32]]:
        train, valid = (content_ids(self.parts[part], compared=self.compared) for part in ("train", "valid"))
        return {"train": np.zeros(len(train), np.int32), "valid": np.isin(valid, train).astype(np.int32)}

    def examples_of(self, number: int) -> tuple[Part, list[int]]:
        """The part that a row is used for, and the indices of its examples there."""
        for part, examples in self.parts.items():
            in_part = number - self.offsets[part]
            first, end = np.searchsorted(examples.rows, [in_part, in_part + 1]).tolist()
            if end > first:
                return part, list(range(first, end))
        return "", []


def first_rows(rows: SurveyedRows, limit: int) -> Selection:
    """The first rows, whatever became of them."""
    return set(range(min(limit, rows.count)))


def row_named(rows: SurveyedRows, name: str) -> Selection:
    """The row `17` (the line of a .jsonl, the index of a .json), or `chats.jsonl:17` where there are several sources.

    `chats.jsonl:17#2`, the name of one of its examples, names the row too.

    Raises:
        UserError: If this is not the name of a row, or no source is called so.
    """
    parts = _ROW_NAME.fullmatch(name)
    if parts is None:
        hint = "give the number of a line, as --row 17, or a row's origin, as --row chats.jsonl:17"
        raise UserError(f"not the name of a row: {name}", hint=hint, exit_code=USAGE)
    asked, number = parts[1], parts[2].lstrip("0") or "0"
    selection: Selection = set()
    # What the origins of a source's rows begin with.
    named = [(index, str(file)) for index, one in enumerate(rows.located) for file in one.files or (one.name,)]
    for index, file in named:
        if not asked or file == asked or file.endswith(f"/{asked}"):
            selection |= {(index, f"{file}:{number}"), (index, f"{file}[{number}]")}
    if not selection:
        known = ", ".join(file for _, file in named)
        raise UserError(f"no data is called {asked}", hint=f"there is {known}", exit_code=USAGE)
    return selection


def rows_of_kind(rows: SurveyedRows, kind: str, limit: int) -> Selection:
    """The first rows of a kind.

    Raises:
        UserError: If there is no such kind.
    """
    if kind not in ONLY:
        raise UserError(f"no kind of rows is called {kind}", hint=f"known are {', '.join(ONLY)}", exit_code=USAGE)
    if kind in LOST_OR_CUT:
        noted = (
            (index, note.origin)
            for index, source in enumerate(rows.sources)
            for note in source.notes
            if note.fate == kind
        )
        return set(islice(noted, limit))
    found: list[int] = []
    for part in rows.parts:
        numbers = rows.numbers(part)
        rows_found = groupby(int(numbers[index]) for index in _examples_of_kind(rows, part, kind))
        found += (number for number, _ in islice(rows_found, limit))  # the examples of a row follow each other
    return set(sorted(found)[:limit])


def _examples_of_kind(rows: SurveyedRows, part: Part, kind: str) -> Iterable[int]:
    """The indices of the examples of a kind, in order."""
    examples = rows.parts[part]
    if kind == "kept":
        return (index for index in range(len(examples)) if examples.row_origin(index) not in rows.notes)
    if kind in FINDINGS:
        found = rows.found(part, kind) > 0
    elif kind == "duplicate":
        found = rows.first_equals[part] != np.arange(len(examples))
    elif kind == "suspicious":
        found = examples.signs != 0
    else:
        found = (examples.signs >> SIGNS.index(kind) & 1).astype(bool)
    indices: list[int] = np.flatnonzero(found).tolist()
    return indices


def notable_rows(rows: SurveyedRows, limit: int) -> Selection:
    """For a page: rows that lost something, suspicious, equal and the longest ones, then an even sample of the others.

    No kind takes more than a fifth of the page.
    """
    if rows.count <= limit:
        return first_rows(rows, limit)
    selection: Selection = set()
    a_kind = max(1, limit // 5)
    for kind in ("bad", "dropped", "truncated", "suspicious", "duplicate"):
        selection |= rows_of_kind(rows, kind, min(a_kind, limit - len(selection)))
    selection.update(_longest(rows, min(a_kind // 4, limit - len(selection))))
    selection.update(_sample(rows, limit - len(selection)))
    return selection


def _longest(rows: SurveyedRows, limit: int) -> Iterator[int]:
    lengths = np.concatenate([examples.lengths for examples in rows.parts.values()]).astype(np.int64)
    numbers = np.concatenate([rows.numbers(part) for part in rows.parts])
    yield from numbers[np.argsort(-lengths, kind="stable")[:limit]].tolist()


def _sample(rows: SurveyedRows, size: int) -> list[int]:
    """Evenly spaced among the rows that are used."""
    used = np.unique(np.concatenate([rows.numbers(part) for part in rows.parts]))
    if size <= 0 or not len(used):
        return []
    return used[np.linspace(0, len(used) - 1, min(size, len(used))).astype(np.int64)].tolist()  # type: ignore[no-any-return]
