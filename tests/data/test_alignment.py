from __future__ import annotations

import numpy as np
import pytest

from mlx_sft.data.encode import Alignment

pytestmark = pytest.mark.fast


def tokens_over(
    text: str, spans: list[tuple[int, int]], *offsets: tuple[int, int], added: tuple[int, ...] = ()
) -> list[int]:
    is_added = np.isin(np.arange(len(offsets)), added)
    alignment = Alignment.of(text, np.array(offsets, np.int64).reshape(-1, 2), is_added)
    return np.flatnonzero(alignment.supervised(spans)).tolist()


@pytest.mark.parametrize(
    ("offsets", "added", "expected"),
    [
        # text:  h:\nab .\nu      span: "ab ." = 3..7
        ([(0, 3), (3, 5), (5, 7), (7, 8)], (), [1, 2]),
        ([(0, 2), (2, 5), (5, 9)], (), [1, 2]),  # across either end, sharing letters
        ([(0, 5), (5, 7)], (0,), [1]),  # an added token that began before
        ([(0, 3), (3, 3), (3, 5), (5, 7)], (), [2, 3]),  # without width at the border: of what stood before
        ([(0, 3), (3, 5), (6, 7), (7, 8)], (), [1, 2]),  # the space is left out of its token's place
        ([(0, 3), (3, 4), (3, 4), (4, 7)], (), [1, 2, 3]),  # two tokens of one character
        ([(0, 3), (3, 4), (4, 4), (4, 7)], (), [1, 2, 3]),  # the second without width
        ([], (), []),
    ],
)
def test_tokens_that_overlap_a_span_are_supervised(
    offsets: list[tuple[int, int]], added: tuple[int, ...], expected: list[int]
) -> None:
    assert tokens_over("h:\nab .\nu", [(3, 7)], *offsets, added=added) == expected


def test_a_token_past_the_end_that_shares_only_white_space_is_not_supervised() -> None:
    assert tokens_over("ab \ncd", [(0, 3)], (0, 2), (2, 4), (4, 6)) == [0]
    assert tokens_over("ab.\ncd", [(0, 3)], (0, 2), (2, 4), (4, 6)) == [0, 1]
