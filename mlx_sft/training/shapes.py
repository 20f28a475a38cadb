"""The shapes of micro-batches, and which of them are compiled: those that a run meets most often, and no more than 24.

A compiled trace serves one shape alone, takes seconds to make, and is kept to the end. At 16 conversations a step, 24 of them serve
two micro-batches in five of short pairs, and half of those of chats; the others run as they are. Knows nothing of models.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice

from mlx_sft.data.batches import Batch, MicroBatch, Plan, cut, round_up
from mlx_sft.data.dataset import Examples
from mlx_sft.training.machine import Machine

Shape = tuple[int, int, int]
"""Rows, width and supervised positions of a micro-batch: what a compiled trace is for."""

MOST_TRACES = 24
_STEPS_LOOKED_AT = 2000
_TIMES_THAT_PAY = 3
"""Micro-batches of a shape, among those looked at, from which on a trace is worth making."""


def padded_shape(batch: Batch) -> Shape:
    """The shape of a micro-batch with its supervised positions rounded up to the grid."""
    rows, width = batch.token_ids.shape
    return rows, width, round_up(len(batch.targets))


def planned_shape(examples: Examples, micro_batch: MicroBatch) -> Shape:
    """`padded_shape` of the batch that `collate` would make, without making it."""
    supervised = int(examples.supervised_tokens[list(micro_batch.rows)].sum())
    return len(micro_batch.rows), micro_batch.width, round_up(supervised)


def compiled_shapes(machine: Machine, plan: Plan, examples: Examples, token_budget: int) -> list[Shape]:
    """Those that pay for their traces on a machine."""
    return frequent_shapes(plan, examples, token_budget) if machine.compiles else []


def frequent_shapes(plan: Plan, examples: Examples, token_budget: int) -> list[Shape]:
    """The most frequent shapes of the first epoch, or of the first 2,000 steps of a long one, most frequent first."""
    lengths = examples.needed_lengths
    shapes: Counter[Shape] = Counter()
    for step in islice(plan.steps(), min(plan.steps_per_epoch, _STEPS_LOOKED_AT)):
        shapes.update(planned_shape(examples, micro_batch) for micro_batch in cut(step.rows, lengths, token_budget))
    frequent = sorted(shapes.items(), key=lambda item: (-item[1], item[0]))
    return [shape for shape, times in frequent[:MOST_TRACES] if times >= _TIMES_THAT_PAY]
