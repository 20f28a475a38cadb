"""Few shapes serve nearly all micro-batches, with little padding; which, is a function of the plan."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from benchmarks.rows import CHAT_LENGTHS, PAIR_LENGTHS, spread
from mlx_sft.data.batches import Layout, MicroBatch, collate, cut, cut_step
from mlx_sft.data.dataset import Examples
from mlx_sft.data.encode import Example
from mlx_sft.data.steps import Plan
from mlx_sft.training.shapes import MOST_TRACES, Shape, compiled_shape, compiled_shapes, padded_shape

pytestmark = pytest.mark.fast


def _rows(lengths: list[int], supervised: Any = 1.0) -> Examples:
    """Examples of which a share is supervised, at their end: one for all or one each; or a random one, never the first token."""
    if isinstance(supervised, np.random.Generator):
        supervised = supervised.random(len(lengths))
    made = []
    for length, share in zip(lengths, np.broadcast_to(supervised, len(lengths)), strict=True):
        weights = np.zeros(length, np.float32)
        weights[-max(1, int(share * (length - 1))) :] = 1
        made.append(Example("row", np.arange(length, dtype=np.int32), weights))
    return Examples.of(made)


def test_a_shape_counts_supervised_positions_on_the_grid(examples: Examples) -> None:
    batch = collate(examples, MicroBatch((0, 1), 24))
    assert padded_shape(batch) == (2, 24, 16)
    assert len(batch.targets) == 9


def test_a_micro_batch_takes_the_smallest_shape_that_holds_it(examples: Examples) -> None:
    batch = collate(examples, MicroBatch((0, 1), 24))
    assert len(batch.targets) == 9
    assert compiled_shape(batch, [(2, 24, 8), (2, 24, 40), (2, 24, 16), (1, 24, 16), (2, 32, 9)]) == (2, 24, 16)
    assert compiled_shape(batch, [(2, 24, 8)]) is None
    joined = collate(examples, MicroBatch((0, 1), 24, joined=True))
    assert compiled_shape(joined, [(1, 24, 16)]) is None


def test_there_are_never_more_than_64_and_the_commonest_come_first() -> None:
    lengths = [8 * width + 1 for width in range(2, 17) for _ in range(100 - width)] + [500, 700, 800] * 150
    examples = _rows(lengths, supervised=np.random.default_rng(0))
    layout = Layout.of_few_shapes(examples.needed_lengths)
    found = compiled_shapes(Plan(len(lengths), batch_size=32), examples, 2048, layout)
    assert len(found) == MOST_TRACES == 64
    plan, times = Plan(len(lengths), batch_size=32), Counter[Shape | None]()
    for step in plan.steps():
        for micro_batch in cut(step.rows, examples.needed_lengths, 2048, layout):
            times[compiled_shape(collate(examples, micro_batch), found)] += 1
    in_their_order = [times[shape] for shape in found]
    assert in_their_order[:20] == sorted(in_their_order, reverse=True)[:20]
    assert min(in_their_order) > 2


@pytest.mark.parametrize("batch_size", [8, 16])
@pytest.mark.parametrize("kind", ["pairs", "chats"])
def test_most_micro_batches_are_compiled_and_little_is_padding(kind: str, batch_size: int) -> None:
    """Counted with the supervised positions: one takes a third of what a token takes in the layers of Qwen3-0.6B."""
    random = np.random.default_rng(0)
    quantiles = PAIR_LENGTHS if kind == "pairs" else CHAT_LENGTHS
    lengths = random.permutation(spread(quantiles, 2000)) + 1
    shares = random.uniform(0.15, 0.45, len(lengths)) if kind == "chats" else 1 - random.integers(14, 31) / lengths
    examples = _rows(lengths.tolist(), supervised=shares)
    layout = Layout.of_few_shapes(examples.needed_lengths)
    plan = Plan(len(lengths), batch_size=batch_size)
    shapes = compiled_shapes(plan, examples, 2048, layout)
    served = micro_batches = needed = taken = 0
    for step in plan.steps():
        for micro_batch in cut(step.rows, examples.needed_lengths, 2048, layout):
            batch = collate(examples, micro_batch)
            shape = compiled_shape(batch, shapes)
            served, micro_batches = served + (shape is not None), micro_batches + 1
            positions = shape[2] if shape else len(batch.targets)
            needed += batch.needed_tokens + len(batch.targets) / 3
            taken += batch.token_ids.size + positions / 3
    assert served >= 0.9 * micro_batches
    assert needed >= 0.9 * taken


def test_of_a_long_epoch_only_the_beginning_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    monkeypatch.setattr(
        "mlx_sft.training.shapes.cut_step", lambda rows, *_: looked_at.append(rows) or cut_step(rows, *_)
    )
    examples = _rows([17] * 30)
    for rows, steps in ((30, 15), (1_000_000, 2000)):
        looked_at.clear()
        plan = Plan(rows, batch_size=2, shuffle=False, epochs=3)
        monkeypatch.setattr(plan, "steps", lambda: _steps_of_thirty_rows())
        layout = Layout.of_few_shapes(examples.needed_lengths)
        assert compiled_shapes(plan, examples, 2048, layout) == [(2, 16, 32)]
        assert len(looked_at) == steps


def _steps_of_thirty_rows() -> Any:
    return Plan(30, batch_size=2, shuffle=False, epochs=1000).steps()
