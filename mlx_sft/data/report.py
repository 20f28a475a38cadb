"""What became of every input row, key and token, and what is to be trained on; what would spoil the run.

The report has a machine form, `data_report.json`, a short form for the terminal, and findings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import add
from typing import Any

from mlx_sft.console import many
from mlx_sft.data.call_forms import FORMS_IN_WORDS
from mlx_sft.data.example import Fate, Note
from mlx_sft.data.findings import FACT_FINDINGS, Finding, first_of, out_of
from mlx_sft.data.key_counts import KeyCount, columns, in_words, summed, unused_keys
from mlx_sft.data.messages import WEIGHT_KEYS
from mlx_sft.data.part_report import PartReport
from mlx_sft.data.row_reader import changed_names
from mlx_sft.data.template import NO_FACTS, Facts
from mlx_sft.data.token_counts import NO_COUNTS, TokenCounts

_MANY_DUPLICATES = 0.05
"""The share of the examples from which on duplicates are worth a warning."""
_MANY_LOST = 0.05
"""The share of the supervised tokens above which what is lost of them is worth a warning."""


@dataclass(repr=False)
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
        fates = ", ".join(f"{number:,} {fate}" for fate, number in self.fates.items())
        return f"{type(self).__name__}({f'{self.name}: ' if self.name else ''}{fates})"

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

    @property
    def fates(self) -> dict[str, int]:
        """How many rows there are, and how many of them are kept, truncated, dropped and bad."""
        return {fate: getattr(self, fate) for fate in ("rows", "kept", "truncated", "dropped", "bad")}

    def _count(self, fate: Fate) -> int:
        return sum(note.fate == fate for note in self.notes)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "sha256": self.sha256,
            "format": self.format,
            **self.fates,
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


class DataReport(SourceReport):
    """Everything that happened to the data of a run; what it says of rows, keys and tokens is of all sources together.

    Args:
        sources: One for each file or dataset that was read.
        train: The examples to train on.
        valid: The examples that are held out; without rows where none are.
        shared: The number of validation examples that equal a training example; 0 where the split was made here.
        settings: The settings that shaped the data.
        first_shared: The origins of the first of these validation examples.
    """

    def __init__(
        self,
        sources: list[SourceReport],
        train: PartReport,
        valid: PartReport,
        shared: int,
        settings: dict[str, Any],
        first_shared: Sequence[str] = (),
    ) -> None:
        super().__init__("", None)
        self.sources, self.train, self.valid = sources, train, valid
        self.shared, self.settings, self.first_shared = shared, settings, list(first_shared)
        for name in ("kept", "examples", "split", "tokens", "facts", "signs", "notes"):
            setattr(self, name, reduce(add, (getattr(source, name) for source in sources), getattr(self, name)))
        self.keys = summed(source.keys for source in sources)

    @property
    def _unit(self) -> str:
        """What is trained on: rows, pairs, or examples where a row gives several."""
        if self.train.pairs or self.valid.pairs:
            return "pair"
        return "example" if any(source.examples > source.kept for source in self.sources) else "row"

    @property
    def fingerprint(self) -> str:
        """Differs wherever an example, its labels, its part or its place differs."""
        return f"{self.train.fingerprint}-{self.valid.fingerprint}"

    def findings(self) -> list[Finding]:
        """What would spoil the run, or might; each that there is."""
        facts = self.facts
        found = [one.found(facts, self.kept, self._first(one.fact), self.settings) for one in FACT_FINDINGS]
        found += [self._too_long(), self._shared(), self._duplicates(), self._unused_keys()]
        return [finding for finding in found if finding.count]

    def warnings(self) -> list[str]:
        """What a person should know before training, a sentence each."""
        renamed = changed_names(self.settings.get("roles") or {})
        return [*renamed, *(finding.text for finding in self.findings() if finding.warns)]

    def _first(self, name: str) -> list[str]:
        return first_of(source.first.get(name, []) for source in self.sources)

    def _too_long(self) -> Finding:
        lost, whole = self.tokens.supervised_lost, self.tokens.supervised
        sentence = (
            f"{out_of(lost, whole, 'supervised token')} ({lost / max(whole, 1):.0%}) are lost, as their rows are longer than "
            f"{self.settings.get('max_length', 0):,} tokens; raise --max-length to train on them"
        )
        return Finding("too-long", lost, whole, sentence, self._first("too_long"), warns=lost > _MANY_LOST * whole)

    def _shared(self) -> Finding:
        also = f"are also training {self._unit}s" if self.shared != 1 else f"is also a training {self._unit}"
        what = f"{many(self.shared, f'validation {self._unit}')} {also}"
        sentence = f"{what}, on which the loss says nothing of new text; take them out of one of the two"
        return Finding("also-in-train", self.shared, self.valid.units, sentence, self.first_shared)

    def _duplicates(self) -> Finding:
        count, rows = self.train.duplicates, self.train.units
        sentence = (
            f"{out_of(count, rows, f'training {self._unit}')} equal an earlier one, and are trained on again each time; "
            "take them out, unless they are to weigh more"
        )
        warns = count > 1 and count >= _MANY_DUPLICATES * rows
        return Finding("duplicate", count, rows, sentence, self.train.first_duplicates, warns=warns)

    def _unused_keys(self) -> Finding:
        unused = unused_keys(self.keys)
        count, whole = (sum(key.count for key in some) for some in (unused, self.keys))
        sentence = f"{out_of(count, whole, 'key')} that nothing reads: {in_words(unused)}"
        return Finding("unused-keys", count, whole, sentence, first_of([key.first] for key in unused), warns=False)

    def summary(self) -> dict[str, str]:
        """The short form for a person; all behind `tokens` only where there are any."""
        lost = "".join(
            f", {count:,} {fate}"
            for fate, count in self.fates.items()
            if count and fate in ("truncated", "dropped", "bad")
        )
        lost += f", {self.split:,} split into pieces" if self.split else ""
        train, lengths = self.train, self.train.lengths
        examples = (
            f"{self.kept:,} kept; {many(train.rows, 'example')}" if self._unit == "example" else f"{train.units:,}"
        )
        formats = Counter[str]()
        for source in self.sources:
            formats[source.format or "unknown"] += source.rows
        summary = {
            "pairs" if self._unit == "pair" else "rows": f"{examples} to train on, {self.valid.units:,} held out{lost}",
            "format": ", ".join(f"{name} ({rows:,})" if len(formats) > 1 else name for name, rows in formats.items()),
            "tokens": f"{train.tokens:,}, {train.supervised_share:.0%} supervised",
        }
        if lengths:
            summary["lengths"] = (
                f"{lengths['p50']:,} (median), {lengths['p95']:,} (95 %), {lengths['max']:,} (longest) tokens"
            )
        if self.signs:
            shown = ", ".join(f"{number:,} {name}" for name, number in self.signs.most_common())
            summary["suspicious"] = f"{shown}; `mlx-sft inspect --only suspicious` shows them"
        if forms := [
            f"{words} ({number:,})" for name, words in FORMS_IN_WORDS.items() if (number := getattr(self.facts, name))
        ]:
            summary["calls"] = f"as the chat template takes them: {', '.join(forms)}"
        if weights := _row_weights(self.keys):
            summary["row weights"] = weights
        if moved := self.facts.systems_moved:
            summary["system prompts"] = f"{moved:,} put into the user's message behind them, by --system fold"
        if unused := unused_keys(self.keys):
            summary["unused keys"] = in_words(unused)
        if differ := self.facts.begun_otherwise:
            summary["beside TRL"] = f"{many(differ, 'pair')} whose answers it would begin with another token"
        if labels := self.facts.desirable + self.facts.undesirable:
            summary["labels"] = f"{out_of(self.facts.desirable, labels, 'answer')} desirable"
        if train.duplicates:
            summary["duplicates"] = f"{train.duplicates:,}"
        return summary

    def to_json(self) -> dict[str, Any]:
        """`data_report.json`."""
        return {
            "totals": self.fates,
            "split": self.split,
            "supervised_tokens_lost": self.tokens.supervised_lost,
            "tokens": self.tokens.to_json(),
            "keys": columns(self.keys),
            "train": self.train.to_json(),
            "valid": self.valid.to_json(),
            "validation_rows_also_in_train": self.shared,
            **asdict(self.facts),
            "signs": dict(self.signs),
            "unused_keys": [key.to_json() for key in unused_keys(self.keys)],
            "findings": [finding.to_json() for finding in self.findings()],
            "warnings": self.warnings(),
            "settings": self.settings,
            "fingerprint": self.fingerprint,
            "sources": [source.to_json() for source in self.sources],
        }


def _row_weights(counts: Iterable[KeyCount]) -> str:
    """How many rows say what they weigh in the loss as a whole, for a person: `weight (1,200 rows)`; empty where none does."""
    said = [count for count in counts if count.of == "row" and count.use == "read" and count.key in WEIGHT_KEYS]
    return ", ".join(f"{count.key} ({many(count.count, 'row')})" for count in said)


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
