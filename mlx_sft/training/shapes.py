"""The shapes of micro-batches for which a step is compiled. There are to be few: `mx.compile` makes a trace for each, and keeps it.

rows × width of few widths (`Layout`) ─► supervised positions of two numbers each ─► the most frequent of them
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection
from itertools import islice

from mlx_sft.data.batches import Batch, Layout, cut_step, levels, round_up
from mlx_sft.data.dataset import Examples
from mlx_sft.data.steps import Plan

Shape = tuple[int, int, int]
"""Rows, width and supervised positions of a micro-batch: what a compiled trace is for."""

MOST_TRACES = 64
"""At 16 widths and 8 or 16 conversations a step, so many serve 94 % of the micro-batches of short pairs, and all of those of chats."""

_LEVELS = 2
"""Supervised positions that a micro-batch of some rows and width is padded to: one or the other number."""

_TIMES_THAT_PAY = 3
"""Micro-batches of a shape, among those looked at, from which on a trace is worth making: it takes seconds, and is kept to the end."""

_STEPS_LOOKED_AT = 2000


def compiled_shapes(plan: Plan, examples: Examples, token_budget: int, layout: Layout) -> list[Shape]:
    """Those that pay for their traces: the most frequent ones of the first 2,000 steps of the first epoch. None of rows of any width."""
    if not layout.widths:
        return []
    positions: dict[tuple[int, int], list[int]] = {}
    for step in islice(plan.steps(), min(plan.steps_per_epoch, _STEPS_LOOKED_AT)):
        for micro_batch in cut_step(step.rows, examples, token_budget, layout):
            supervised = round_up(int(examples.supervised_tokens[list(micro_batch.rows)].sum()))
            positions.setdefault((len(micro_batch.rows), micro_batch.width), []).append(supervised)
    shapes: Counter[Shape] = Counter()
    for (rows, width), found in positions.items():
        padded = levels(found, _LEVELS)
        shapes.update((rows, width, padded[bisect_left(padded, supervised)]) for supervised in found)
    frequent = sorted(shapes.items(), key=lambda item: (-item[1], item[0]))
    return [shape for shape, times in frequent[:MOST_TRACES] if times >= _TIMES_THAT_PAY]


def padded_shape(batch: Batch) -> Shape:
    """The shape of a micro-batch with its supervised positions rounded up to the grid."""
    rows, width = batch.token_ids.shape
    return rows, width, round_up(len(batch.targets))


def compiled_shape(batch: Batch, compiled: Collection[Shape]) -> Shape | None:
    """The smallest of the compiled shapes that a micro-batch can take; None for rows end to end, which lie elsewhere the next time."""
    rows_and_width, positions = batch.token_ids.shape, len(batch.targets)
    fitting = [shape for shape in compiled if shape[:2] == rows_and_width and shape[2] >= positions]
    return None if batch.spans else min(fitting, default=None)
