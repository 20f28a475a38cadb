from __future__ import annotations

import numpy as np
import pytest

from mlx_sft.data.report import histogram, length_summary

pytestmark = pytest.mark.fast


def test_percentiles_are_lengths_that_occur() -> None:
    summary = length_summary([1, 2, 3, 4, 1000])
    assert summary == {"min": 1, "mean": 202.0, "p10": 1, "p50": 3, "p90": 1000, "p95": 1000, "p99": 1000, "max": 1000}


def test_no_lengths_have_no_summary() -> None:
    assert length_summary([]) == {}
    assert histogram([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_histogram_counts_every_length_once_in_bars_that_touch(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 10 ** (seed + 1), 500)
    bars = histogram(lengths)
    assert sum(bar["count"] for bar in bars) == 500
    assert len(bars) <= 24
    for bar, after in zip(bars, [*bars[1:], None], strict=True):
        assert bar["count"] == np.count_nonzero((lengths >= bar["from"]) & (lengths <= bar["to"]))
        assert after is None or after["from"] == bar["to"] + 1


def test_a_few_giants_share_the_last_bar() -> None:
    bars = histogram([*range(100, 300), 100_000])
    assert bars[-1] == {"from": 300, "to": 100_000, "count": 1}
    assert bars[0] == {"from": 100, "to": 109, "count": 10}


def test_one_length_is_one_bar() -> None:
    assert histogram([7, 7]) == [{"from": 7, "to": 7, "count": 2}]
