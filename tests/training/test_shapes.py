"""Which shapes are compiled: on a GPU the commonest of the plan, not too many, found without going through all of a long run."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from mlx_sft import TrainConfig
from mlx_sft.console import Console
from mlx_sft.data.batches import MicroBatch, Plan, collate, cut, round_up
from mlx_sft.data.dataset import Examples
from mlx_sft.data.encode import Example
from mlx_sft.training.batch_settings import MOST_TRACES, compiled_shapes, frequent_shapes, planned_shape
from mlx_sft.training.machine import Machine, mac
from mlx_sft.training.setup import prepare_job
from mlx_sft.training.step import padded_shape


def _rows(lengths: list[int]) -> Examples:
    """Examples in which everything but the first token is learnt."""
    made = []
    for length in lengths:
        weights = np.ones(length, np.float32)
        weights[0] = 0
        made.append(Example("row", np.arange(length, dtype=np.int32), weights))
    return Examples.of(made)


def test_a_shape_counts_supervised_positions_on_the_grid(examples: Examples) -> None:
    batch = collate(examples, MicroBatch((0, 1), 24))
    assert padded_shape(batch) == (2, 24, 16)
    assert len(batch.targets) == 9


def test_a_planned_shape_is_that_of_the_batch(examples: Examples) -> None:
    for micro_batch in cut(range(len(examples)), examples.needed_lengths, token_budget=40):
        assert planned_shape(examples, micro_batch) == padded_shape(collate(examples, micro_batch))


def test_on_a_gpu_the_commonest_shapes_of_the_plan_are_compiled(settings: dict[str, Any]) -> None:
    job = prepare_job(TrainConfig(**settings | {"epochs": 1, "batch_size": 1}), Console(quiet=True))
    arguments = (job.plan, job.data.train, job.settings.micro_batch_tokens)
    assert compiled_shapes(Machine("a PC", "cpu", 2**34, ""), *arguments) == []
    lengths = job.data.train.needed_lengths
    steps = [MicroBatch(step.rows, round_up(int(lengths[step.rows[0]]))) for step in job.plan.steps()]
    taken = Counter(padded_shape(collate(job.data.train, micro_batch)) for micro_batch in steps)
    assert set(compiled_shapes(mac("a Mac", 16), *arguments)) == {shape for shape, times in taken.items() if times > 2}
    assert max(taken.values()) > 2


def test_there_are_never_more_than_24_and_the_commonest_come_first() -> None:
    lengths = [8 * width + 1 for width in range(1, 17) for _ in range(40 - width)]
    lengths += [16 * width + 1 for width in range(9, 40) for _ in range(3)]
    examples = _rows(lengths)
    found = frequent_shapes(Plan(len(lengths), batch_size=1), examples, 2048)
    assert len(found) == MOST_TRACES == 24
    assert [width for _, width, _ in found[:16]] == [8 * width for width in range(1, 17)]


def test_of_a_long_epoch_only_the_beginning_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    monkeypatch.setattr("mlx_sft.training.batch_settings.cut", lambda rows, *_: looked_at.append(rows) or cut(rows, *_))
    examples = _rows([9] * 30)
    for rows, steps in ((30, 15), (1_000_000, 2000)):
        looked_at.clear()
        plan = Plan(rows, batch_size=2, shuffle=False, epochs=3)
        monkeypatch.setattr(plan, "steps", lambda: _steps_of_thirty_rows())
        assert frequent_shapes(plan, examples, 2048) == [(2, 8, 16)]
        assert len(looked_at) == steps


def _steps_of_thirty_rows() -> Any:
    return Plan(30, batch_size=2, shuffle=False, epochs=1000).steps()
