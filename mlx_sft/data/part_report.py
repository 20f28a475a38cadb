"""The examples of one part of the data, to train or to validate on, in a few numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mlx_sft.data.dataset import Examples
from mlx_sft.data.findings import ORIGINS_NAMED
from mlx_sft.data.pairs import counted, first_equals
from mlx_sft.data.screening import SIGNS

PERCENTILES = (10, 50, 90, 95, 99)
_BARS = 20


@dataclass(frozen=True, slots=True)
class PartReport:
    """The examples of one part of the data, `train` or `valid`.

    Args:
        rows: The number of examples.
        tokens: The number of their tokens.
        supervised_tokens: The number of those that are supervised.
        pairs: The number of rows, where the examples of a row are compared; what is counted below are then these.
        duplicates: The number of examples that equal an earlier one of this part.
        first_duplicates: The origins of the first of them.
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
    first_duplicates: list[str] = field(default_factory=list)
    pairs: int = 0

    @classmethod
    def of(cls, examples: Examples, *, compared: bool = False) -> PartReport:
        """The report of these examples, from their columns.

        Args:
            compared: Whether the examples of a row are compared.
        """
        lengths = examples.lengths
        repeated = first_equals(examples, compared=compared) != np.arange(len(examples))
        longest = np.argsort(-lengths.astype(np.int64), kind="stable")[:ORIGINS_NAMED].tolist()
        return cls(
            rows=len(examples),
            tokens=int(lengths.sum(dtype=np.int64)),
            supervised_tokens=int(examples.supervised_tokens.sum(dtype=np.int64)),
            duplicates=counted(examples, repeated, compared=compared),
            lengths=length_summary(lengths),
            fingerprint=examples.fingerprint(),
            histogram=histogram(lengths),
            longest=[{"origin": examples[index].origin, "tokens": int(lengths[index])} for index in longest],
            signs=_signs(examples, compared),
            first_duplicates=examples.first_rows(repeated, ORIGINS_NAMED),
            pairs=len(np.unique(examples.rows)) if compared else 0,
        )

    @property
    def units(self) -> int:
        """How many there are of what is trained on: examples, or pairs of them."""
        return self.pairs or self.rows

    @property
    def supervised_share(self) -> float:
        return self.supervised_tokens / self.tokens if self.tokens else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"supervised_share": round(self.supervised_share, 4)}


def _signs(examples: Examples, compared: bool) -> dict[str, dict[str, Any]]:
    signs = {}
    for bit, name in enumerate(SIGNS):
        found = (examples.signs >> bit & 1).astype(bool)
        if found.any():
            origins = examples.first_rows(found, ORIGINS_NAMED)
            signs[name] = {"count": counted(examples, found, compared=compared), "origins": origins}
    return signs


def length_summary(lengths: ArrayLike) -> dict[str, float]:
    """`min`, `mean`, percentiles and `max`, in tokens; percentiles are lengths that occur. Empty without lengths."""
    lengths = np.asarray(lengths)
    if not len(lengths):
        return {}
    percentiles = np.percentile(lengths, PERCENTILES, method="inverted_cdf").tolist()
    return {
        "min": int(lengths.min()),
        "mean": round(float(lengths.mean()), 1),
        **{f"p{percent}": int(length) for percent, length in zip(PERCENTILES, percentiles, strict=True)},
        "max": int(lengths.max()),
    }


def histogram(lengths: ArrayLike) -> list[dict[str, int]]:
    """Counts of lengths `from`..`to`, both included, in about 20 bars of a round width; the last one takes the tail.

    The width follows the 99th percentile, so that a few giants do not press all others into one bar.
    """
    lengths = np.asarray(lengths, np.int64)
    if not len(lengths):
        return []
    least, longest = int(lengths.min()), int(lengths.max())
    common = int(np.percentile(lengths, 99, method="inverted_cdf"))
    width = _round_width((common - least + 1) / _BARS)
    first = least // width * width
    starts = np.arange(first, common + 1, width)
    if longest >= starts[-1] + width:
        starts = np.append(starts, starts[-1] + width)
    ends = np.append(starts[1:] - 1, max(longest, starts[-1] + width - 1))
    counts = np.bincount(np.searchsorted(starts, lengths, side="right") - 1, minlength=len(starts))
    return [
        {"from": start, "to": end, "count": number}
        for start, end, number in zip(starts.tolist(), ends.tolist(), counts.tolist(), strict=True)
    ]


def _round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, ... that is at least this."""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= least:
                return step * power
        power *= 10
