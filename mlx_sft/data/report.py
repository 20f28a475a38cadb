"""What became of every input row (kept, truncated, dropped or bad, and why), and what is to be trained on.

The report has a machine form, `data_report.json`, a short form for the terminal, and warnings.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import add
from typing import Any

import numpy as np

from mlx_sft.data.call_forms import FORMS_IN_WORDS
from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Fate, Note
from mlx_sft.data.key_counts import KeyCount, in_words, summed, unused_keys
from mlx_sft.data.lengths import histogram, length_summary
from mlx_sft.data.screening import SIGNS
from mlx_sft.data.template import NO_FACTS, Facts

ORIGINS_NAMED = 10
"""How many of the longest rows, and how many rows of each sign, are named."""
_MANY_DUPLICATES = 0.05
"""The share of the examples from which on duplicates are worth a warning."""
_MANY_LOST = 0.05
"""The share of the supervised tokens above which what is lost of them is worth a warning."""


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
        supervised_tokens: Those of all rows that could be read, before anything was cut or dropped for its length.
        supervised_tokens_lost: How many of them were cut off, or dropped with their row, for being too long.
        facts: What the chat template did to the examples, summed.
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
    supervised_tokens: int = 0
    supervised_tokens_lost: int = 0
    facts: Facts = NO_FACTS
    signs: Counter[str] = field(default_factory=Counter)
    notes: list[Note] = field(default_factory=list)
    keys: list[KeyCount] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"SourceReport({self.name}: {_in_words(self)})"

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
            "supervised_tokens": self.supervised_tokens,
            "supervised_tokens_lost": self.supervised_tokens_lost,
            **asdict(self.facts),
            "signs": dict(self.signs),
            "keys": [key.to_json() for key in self.keys],
            "reasons": reasons(self.notes),
            "not_simply_kept": [asdict(note) for note in self.notes],
        }


@dataclass(frozen=True, slots=True)
class PartReport:
    """The examples of one part of the data, `train` or `valid`.

    Args:
        rows: The number of examples.
        tokens: The number of their tokens.
        supervised_tokens: The number of those that are supervised.
        duplicates: The number of examples that equal an earlier one of this part.
        lengths: Tokens an example: `min`, `mean`, `p10` to `p99`, `max`; empty without examples.
        fingerprint: SHA-256 over the examples' tokens and weights, in order.
        histogram: Examples by their length, shortest first: `from` and `to` in tokens, both included, and `count`.
        longest: The longest examples, longest first: `origin` and `tokens`.
        signs: What is suspicious: `count` of examples and the first of their `origins`, by the sign's name.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    duplicates: int
    lengths: dict[str, float]
    fingerprint: str
    histogram: list[dict[str, int]] = field(default_factory=list)
    longest: list[dict[str, Any]] = field(default_factory=list)
    signs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, examples: Examples) -> PartReport:
        """The report of these examples, from their columns."""
        lengths = examples.lengths
        contents = examples.content_ids()
        longest = np.argsort(-lengths.astype(np.int64), kind="stable")[:ORIGINS_NAMED].tolist()
        return cls(
            rows=len(examples),
            tokens=int(lengths.sum(dtype=np.int64)),
            supervised_tokens=int(examples.supervised_tokens.sum(dtype=np.int64)),
            duplicates=len(contents) - len(np.unique(contents)),
            lengths=length_summary(lengths),
            fingerprint=examples.fingerprint(),
            histogram=histogram(lengths),
            longest=[{"origin": examples[index].origin, "tokens": int(lengths[index])} for index in longest],
            signs=_signs(examples),
        )

    @property
    def supervised_share(self) -> float:
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"supervised_share": round(self.supervised_share, 4)}


def _signs(examples: Examples) -> dict[str, dict[str, Any]]:
    signs = {}
    for bit, name in enumerate(SIGNS):
        found = np.flatnonzero(examples.signs >> bit & 1)
        if len(found):
            origins = dict.fromkeys(examples.row_origin(index) for index in found[: 4 * ORIGINS_NAMED].tolist())
            signs[name] = {"count": len(found), "origins": list(origins)[:ORIGINS_NAMED]}
    return signs


@dataclass(frozen=True, slots=True)
class DataReport:
    """Everything that happened to the data of a run.

    Args:
        sources: One for each file or dataset that was read.
        train: The examples to train on.
        valid: The examples that are held out; without rows where none are.
        shared: The number of validation examples that equal a training example; 0 where the split was made here.
        settings: The settings that shaped the data.
    """

    sources: list[SourceReport]
    train: PartReport
    valid: PartReport
    shared: int
    settings: dict[str, Any]

    def __repr__(self) -> str:
        return f"DataReport({_in_words(self)})"

    @property
    def rows(self) -> int:
        return sum(source.rows for source in self.sources)

    @property
    def kept(self) -> int:
        return sum(source.kept for source in self.sources)

    @property
    def truncated(self) -> int:
        return sum(source.truncated for source in self.sources)

    @property
    def dropped(self) -> int:
        return sum(source.dropped for source in self.sources)

    @property
    def bad(self) -> int:
        return sum(source.bad for source in self.sources)

    @property
    def split(self) -> int:
        """Rows of text that are in several pieces."""
        return sum(source.split for source in self.sources)

    @property
    def supervised_tokens(self) -> int:
        """Those of all rows that could be read, whatever their length."""
        return sum(source.supervised_tokens for source in self.sources)

    @property
    def supervised_tokens_lost(self) -> int:
        """How many of them were lost to the longest length."""
        return sum(source.supervised_tokens_lost for source in self.sources)

    @property
    def facts(self) -> Facts:
        """What the chat template did to all examples together."""
        return reduce(add, (source.facts for source in self.sources), NO_FACTS)

    @property
    def signs(self) -> Counter[str]:
        """How many examples are suspicious in each way; one may be in several."""
        return reduce(add, (source.signs for source in self.sources), Counter())

    @property
    def keys(self) -> list[KeyCount]:
        """What became of the keys of all rows."""
        return summed(source.keys for source in self.sources)

    @property
    def _unit(self) -> str:
        """What is trained on: rows, or examples where a row gives several."""
        return "example" if any(source.examples > source.kept for source in self.sources) else "row"

    @property
    def fingerprint(self) -> str:
        """Differs wherever an example, its labels, its part or its place differs."""
        return f"{self.train.fingerprint}-{self.valid.fingerprint}"

    def warnings(self) -> list[str]:
        """What a person should know before training, a sentence each."""
        return [*self._template_warnings(), *self._lost_warnings(), *self._row_warnings()]

    def _template_warnings(self) -> list[str]:
        facts, warnings = self.facts, []
        if facts.turns_without_end:
            way_out = "" if self.settings.get("append_eos") else "; --append-eos puts one after each conversation"
            warnings.append(
                f"{_of(facts.turns_without_end, facts.turns, 'assistant turn')} without a supervised end token: "
                f"the model is not taught to stop there{way_out}"
            )
        if facts.turns_with_text_left_out:
            warnings.append(
                f"the chat template leaves out words (reasoning, tool calls) of "
                f"{many(facts.turns_with_text_left_out, 'assistant turn')}; they cannot be trained on"
            )
        if facts.systems_left_out:
            warnings.append(
                f"the chat template leaves out {many(facts.systems_left_out, 'system message')}; "
                "the model is trained to answer without them"
            )
        if facts.messages_left_out:
            messages = f"{many(facts.messages_left_out, 'message')} of users or tools"
            warnings.append(f"the chat template leaves out {messages}; the model is trained to answer without them")
        if facts.tools_left_out:
            tools_of = f"the tools of {many(facts.tools_left_out, 'conversation')}"
            warnings.append(f"the chat template leaves out {tools_of}; --chat-template takes one that writes them")
        if facts.systems_folded:
            warnings.append(
                f"the chat template has no system role: it writes {many(facts.systems_folded, 'system message')} "
                "inside another message's turn"
            )
        if facts.consecutive_turns:
            warnings.append(
                f"{_of(facts.consecutive_turns, facts.turns, 'assistant turn')} directly behind another: the model is taught to end "
                "its turn between them; --consecutive-turns join makes them one"
            )
        return warnings

    def _lost_warnings(self) -> list[str]:
        lost, whole = self.supervised_tokens_lost, self.supervised_tokens
        if lost <= _MANY_LOST * whole:
            return []
        return [
            f"{_of(lost, whole, 'supervised token')} ({lost / whole:.0%}) are lost, as their rows are longer than "
            f"{self.settings['max_length']:,} tokens; raise --max-length to train on them"
        ]

    def _row_warnings(self) -> list[str]:
        warnings = []
        if self.shared:
            also = f"are also training {self._unit}s" if self.shared > 1 else f"is also a training {self._unit}"
            warnings.append(f"{many(self.shared, f'validation {self._unit}')} {also}")
        duplicates, rows = self.train.duplicates, self.train.rows
        if duplicates >= _MANY_DUPLICATES * max(rows, 1) and duplicates > 1:
            warnings.append(
                f"{_of(duplicates, rows, f'training {self._unit}')} equal an earlier one, and are trained on again each time"
            )
        return warnings

    def summary(self) -> dict[str, str]:
        """The short form for a person; `lengths`, `suspicious`, `unused keys` and `duplicates` only where there are any."""
        lost = "".join(
            f", {count:,} {fate}"
            for fate, count in fates(self).items()
            if count and fate in ("truncated", "dropped", "bad")
        )
        lost += f", {self.split:,} split into pieces" if self.split else ""
        train, lengths = self.train, self.train.lengths
        examples = f"{train.rows:,}" if self._unit == "row" else f"{self.kept:,} kept; {many(train.rows, 'example')}"
        formats = Counter[str]()
        for source in self.sources:
            formats[source.format or "unknown"] += source.rows
        summary = {
            "rows": f"{examples} to train on, {self.valid.rows:,} held out{lost}",
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
        if unused := unused_keys(self.keys):
            summary["unused keys"] = in_words(unused)
        if train.duplicates:
            summary["duplicates"] = f"{train.duplicates:,}"
        return summary

    def to_json(self) -> dict[str, Any]:
        """`data_report.json`."""
        return {
            "totals": fates(self),
            "split": self.split,
            "supervised_tokens_lost": self.supervised_tokens_lost,
            "train": self.train.to_json(),
            "valid": self.valid.to_json(),
            "validation_rows_also_in_train": self.shared,
            **asdict(self.facts),
            "signs": dict(self.signs),
            "unused_keys": [key.to_json() for key in unused_keys(self.keys)],
            "warnings": self.warnings(),
            "settings": self.settings,
            "fingerprint": self.fingerprint,
            "sources": [source.to_json() for source in self.sources],
        }


def fates(report: SourceReport | DataReport) -> dict[str, int]:
    """How many rows there are, and how many of them are kept, truncated, dropped and bad."""
    return {fate: getattr(report, fate) for fate in ("rows", "kept", "truncated", "dropped", "bad")}


def _in_words(report: SourceReport | DataReport) -> str:
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


def many(number: int, thing: str) -> str:
    """`1 row`, `1,234 rows`."""
    return f"{number:,} {thing}{'s' if number != 1 else ''}"


def _of(number: int, whole: int, thing: str) -> str:
    return f"{number:,} of {many(whole, thing)}"
