"""Items made ahead in a thread, and the steps of a plan as arrays.

Items come in their order, never too many, and no thread is left behind; steps are those that a plan, a cut and a collation give,
from any step on, and again with another budget.
"""

from __future__ import annotations

import gc
import threading
import traceback
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

from mlx_sft.data.batches import JOINED, PADDED, Batch, Layout, collate, cut
from mlx_sft.data.dataset import Examples
from mlx_sft.data.encode import Example
from mlx_sft.data.feed import Prefetch, StepFeed
from mlx_sft.data.steps import Plan

pytestmark = pytest.mark.fast

LENGTHS = [9, 30, 17, 12, 41, 8, 25, 33, 19, 14]


@pytest.fixture(scope="module")
def examples() -> Examples:
    made = []
    for number, length in enumerate(LENGTHS):
        weights = np.ones(length, np.float32)
        weights[0] = 0
        made.append(Example(f"row {number}", np.full(length, number, np.int32), weights))
    return Examples.of(made)


@pytest.fixture
def plan() -> Plan:
    return Plan(len(LENGTHS), batch_size=4, epochs=2, seed=3)


def _content(batch: Batch) -> tuple[object, ...]:
    return batch.token_ids.tolist(), batch.positions.tolist(), batch.targets.tolist(), batch.tokens


@pytest.mark.parametrize("layout", [Layout.of_few_shapes(LENGTHS), JOINED])
@pytest.mark.parametrize("after", [0, 2, 6])
def test_it_gives_the_steps_that_are_left_as_they_are_cut_and_collated(
    after: int, layout: Layout, plan: Plan, examples: Examples
) -> None:
    with StepFeed(plan, examples, after=after, token_budget=64, layout=layout) as feed:
        found = [(prepared.step, [_content(batch) for batch in prepared.batches]) for prepared in feed]
    expected = [
        (step, [_content(collate(examples, micro)) for micro in cut(step.rows, examples.needed_lengths, 64, layout)])
        for step in plan.steps(after)
    ]
    assert found == expected
    assert len(found) == 6 - after


def test_a_step_comes_again_cut_smaller_and_so_do_those_behind_it(plan: Plan, examples: Examples) -> None:
    with StepFeed(plan, examples, after=1, token_budget=200, layout=PADDED) as feed:
        second, third = next(feed), next(feed)
        again = feed.again(30)
        later = list(feed)
    assert (second.step.number, third.step, again.step.number) == (2, again.step, 3)
    assert max(batch.token_ids.size for batch in third.batches) > 30
    assert [prepared.step.number for prepared in later] == [4, 5, 6]
    for prepared in (again, *later):
        assert all(len(batch.token_ids) == 1 or batch.token_ids.size <= 30 for batch in prepared.batches)
    assert sum(batch.tokens for batch in again.batches) == sum(batch.tokens for batch in third.batches)


# Items of any kind


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("ahead", [1, 2, 50])
def test_the_items_come_in_their_order(ahead: int) -> None:
    with Prefetch((number * number for number in range(20)), ahead) as items:
        assert list(items) == [number * number for number in range(20)]
        assert list(items) == []
    assert not _threads()


def test_they_are_made_in_another_thread_before_they_are_asked_for() -> None:
    made: dict[int, str] = {}
    third = threading.Event()

    def make() -> Iterator[int]:
        for number in range(9):
            made[number] = threading.current_thread().name
            if number == 2:
                third.set()
            yield number

    with Prefetch(make(), ahead=2) as items:
        next(items)
        assert third.wait(10), "the two behind the first were not made"
    assert set(made) == {0, 1, 2}
    assert all(name.startswith("prefetch") for name in made.values())


class Item:
    """Something that can be watched."""


def test_no_more_than_asked_for_lie_ready_and_none_is_kept() -> None:
    alive: weakref.WeakSet[Item] = weakref.WeakSet()
    most = 0

    def make() -> Iterator[Item]:
        nonlocal most
        for _ in range(30):
            item = Item()
            alive.add(item)
            most = max(most, len(alive))
            yield item

    with Prefetch(make(), ahead=2) as items:
        for number, _ in enumerate(items):
            if number == 20:
                break
    # Two ready, the one at hand, and the one that the generator is still at.
    assert most <= 4
    del items, _
    gc.collect()
    assert not alive


def test_an_error_comes_out_in_its_place_with_the_lines_that_made_it() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise LookupError("row 7 is gone")

    with Prefetch(broken()) as items:
        assert next(items) == 1
        with pytest.raises(LookupError, match="row 7") as caught:
            next(items)
        assert "broken" in "".join(traceback.format_tb(caught.value.__traceback__))
        assert not _threads()
        assert list(items) == []


def test_an_error_of_whoever_asks_ends_the_thread() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 1

    def ask() -> None:
        with Prefetch(endless()) as items:
            next(items)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask()
    assert not _threads()


def test_the_wait_for_a_late_item_is_measured() -> None:
    go_on = threading.Event()

    def late() -> Iterator[int]:
        yield 1
        go_on.wait(10)
        yield 2

    with Prefetch(late()) as items:
        next(items)
        threading.Timer(0.05, go_on.set).start()
        next(items)
        assert 0.02 < items.waited < 10
