"""What was read, kept, truncated, dropped or bad, and why: every input row is accounted for.

Knows examples only by their lengths; decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from mlx_sft.data.encode import Example

Fate = Literal["truncated", "dropped", "bad"]

PERCENTILES = (10, 50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Note:
    """A row that was not simply kept: where it is, what became of it, and why."""

    origin: str
    fate: Fate
    reason: str


@dataclass
class SourceReport:
    """The rows of one source. `rows == kept + dropped + bad`; a truncated row is kept.

    `turns_with_text_left_out` counts, in kept rows, the learnt assistant turns of which the chat template leaves out words.
    """

    name: str
    sha256: str | None
    kept: int = 0
    turns_with_text_left_out: int = 0
    notes: list[Note] = field(default_factory=list)

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
            "rows": self.rows,
            "kept": self.kept,
            "truncated": self.truncated,
            "dropped": self.dropped,
            "bad": self.bad,
            "turns_with_text_left_out": self.turns_with_text_left_out,
            "not_simply_kept": [asdict(note) for note in self.notes],
        }


@dataclass(frozen=True, slots=True)
class PartReport:
    """The examples of one part of the data, `train` or `valid`.

    Args:
        rows: Examples.
        tokens: Their tokens.
        supervised_tokens: Those that are learnt.
        duplicates: Examples that equal an earlier one of this part.
        lengths: Tokens an example: `min`, `mean`, `p10` to `p99`, `max`; empty without examples.
        fingerprint: SHA-256 over the examples' tokens and labels, in order.
    """

    rows: int
    tokens: int
    supervised_tokens: int
    duplicates: int
    lengths: dict[str, float]
    fingerprint: str

    @property
    def supervised_share(self) -> float:
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"supervised_share": round(self.supervised_share, 4)}


@dataclass(frozen=True, slots=True)
class DataReport:
    """Everything that happened to the data of a run.

    Args:
        sources: One for each file or dataset that was read.
        train: What is learnt from.
        valid: What is held out; without rows where nothing is.
        shared: Validation examples that equal a training example; 0 where the split was made here.
        settings: The settings that shaped the data.
    """

    sources: list[SourceReport]
    train: PartReport
    valid: PartReport
    shared: int
    settings: dict[str, Any]

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
    def turns_with_text_left_out(self) -> int:
        """Learnt assistant turns of which the chat template leaves out reasoning, calls or content; worth a warning."""
        return sum(source.turns_with_text_left_out for source in self.sources)

    @property
    def fingerprint(self) -> str:
        """Differs wherever an example, its labels, its part or its place differs."""
        return f"{self.train.fingerprint}-{self.valid.fingerprint}"

    def to_json(self) -> dict[str, Any]:
        """`data_report.json`."""
        totals = ("rows", "kept", "truncated", "dropped", "bad")
        return {
            "totals": {name: getattr(self, name) for name in totals},
            "train": self.train.to_json(),
            "valid": self.valid.to_json(),
            "validation_rows_also_in_train": self.shared,
            "turns_with_text_left_out": self.turns_with_text_left_out,
            "settings": self.settings,
            "fingerprint": self.fingerprint,
            "sources": [source.to_json() for source in self.sources],
        }


def length_summary(examples: Sequence[Example]) -> dict[str, float]:
    """`min`, `mean`, percentiles and `max` of the examples' lengths, in tokens; percentiles are lengths that occur."""
    if not examples:
        return {}
    lengths = np.array([len(example) for example in examples])
    percentiles = np.percentile(lengths, PERCENTILES, method="inverted_cdf").tolist()
    return {
        "min": int(lengths.min()),
        "mean": round(float(lengths.mean()), 1),
        **{f"p{percent}": int(length) for percent, length in zip(PERCENTILES, percentiles, strict=True)},
        "max": int(lengths.max()),
    }
