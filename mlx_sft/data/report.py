"""What became of every input row, key and token, and what is to be trained on; what would spoil the run.

The report has a machine form, `data_report.json`, a short form for the terminal, and findings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import add
from typing import Any

from mlx_sft.data.call_forms import FORMS_IN_WORDS
from mlx_sft.data.findings import FACT_FINDINGS, Finding, first_of, many, out_of
from mlx_sft.data.key_counts import KeyCount, columns, summed, unused_keys
from mlx_sft.data.key_counts import in_words as keys_in_words
from mlx_sft.data.messages import WEIGHT_KEYS
from mlx_sft.data.part_report import PartReport
from mlx_sft.data.roles import changed_names
from mlx_sft.data.source_report import SourceReport, fates, in_words
from mlx_sft.data.template import NO_FACTS, Facts
from mlx_sft.data.token_counts import NO_COUNTS, TokenCounts

__all__ = ["DataReport", "PartReport", "SourceReport"]

_MANY_DUPLICATES = 0.05
"""The share of the examples from which on duplicates are worth a warning."""
_MANY_LOST = 0.05
"""The share of the supervised tokens above which what is lost of them is worth a warning."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """Everything that happened to the data of a run.

    Args:
        sources: One for each file or dataset that was read.
        train: The examples to train on.
        valid: The examples that are held out; without rows where none are.
        shared: The number of validation examples that equal a training example; 0 where the split was made here.
        settings: The settings that shaped the data.
        first_shared: The origins of the first of these validation examples.
    """

    sources: list[SourceReport]
    train: PartReport
    valid: PartReport
    shared: int
    settings: dict[str, Any]
    first_shared: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"DataReport({in_words(self)})"

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
    def tokens(self) -> TokenCounts:
        """What became of every token of the rows that could be read."""
        return reduce(add, (source.tokens for source in self.sources), NO_COUNTS)

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
        return Finding("also-in-train", self.shared, self.valid.rows, sentence, self.first_shared)

    def _duplicates(self) -> Finding:
        count, rows = self.train.duplicates, self.train.rows
        sentence = (
            f"{out_of(count, rows, f'training {self._unit}')} equal an earlier one, and are trained on again each time; "
            "take them out, unless they are to weigh more"
        )
        warns = count > 1 and count >= _MANY_DUPLICATES * rows
        return Finding("duplicate", count, rows, sentence, self.train.first_duplicates, warns=warns)

    def _unused_keys(self) -> Finding:
        keys = self.keys
        unused = unused_keys(keys)
        count, whole = (sum(key.count for key in some) for some in (unused, keys))
        sentence = f"{out_of(count, whole, 'key')} that nothing reads: {keys_in_words(unused)}"
        return Finding("unused-keys", count, whole, sentence, first_of([key.first] for key in unused), warns=False)

    def summary(self) -> dict[str, str]:
        """The short form for a person; all behind `tokens` only where there are any."""
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
        if weights := _row_weights(self.keys):
            summary["row weights"] = weights
        if moved := self.facts.systems_moved:
            summary["system prompts"] = f"{moved:,} put into the user's message behind them, by --system fold"
        if unused := unused_keys(self.keys):
            summary["unused keys"] = keys_in_words(unused)
        if train.duplicates:
            summary["duplicates"] = f"{train.duplicates:,}"
        return summary

    def to_json(self) -> dict[str, Any]:
        """`data_report.json`."""
        return {
            "totals": fates(self),
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
