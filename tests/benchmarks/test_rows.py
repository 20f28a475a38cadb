"""The rows that benchmarks train on: their lengths and supervised shares, and mlx-lm's order of them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.rows import CHAT_SHARE, KINDS, chats, documents, halves, pairs, spread
from benchmarks.workload import (
    IGNORED,
    Row,
    answer_start,
    in_mlx_lm_order,
    needed_tokens,
    read_rows,
    supervised_tokens,
    write_rows,
)

VOCABULARY = 500


def lengths(rows: list[Row]) -> np.ndarray:
    return np.array([len(row["input_ids"]) for row in rows])


def learnt_share(rows: list[Row]) -> float:
    return supervised_tokens(rows) / lengths(rows).sum()


def parts(row: Row) -> int:
    """How often a row changes from supervised to not, or back."""
    supervised = np.array(row["labels"]) != IGNORED
    return int((supervised[1:] != supervised[:-1]).sum()) + 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_ends_with_a_learnt_zero_and_its_labels_are_its_tokens(kind: str) -> None:
    arguments = {"length": 40} if kind == "halves" else {}
    rows = KINDS[kind](6, VOCABULARY, seed=1, **arguments)
    assert len(rows) == 6
    for row in rows:
        assert row["input_ids"][-1] == row["labels"][-1] == 0
        assert row["labels"][0] == IGNORED
        assert 0 not in row["input_ids"][:-1]
        assert max(row["input_ids"]) < VOCABULARY
        assert all(label in (IGNORED, token) for token, label in zip(row["input_ids"], row["labels"], strict=True))


@pytest.mark.parametrize("kind", ["pairs", "chats"])
def test_a_seed_gives_the_same_rows_and_another_gives_others(kind: str) -> None:
    assert KINDS[kind](4, VOCABULARY, seed=1) == KINDS[kind](4, VOCABULARY, seed=1)
    assert KINDS[kind](4, VOCABULARY, seed=1) != KINDS[kind](4, VOCABULARY, seed=2)


def test_short_pairs_are_as_long_as_real_ones() -> None:
    rows = pairs(400, VOCABULARY, seed=0)
    assert np.median(lengths(rows)) == pytest.approx(100, abs=2)
    assert lengths(rows).min() >= 31
    assert lengths(rows).max() <= 467
    assert learnt_share(rows) == pytest.approx(0.81, abs=0.02)
    assert {parts(row) for row in rows} == {2}


def test_chats_have_several_turns_and_three_tenths_learnt() -> None:
    rows = chats(400, VOCABULARY, seed=0)
    assert np.median(lengths(rows)) == pytest.approx(400, abs=10)
    assert 1900 < lengths(rows).max() <= 2048
    assert learnt_share(rows) == pytest.approx(CHAT_SHARE, abs=0.01)
    turns = {parts(row) / 2 for row in rows}
    assert turns == set(range(1, 9))


def test_a_divided_chat_keeps_its_turns() -> None:
    whole, quarter = chats(40, VOCABULARY, seed=0), chats(40, VOCABULARY, seed=0, divisor=4)
    assert (lengths(quarter) == lengths(whole) // 4).all()
    assert max(parts(row) for row in quarter) == max(parts(row) for row in whole) == 16


def test_rows_of_a_large_sorted_file_come_in_groups_of_nearly_one_length() -> None:
    few, many = pairs(64, VOCABULARY, seed=0), pairs(64, VOCABULARY, seed=0, of=2048)
    widest = [np.ptp(np.sort(lengths(rows)).reshape(4, 16), axis=1).max() for rows in (few, many)]
    assert widest[1] <= 3 < 40 < widest[0]
    assert lengths(many).mean() == pytest.approx(lengths(few).mean(), rel=0.1)


def test_documents_learn_their_last_tenth() -> None:
    (row,) = documents(1, VOCABULARY, seed=0, length=4096)
    assert len(row["input_ids"]) == 4096
    assert answer_start(row) == 4096 - 410
    assert parts(row) == 2


def test_the_quantiles_are_met_evenly_from_the_shortest_to_the_longest() -> None:
    assert spread(((0, 0), (0.5, 100), (1, 1000)), 4).tolist() == [25, 75, 325, 775]


def test_a_file_gives_back_its_rows(tmp_path) -> None:
    rows = halves(3, VOCABULARY, seed=0, length=8)
    assert read_rows(write_rows(tmp_path / "rows.jsonl", rows)) == rows
    assert needed_tokens(rows) == 3 * 7
    assert supervised_tokens(rows) == 3 * 4


def test_only_the_last_of_several_answers_begins_the_answer() -> None:
    row = {"input_ids": [5, 6, 7, 8, 9, 0], "labels": [-100, 6, -100, -100, 9, 0]}
    assert answer_start(row) == 4


def test_mlx_lm_takes_the_rows_in_the_order_that_is_foreseen() -> None:
    trainer = pytest.importorskip("mlx_lm.tuner.trainer")
    rows = [halves(1, VOCABULARY, seed=n, length=n)[0] for n in (40, 12, 33, 7, 25, 18, 9, 50)]
    foreseen = in_mlx_lm_order(rows, rows_at_once=2, seed=3)
    np.random.seed(3)
    dataset = [(row["input_ids"], 0) for row in foreseen]
    batches = trainer.iterate_batches(dataset, batch_size=2, max_seq_length=96)
    taken = [bounds[:, 1].tolist() for batch, bounds in batches]
    assert taken == lengths(foreseen).reshape(4, 2).tolist()
    assert lengths(foreseen).tolist() != sorted(lengths(rows).tolist())


def test_rows_of_one_length_have_no_order_that_could_be_foreseen() -> None:
    with pytest.raises(ValueError, match="same length"):
        in_mlx_lm_order(halves(4, VOCABULARY, seed=0, length=8), rows_at_once=2, seed=0)
