from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_sft.data.dataset import Examples, pack
from mlx_sft.data.example import Example, Outcome
from mlx_sft.data.truncation import truncate

pytestmark = pytest.mark.fast

WEIGHTS = st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=2, max_size=40).map(
    lambda weights: [0.0, *weights[:-1], 1.0]
)
ROWS = st.lists(st.lists(WEIGHTS, min_size=1, max_size=3), min_size=1, max_size=6)


def examples_of(rows: list[list[list[float]]]) -> Examples:
    """Rows of one or several conversations, whose tokens have these weights."""
    return Examples(
        [
            pack(
                Outcome(
                    f"a:{row}",
                    [
                        Example(
                            f"a:{row}#{turn}", np.arange(len(weights), dtype=np.int32), np.array(weights, np.float32)
                        )
                        for turn, weights in enumerate(turns, 1)
                    ],
                )
                for row, turns in enumerate(rows, 1)
            )
        ]
    )


@given(ROWS, st.integers(2, 45), st.sampled_from(["truncate", "drop"]), st.booleans())
def test_every_supervised_token_is_left_or_counted_as_lost(
    rows: list[list[list[float]]], max_length: int, overlong: str, compared: bool
) -> None:
    truncation = truncate(examples_of(rows), max_length, overlong, compared=compared)  # type: ignore[arg-type]
    supervised = sum(int(np.count_nonzero(one.loss_weights)) for one in truncation.examples)
    assert supervised + truncation.tokens.supervised_lost == sum(w != 0 for row in rows for turn in row for w in turn)
    assert all(len(one) <= max_length and one.supervised_tokens for one in truncation.examples)
    assert bool(truncation.notes) == any(len(turn) > max_length for row in rows for turn in row)
