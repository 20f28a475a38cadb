"""Lengths in a few numbers: a summary and a histogram."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

PERCENTILES = (10, 50, 90, 95, 99)
_BARS = 20


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
