"""The steps of a plan as arrays: those that a plan, a cut and a collation give, from any step on, and again with another budget."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_sft.data.batches import Batch, Layout, Plan, collate, cut
from mlx_sft.data.dataset import Examples
from mlx_sft.data.encode import Example
from mlx_sft.data.feed import StepFeed

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


@pytest.mark.parametrize("layout", ["grid", "joined"])
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
    with StepFeed(plan, examples, after=1, token_budget=200, layout="grid") as feed:
        second, third = next(feed), next(feed)
        again = feed.again(40)
        later = list(feed)
    assert (second.step.number, third.step, again.step.number) == (2, again.step, 3)
    assert max(batch.token_ids.size for batch in third.batches) > 40
    assert [prepared.step.number for prepared in later] == [4, 5, 6]
    for prepared in (again, *later):
        assert all(len(batch.token_ids) == 1 or batch.token_ids.size <= 40 for batch in prepared.batches)
    assert sum(batch.tokens for batch in again.batches) == sum(batch.tokens for batch in third.batches)
