"""A run fitted to the machine: what is predicted, where it pays measured, chosen, and told.

Knows what a job is made of; knows nothing of steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sft.config import TrainConfig, parse_bytes
from mlx_sft.console import size
from mlx_sft.data.batches import Layout, Plan, Portion, cut, padded_width
from mlx_sft.data.dataset import Examples
from mlx_sft.data.prepare import PreparedData
from mlx_sft.errors import UserError
from mlx_sft.methods import Parameters
from mlx_sft.model.load import resolve_dtype
from mlx_sft.model.outline import outline
from mlx_sft.training.choice import Choice, LongestRow, asked_for, choose_for, most_at_once, no_room
from mlx_sft.training.machine import Machine, this_machine
from mlx_sft.training.memory import Footprint, Prediction, weight_bytes
from mlx_sft.training.probe import Probe, probe
from mlx_sft.training.recompute import Mode
from mlx_sft.training.shortage import OutOfMemory
from mlx_sft.training.step import Learner

_STEPS_LOOKED_AT = 200

_PLENTY = 0.7
"""Where no more than this share of the memory is predicted to be taken, a prediction need not be exact."""


@dataclass(frozen=True)
class Fit:
    """How a run is computed on its machine, and why.

    Attributes:
        layout: How the rows of its micro-batches lie.
        probe: What was measured beforehand; None where nothing was, and `why_no_probe` then says why.
    """

    machine: Machine
    footprint: Footprint
    choice: Choice
    layout: Layout
    probe: Probe | None = None
    why_no_probe: str = ""

    def largest(self, plan: Plan, examples: Examples) -> Prediction:
        """What the largest micro-batch is predicted to take: of the longest row, and of the first steps."""
        return max((self._predicted(*shape) for shape in self._shapes(plan, examples)), key=lambda part: part.peak)

    def describe(self, predicted: Prediction) -> dict[str, Any]:
        """As `environment.json` keeps it."""
        return {
            "limit_bytes": self.machine.memory,
            "limit_is": self.machine.basis,
            "predicted_peak_bytes": predicted.peak,
            "predicted": asdict(predicted),
            "probe": asdict(self.probe) if self.probe else None,
            "no_probe_because": self.why_no_probe or None,
        }

    def _predicted(self, tokens: int, width: int, supervised: int) -> Prediction:
        mode, chunk = self.choice.mode, self.choice.head_chunk
        return self.footprint.predict(mode, tokens, width=width, supervised=supervised, head_chunk=chunk)

    def _shapes(self, plan: Plan, examples: Examples) -> Iterator[tuple[int, int, int]]:
        lengths = examples.needed_lengths
        longest = int(lengths.argmax())
        width = padded_width(int(lengths[longest]), self.layout)
        yield width, width, int(examples.supervised_tokens[longest])
        for step in islice(plan.steps(), _STEPS_LOOKED_AT):
            for micro_batch in cut(step.rows, lengths, self.choice.micro_batch_tokens, self.layout):
                rows = list(micro_batch.rows)
                width = padded_width(int(lengths[rows].max()), self.layout)
                yield micro_batch.tokens, width, int(examples.supervised_tokens[rows].sum())


def planned_steps(config: TrainConfig, data: PreparedData) -> Plan:
    """The steps of a run on this data."""
    return Plan(
        len(data.train),
        batch_size=config.batch_size,
        epochs=config.epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        shuffle=config.shuffle,
        mixture=[Portion(rows, weight) for rows, weight in data.mixture if weight is not None],
    )


def allowed_machine(config: TrainConfig) -> Machine:
    """This machine, with as much memory as the configuration allows; MLX waits rather than go beyond that.

    MLX calls operations ahead of their computation; above its limit it lets them come to an end first.
    """
    machine = within(this_machine(), config)
    mx.set_memory_limit(machine.memory)
    return machine


def hold_to(machine: Machine, predicted: Prediction) -> None:
    """On the CPU, let MLX run ahead of its computation no further than predicted: it takes a third less, in the same time.

    (A limit far below what is needed doubles the time: every operation then waits for the one before it.)
    """
    if machine.backend == "cpu":
        mx.set_memory_limit(min(machine.memory, predicted.limit))


@contextmanager
def memory_limit_restored() -> Iterator[None]:
    """After the block, MLX's limit is again what it was before."""
    before = mx.get_memory_limit()
    try:
        yield
    finally:
        mx.set_memory_limit(before)


def layout_on(machine: Machine, learner: Learner) -> Layout:
    """On a grid where shapes are compiled; else end to end, if the model can be computed so."""
    if machine.compiles:
        return "grid"
    return "joined" if learner.keeps_rows_apart() else "padded"


def within(machine: Machine, config: TrainConfig) -> Machine:
    """A machine with the memory that `memory_limit` allows of it."""
    if config.memory_limit is None:
        return machine
    return replace(machine, memory=parse_bytes(config.memory_limit), basis="--memory-limit")


def refuse_too_large(config: TrainConfig, path: Path, machine: Machine) -> None:
    """Raise `UserError` where the weights alone would not fit, before any of them is read."""
    split = outline(path, resolve_dtype(config.dtype), config.quantize)
    weights = weight_bytes(split)
    if weights > machine.memory:
        raise UserError(
            f"its weights alone take {size(weights)} in {resolve_dtype(config.dtype)}, of {size(machine.memory)}: {machine.basis}",
            where=config.model,
            hint="give a smaller model, --dtype bfloat16, or --memory-limit, if more may be taken",
        )


def fit_to_machine(
    config: TrainConfig,
    machine: Machine,
    footprint: Footprint,
    examples: Examples,
    learner: Learner,
    parameters: Parameters,
    layout: Layout,
) -> Fit:
    """Settings with which the run is predicted to fit; set right by a measurement where it is close.

    Raises:
        UserError: Where the longest row does not fit, or the measurement itself runs out of memory.
    """
    modes, tokens = asked_for(config), config.micro_batch_tokens
    longest = LongestRow.of(examples, layout)
    decided = tokens is not None and len(modes) == 1
    if tokens is not None and not decided:
        whole_step = min(config.batch_size, len(examples)) * longest.tokens
        config = config.model_copy(update={"micro_batch_tokens": min(tokens, whole_step)})
    choice = choose_for(config, footprint, machine.memory, longest, layout)
    if choice is not None and decided:
        return Fit(machine, footprint, choice, layout, why_no_probe="the settings are given")
    if choice is not None and _plenty(footprint, machine, longest.tokens, choice, modes, most_at_once(layout)):
        return Fit(machine, footprint, choice, layout, why_no_probe="there is memory to spare")
    mode = choice.mode if choice else modes[-1]
    if footprint.predict(mode, 1).peak > machine.memory:
        raise no_room(footprint, machine, longest, modes, config)
    most = choice.micro_batch_tokens if choice else footprint.most_tokens(mode, machine.memory, longest.tokens)
    try:
        learner.configure(mode)
        measured = probe(learner, parameters, footprint, max(1, most))
    except OutOfMemory as error:
        raise UserError(
            f"out of memory at a row of {error.shortage.width} tokens: {error.shortage.message}",
            where="memory",
            hint="free some memory, or give a smaller model, --dtype bfloat16 or --grad-checkpoint blocks",
        ) from error
    footprint = footprint.corrected(measured.correction)
    choice = choose_for(config, footprint, machine.memory, longest, layout)
    if choice is None:
        raise no_room(footprint, machine, longest, modes, config)
    return Fit(machine, footprint, choice, layout, probe=measured)


def _plenty(
    footprint: Footprint, machine: Machine, longest: int, choice: Choice, modes: tuple[Mode, ...], most: int
) -> bool:
    """Whether the best settings there are take little enough."""
    tokens = max(longest, choice.micro_batch_tokens)
    best = choice.mode == modes[0] and choice.micro_batch_tokens >= most
    predicted = footprint.predict(choice.mode, tokens, head_chunk=choice.head_chunk)
    return best and predicted.peak <= _PLENTY * machine.memory
