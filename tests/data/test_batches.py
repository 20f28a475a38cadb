"""The plan: every row once an epoch, the same steps again after a kill; and the cheapest cut that memory allows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_sft.data.batches import (
    CALL_COST,
    JOINED,
    PADDED,
    Layout,
    MicroBatch,
    Span,
    collate,
    cut,
    cut_all,
    cut_examples,
    cut_step,
    levels,
    round_up,
    row_cost,
)
from mlx_sft.data.dataset import Examples, pack
from mlx_sft.data.example import Example, Outcome
from mlx_sft.data.steps import Plan, Portion, shares

pytestmark = pytest.mark.fast

LENGTHS = st.lists(st.integers(1, 200) | st.integers(1, 3000), min_size=1, max_size=7)
BUDGETS = st.integers(1, 600) | st.integers(1, 8000)


def _example(text: str) -> Example:
    """A letter a token; capitals are supervised."""
    token_ids = np.array([ord(letter) for letter in text], np.int32)
    return Example("row", token_ids, np.array([letter.isupper() for letter in text], np.float32))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 5), st.booleans())
def test_every_row_is_in_every_epoch_once(rows: int, batch_size: int, epochs: int, seed: int, shuffle: bool) -> None:
    plan = Plan(rows, batch_size=batch_size, epochs=epochs, seed=seed, shuffle=shuffle)
    steps = list(plan.steps())

    assert [step.number for step in steps] == list(range(1, plan.total_steps + 1))
    assert Counter(row for step in steps for row in step.rows) == dict.fromkeys(range(rows), epochs)
    for epoch in range(epochs):
        within = steps[epoch * plan.steps_per_epoch : (epoch + 1) * plan.steps_per_epoch]
        assert sorted(row for step in within for row in step.rows) == list(range(rows))
        assert [step.ends_epoch for step in within] == [False] * (len(within) - 1) + [True]
        assert [len(step.rows) for step in within[:-1]] == [batch_size] * (len(within) - 1)
        assert within[-1].epoch == epoch + 1


@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 50), st.integers(0, 60))
def test_a_resumed_plan_is_the_rest_of_the_whole_one(rows: int, batch_size: int, steps: int, after: int) -> None:
    plan = Plan(rows, batch_size=batch_size, max_steps=steps, seed=7)
    again = Plan(rows, batch_size=batch_size, max_steps=steps, seed=7)
    assert list(again.steps(after=after)) == list(plan.steps())[after:]
    assert plan.total_steps == steps


def test_the_last_step_of_an_epoch_takes_what_is_left() -> None:
    plan = Plan(10, batch_size=4, epochs=2, shuffle=False)
    assert [step.rows for step in plan.steps()] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)] * 2
    assert [step.epoch for step in plan.steps()] == [0.4, 0.8, 1.0, 1.4, 1.8, 2.0]


def test_the_order_is_another_one_each_epoch_and_for_each_seed() -> None:
    def orders(seed: int) -> list[tuple[int, ...]]:
        return [step.rows for step in Plan(50, batch_size=50, epochs=3, seed=seed).steps()]

    assert orders(1) == orders(1)
    assert len(set(orders(1) + orders(2) + [tuple(range(50))])) == 7


@given(st.integers(1, 100_000))
def test_widths_are_on_a_small_grid_just_above(length: int) -> None:
    width = round_up(length)
    assert length <= width <= length + max(7, length / 8)
    assert round_up(width) == width


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=30))
def test_on_a_gpu_no_row_is_narrower_than_its_attention_can_be_trained(lengths: list[int]) -> None:
    layout = Layout.of_few_shapes(lengths)
    assert all(micro.width >= 16 for micro in cut(range(len(lengths)), lengths, 64, layout))
    assert all(layout.width_of(length) >= length for length in (*lengths, 5000))
    assert len(layout.widths) <= 16
    assert PADDED.width_of(9) == 9


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(1, 5))
def test_levels_add_the_least_that_so_many_can(numbers: list[int], most: int) -> None:
    def added(chosen: tuple[int, ...]) -> int:
        return sum(min(level for level in chosen if level >= number) - number for number in numbers)

    found, values = levels(numbers, most), sorted(set(numbers))
    assert found == tuple(sorted(set(found)))
    assert len(found) <= most
    ways = [
        (*lower, values[-1])
        for count in range(most)
        for lower in combinations(values[:-1], min(count, len(values) - 1))
    ]
    assert added(found) == min(map(added, ways))


def test_the_grid_has_few_widths() -> None:
    assert len({round_up(length) for length in range(1, 4097)}) < 80


def _cost(micro_batches: list[MicroBatch]) -> int:
    return sum(len(micro.rows) * row_cost(micro.width) + CALL_COST for micro in micro_batches)


def _partitions(rows: list[int]) -> list[list[list[int]]]:
    """Every way to put rows into groups."""
    if not rows:
        return [[]]
    first, rest = rows[0], _partitions(rows[1:])
    alone = [[[first], *groups] for groups in rest]
    joined = [[*groups[:i], [first, *groups[i]], *groups[i + 1 :]] for groups in rest for i in range(len(groups))]
    return alone + joined


LAYOUTS: tuple[Callable[[Any], Layout], ...] = (Layout.of_few_shapes, lambda _: PADDED, lambda _: JOINED)
"""Of few shapes, padded to the longest, and end to end."""


@settings(max_examples=60, deadline=None)
@given(LENGTHS, BUDGETS, st.sampled_from(LAYOUTS))
def test_no_grouping_that_fits_is_cheaper(
    lengths: list[int], budget: int, layout_of: Callable[[list[int]], Layout]
) -> None:
    layout = layout_of(lengths)

    def made(groups: list[list[int]]) -> list[MicroBatch]:
        whole = sum if layout.joined else max
        return [
            MicroBatch(tuple(group), whole(layout.width_of(lengths[row]) for row in group), layout.joined)
            for group in groups
        ]

    def cost(micro_batches: list[MicroBatch]) -> int:
        if not layout.joined:
            return _cost(micro_batches)
        return sum(CALL_COST + sum(row_cost(lengths[row]) for row in micro.rows) for micro in micro_batches)

    def keeps_the_order(groups: list[list[int]]) -> bool:
        """Joined rows could be put together in any way, and so could powers of two; here rows go together by length."""
        places = {
            row: place for place, row in enumerate(sorted(range(len(lengths)), key=lambda row: (lengths[row], row)))
        }
        return all(max(map(places.get, group)) - min(map(places.get, group)) < len(group) for group in groups)

    partitions = _partitions(list(range(len(lengths))))
    if layout.widths:
        partitions = [groups for groups in partitions if all(len(group) in (1, 2, 4) for group in groups)]
    every = map(made, filter(keeps_the_order, partitions) if layout.joined or layout.widths else partitions)
    fits = [ms for ms in every if all(len(m.rows) == 1 or m.tokens <= budget for m in ms)]
    assert cost(cut(range(len(lengths)), lengths, budget, layout)) == min(map(cost, fits))


@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    st.integers(1, 5000),
    st.sampled_from(LAYOUTS),
    st.randoms(),
)
def test_a_cut_has_every_row_once_and_keeps_to_its_budget(
    lengths: list[int], budget: int, layout_of: Callable[[list[int]], Layout], random: object
) -> None:
    layout = layout_of(lengths)
    rows = [row for row in range(len(lengths)) if row % 3 != 1] or [0]
    random.shuffle(rows)

    micro_batches = cut(rows, lengths, budget, layout)

    assert sorted(row for micro in micro_batches for row in micro.rows) == sorted(rows)
    for micro in micro_batches:
        whole = sum if layout.joined else max
        assert micro.width == whole(layout.width_of(lengths[row]) for row in micro.rows)
        assert len(micro.rows) == 1 or micro.tokens <= budget
    assert micro_batches == cut(sorted(rows), lengths, budget, layout)


PAIRS = (0, 0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1), (31, 39, 49, 100, 150, 179, 198, 349, 467)
"""Quantiles of the lengths of short instruction pairs, as measured on 1,800 real ones."""


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("layout_of", LAYOUTS)
@pytest.mark.parametrize("kind", ["pairs", "chats"])
def test_less_than_a_tenth_is_padding(kind: str, layout_of: Callable[[Any], Layout], seed: int) -> None:
    random = np.random.default_rng(seed)
    if kind == "pairs":
        lengths = np.interp(random.random(1600), *PAIRS).astype(int)
    else:
        lengths = np.clip(random.lognormal(np.log(400), 0.8, 1600), 20, 2048).astype(int)
    layout = layout_of(lengths)
    steps = [cut(range(first, first + 16), lengths, 2048, layout) for first in range(0, 1600, 16)]
    padded = sum(micro.tokens for step in steps for micro in step)
    assert 1 - lengths.sum() / padded < 0.1
    assert sum(map(len, steps)) < 0.8 * 1600  # and rows do go together


def test_thousands_of_rows_are_cut_as_well_as_few() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 4096)
    micro_batches = cut(range(4096), lengths, 4096)
    assert sorted(row for micro in micro_batches for row in micro.rows) == list(range(4096))
    assert _cost(micro_batches) < 1.06 * sum(map(row_cost, lengths.tolist()))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 900))
def test_evaluation_cuts_every_row_once(lengths: list[int], budget: int) -> None:
    micro_batches = cut_all(lengths, budget)
    assert sorted(row for micro in micro_batches for row in micro.rows) == list(range(len(lengths)))
    assert all(len(micro.rows) == 1 or len(micro.rows) * micro.width <= budget for micro in micro_batches)


def test_a_large_evaluation_is_cut_in_groups_of_similar_lengths() -> None:
    lengths = np.random.default_rng(0).permutation(np.arange(10_000) // 25 + 1)
    micro_batches = cut_all(lengths, 2048)
    assert sorted(row for micro in micro_batches for row in micro.rows) == list(range(10_000))
    assert sum(len(micro.rows) * micro.width for micro in micro_batches) < 1.1 * lengths.sum()


def test_the_picture_of_collate() -> None:
    batch = collate([_example("abCDeF.")], MicroBatch((0,), 8))
    assert batch.token_ids.tolist() == [[*map(ord, "abCDe"), 0, 0, 0]]  # F is supervised, never read
    assert batch.positions.tolist() == [1, 2, 4]
    assert [chr(target) for target in batch.targets] == ["C", "D", "F"]
    assert (batch.tokens, batch.needed_tokens) == (7, 5)


def test_rows_of_one_micro_batch_lie_under_each_other() -> None:
    examples = [_example("never"), _example("aB"), _example("abcD"), _example("aBCD")]
    batch = collate(examples, MicroBatch((1, 3), 8))
    assert batch.token_ids.tolist() == [[ord("a"), *[0] * 7], [*map(ord, "aBC"), *[0] * 5]]
    assert batch.positions.tolist() == [0, 8, 9, 10]
    assert [chr(target) for target in batch.targets] == ["B", "B", "C", "D"]
    assert (batch.tokens, batch.needed_tokens) == (6, 4)
    assert (batch.token_ids.dtype, batch.positions.dtype, batch.targets.dtype) == (np.int32,) * 3


@pytest.mark.parametrize("joined", [True, False])
def test_a_batch_tells_of_which_example_each_target_is(joined: bool) -> None:
    examples = [_example("never"), _example("aB"), _example("abcD"), _example("aBCD")]
    batch = collate(examples, MicroBatch((3, 1, 2), 7 if joined else 8, joined))
    assert batch.owners.tolist() == [0, 0, 0, 1, 2]
    assert batch.examples == (3, 1, 2)


def test_the_examples_of_a_row_may_stand_in_one_step_together() -> None:
    together = [[0, 1], [2, 3], [4], [5, 6]]
    steps = list(Plan(4, batch_size=2, epochs=3, seed=5, together=together).steps())
    assert [step.ends_epoch for step in steps] == [False, True] * 3
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert sorted(first.rows + second.rows) == list(range(7))
        assert all(set(row) <= set(first.rows) or not set(row) & set(first.rows) for row in together)


@pytest.mark.parametrize(("text", "length"), [("aB", 1), ("aBc", 1), ("abcD", 3), ("aBcDe.", 3)])
def test_what_comes_after_the_last_supervised_token_is_not_computed(text: str, length: int) -> None:
    assert _example(text).needed_length == length


# Mixtures


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(1, 1000))
def test_shares_are_proportional_and_leave_no_row_over(weights: list[float], rows: int) -> None:
    found = shares(rows, weights)
    assert sum(found) == rows
    assert all(abs(share - rows * weight / sum(weights)) <= 1 for share, weight in zip(found, weights, strict=True))


def test_the_largest_weights_are_shares_too() -> None:
    assert shares(10, [1e308, 1e308]) == [5, 5]


def _mixed(epochs: int = 1, **settings: Any) -> list[list[int]]:
    """The rows of each epoch of a large source (0 to 89) and a small one (90 to 99), half of each."""
    plan = Plan(100, batch_size=30, epochs=epochs, mixture=[Portion(90, 0.5), Portion(10, 0.5)], **settings)
    rows = [row for step in plan.steps() for row in step.rows]
    assert len(rows) == 100 * epochs
    return [rows[start : start + 100] for start in range(0, len(rows), 100)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_small_source_is_repeated_and_a_large_one_gone_through_over_epochs(shuffle: bool) -> None:
    epochs = _mixed(9, shuffle=shuffle)
    for epoch in epochs:
        times = Counter(epoch)
        assert {times[row] for row in range(90, 100)} == {5}
        assert sum(times[row] for row in range(90)) == 50
    assert set(Counter(row for epoch in epochs for row in epoch if row < 90).values()) == {5}


def test_a_mixture_is_deterministic_and_another_one_each_epoch_and_for_each_seed() -> None:
    assert _mixed(2, seed=1) == _mixed(2, seed=1)
    first, second = _mixed(2, seed=1)
    assert first != second
    assert first != _mixed(1, seed=2)[0]


def test_a_resumed_mixture_is_the_rest_of_the_whole_one() -> None:
    plan = Plan(12, batch_size=5, epochs=4, seed=3, mixture=[Portion(10, 1), Portion(2, 3)])
    assert list(plan.steps(after=7)) == list(plan.steps())[7:]


def test_without_shuffling_sources_alternate_evenly() -> None:
    plan = Plan(8, batch_size=8, shuffle=False, mixture=[Portion(6, 3), Portion(2, 1)])
    (step,) = plan.steps()
    assert step.rows == (0, 1, 6, 2, 3, 4, 7, 5)


def test_joined_rows_lie_end_to_end() -> None:
    examples = [_example("never"), _example("aB"), _example("abcD"), _example("aBCD")]
    batch = collate(examples, MicroBatch((1, 3, 2), 7, joined=True))
    assert batch.token_ids.tolist() == [[*map(ord, "aaBCabc")]]
    assert batch.spans == (Span(0, 1, 1, 0), Span(1, 4, 3, 1), Span(4, 7, 1, 4))
    assert batch.positions.tolist() == [0, 1, 2, 3, 6]
    assert [chr(target) for target in batch.targets] == ["B", "B", "C", "D", "D"]
    assert (batch.tokens, batch.needed_tokens, batch.rows, batch.longest) == (10, 7, 3, 3)


def test_what_the_examples_of_a_row_begin_with_alike_lies_there_once() -> None:
    pairs = [("abcDE.", "abcDF"), ("pQRS", "pT"), ("onE", "twO"), ("sAME.", "sAM")]
    rows = [Outcome("row", [_example(text) for text in pair]) for pair in pairs]
    examples, layout = Examples([pack(rows)]), Layout(joined=True, shares=True)
    (one,) = cut_step([4, 5, 2, 3, 0, 1, 6, 7], examples, 100, layout)
    assert one == MicroBatch((4, 5, 2, 3, 6, 7, 0, 1), 17, True, (0, 0, 0, 0, 0, 1, 0, 3))
    batch = collate(examples, one)
    assert "".join(map(chr, batch.token_ids[0])) == "ontwpQRpsAMAabcDD"
    seen = zip(batch.owners.tolist(), batch.token_ids[0][batch.positions], batch.targets, strict=True)
    assert [(owner, chr(at), chr(target)) for owner, at, target in seen if owner > 3] == [
        (4, "s", "A"), (4, "A", "M"), (4, "M", "E"), (5, "s", "A"), (5, "A", "M"),
        (6, "c", "D"), (6, "D", "E"), (7, "c", "D"), (7, "D", "F"),
    ]  # fmt: skip
    assert batch.positions.tolist()[-2:] == [14, 16]
    assert (batch.needed_tokens, batch.longest) == (17, 4)
    apart = cut_examples(examples, 4, layout)
    assert [micro.rows for micro in apart] == [(0,), (1,), (2, 3), (4, 5), (6, 7)]


def test_a_pair_that_stands_in_a_step_twice_is_two_pairs() -> None:
    examples = Examples([pack([Outcome("row", [_example("abC"), _example("abD")])])])
    (one,) = cut_step([0, 1, 0, 1], examples, 100, Layout(joined=True, shares=True))
    assert (one.rows, one.shared) == ((0, 1, 0, 1), (0, 1, 0, 1))
