"""How a step is computed: tokens of a micro-batch, recomputation, the head's chunk, the layout of rows, the shapes that are compiled.

Computing again costs time, and so do micro-batches of a few tokens, and of logits. So `choose` takes the mode that computes least
again among those in which some hundred tokens fit at once, and in any case the longest row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice

from mlx_sft.config import TrainConfig
from mlx_sft.data.batches import Layout, MicroBatch, Plan, cut, round_up
from mlx_sft.data.dataset import Examples
from mlx_sft.training.loss import chunk_choices
from mlx_sft.training.machine import Machine
from mlx_sft.training.memory import MODES, Footprint
from mlx_sft.training.recompute import Mode
from mlx_sft.training.step import GradientComputer, Shape

MOST_TOKENS, MOST_JOINED = 2048, 512
"""More at once is no faster. Rows that are padded want a larger budget, so that they are cut by their lengths and not by it."""

ENOUGH_TOKENS = 512
"""From here on products are near their full speed."""

MOST_TRACES = 24
"""At 16 conversations a step, so many serve two micro-batches in five of short pairs, and half of those of chats."""

_TIMES_THAT_PAY = 3
"""Micro-batches of a shape, among those looked at, from which on a trace is worth making: it takes seconds, and is kept to the end."""

_STEPS_LOOKED_AT = 2000

_MARGIN = 0.95
"""A run may take a twentieth more than was predicted."""

_FARTHEST = 2**18


@dataclass(frozen=True)
class BatchSettings:
    """How a step is computed on a machine.

    Attributes:
        micro_batch_tokens: Tokens of a micro-batch at most, padding included; a longer row is computed alone.
        mode: What the backward pass computes again.
        head_chunk: Positions that go through the head at once.
        layout: How the rows of a micro-batch lie.
    """

    micro_batch_tokens: int
    mode: Mode
    head_chunk: int
    layout: Layout = "grid"


def asked_for(config: TrainConfig) -> tuple[Mode, ...]:
    """The modes that a configuration leaves to choose among."""
    if config.grad_checkpoint == "auto":
        return MODES
    return ("layers" if config.grad_checkpoint == "on" else config.grad_checkpoint,)


def configured(mode: Mode) -> str:
    """What `grad_checkpoint` calls a mode."""
    return "on" if mode == "layers" else mode


def most_at_once(layout: Layout) -> int:
    """As many tokens of a micro-batch as pay off."""
    return MOST_JOINED if layout == "joined" else MOST_TOKENS


def choose(
    footprint: Footprint,
    limit: int,
    longest: int,
    *,
    modes: Sequence[Mode] = MODES,
    micro_batch_tokens: int | None = None,
    head_chunk: int | None = None,
    layout: Layout = "grid",
) -> BatchSettings | None:
    """The largest micro-batch that fits, in the first mode in which enough fits; None where the longest row fits in none.

    In each mode the head's chunk is made smaller before the next mode is thought of. Where a person decided over mode and
    micro-batch, there are settings even if too little fits.

    Args:
        limit: Bytes that a run may take in all.
        longest: Tokens of the longest row, as padded.
        modes: To choose among, those that compute least again first.
        micro_batch_tokens, head_chunk: As configured; None to choose.
    """
    chunks = chunk_choices(footprint.columns) if head_chunk is None else (head_chunk,)
    least, most = max(longest, micro_batch_tokens or 0), most_at_once(layout)
    options = [
        BatchSettings(most_tokens(footprint, mode, limit, max(least, most), chunk), mode, chunk, layout)
        for mode in modes
        for chunk in chunks
    ]
    fitting = [option for option in options if option.micro_batch_tokens >= least]
    if micro_batch_tokens is not None:
        if not fitting and len(modes) == 1:
            fitting = options[-1:]
        return replace(fitting[0], micro_batch_tokens=micro_batch_tokens) if fitting else None
    if not fitting:
        return None
    enough = [option for option in fitting if option.micro_batch_tokens >= ENOUGH_TOKENS]
    best = enough[0] if enough else max(fitting, key=lambda option: option.micro_batch_tokens)
    return replace(best, micro_batch_tokens=min(best.micro_batch_tokens, most))


def most_tokens(
    footprint: Footprint, mode: Mode, limit: int, most: int = _FARTHEST, head_chunk: int | None = None
) -> int:
    """So many tokens, in one row, fit within a limit in a mode, with what a prediction may be wrong by; at most `most`.

    Args:
        head_chunk: The smallest that would be chosen where None.
    """
    chunk = chunk_choices(footprint.columns)[-1] if head_chunk is None else head_chunk
    return footprint.most_tokens(mode, int(_MARGIN * limit), most, chunk)


def layout_on(machine: Machine, gradient_computer: GradientComputer) -> Layout:
    """On a grid where shapes are compiled; else joined, if the model can be computed so."""
    if machine.compiles:
        return "grid"
    return "joined" if gradient_computer.keeps_rows_apart() else "padded"


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
