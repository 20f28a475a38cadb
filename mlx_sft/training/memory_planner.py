"""The settings with which a run is predicted to fit its machine; where it is close, a small step is measured first.

footprint + machine + longest row ─► MemoryPlanner ─► MemoryPlan with its BatchSettings
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sft.config import TrainConfig
from mlx_sft.console import size
from mlx_sft.data.batches import Batch, Layout, Plan, Portion, cut, padded_width
from mlx_sft.data.dataset import Examples
from mlx_sft.data.prepare import PreparedData
from mlx_sft.errors import UserError
from mlx_sft.methods import Parameters
from mlx_sft.model.load import resolve_dtype
from mlx_sft.model.outline import outline
from mlx_sft.objectives import Weighting
from mlx_sft.registry import OBJECTIVES
from mlx_sft.training.batch_settings import BatchSettings, asked_for, choose, most_at_once, most_tokens
from mlx_sft.training.machine import Machine
from mlx_sft.training.memory import MODES, Footprint, Prediction, weight_bytes
from mlx_sft.training.step import GradientComputer, OutOfMemory

_STEPS_LOOKED_AT = 200
"""So many are looked at for the largest micro-batch."""

_PLENTY = 0.7
"""Where no more than this share of the memory is predicted to be taken, a prediction need not be exact."""

PROBE_TOKENS = 256
"""Enough for what grows with the tokens to stand out from what does not."""

_PROBE_SUPERVISED = 16
"""So few that the layers are measured, and not the logits."""

_TRUSTED = (0.9, 1.5)
"""A small step that takes less than was counted says little of a large one; one that takes much more measured something else."""


@dataclass(frozen=True)
class LongestRow:
    """The row that must fit: tokens that are computed of it, and where it stands."""

    tokens: int
    origin: str

    @classmethod
    def of(cls, examples: Examples, layout: Layout) -> LongestRow:
        row = int(examples.needed_lengths.argmax())
        return cls(padded_width(int(examples.needed_lengths[row]), layout), examples[row].origin)


@dataclass(frozen=True)
class Probe:
    """What a measurement found.

    Attributes:
        correction: Measured bytes for each that was predicted, of those that grow with the tokens.
        seconds: What it took.
    """

    correction: float
    seconds: float


@dataclass(frozen=True)
class MemoryPlan:
    """The settings of a run on its machine, and why they are so.

    Attributes:
        probe: What was measured beforehand; None where nothing was, and `why_no_probe` then says why.
    """

    machine: Machine
    footprint: Footprint
    settings: BatchSettings
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
        mode, chunk = self.settings.mode, self.settings.head_chunk
        return self.footprint.predict(mode, tokens, width=width, supervised=supervised, head_chunk=chunk)

    def _shapes(self, plan: Plan, examples: Examples) -> Iterator[tuple[int, int, int]]:
        lengths, layout = examples.needed_lengths, self.settings.layout
        longest = int(lengths.argmax())
        width = padded_width(int(lengths[longest]), layout)
        yield width, width, int(examples.supervised_tokens[longest])
        for step in islice(plan.steps(), _STEPS_LOOKED_AT):
            for micro_batch in cut(step.rows, lengths, self.settings.micro_batch_tokens, layout):
                rows = list(micro_batch.rows)
                width = padded_width(int(lengths[rows].max()), layout)
                yield micro_batch.tokens, width, int(examples.supervised_tokens[rows].sum())


@dataclass(frozen=True)
class MemoryPlanner:
    """Chooses the settings with which a run is predicted to fit its machine, of those that its configuration leaves open."""

    config: TrainConfig
    machine: Machine
    footprint: Footprint
    longest: LongestRow
    layout: Layout

    def choose(self) -> BatchSettings | None:
        """The settings by prediction alone; None where the longest row does not fit."""
        return choose(
            self.footprint,
            self.machine.memory,
            self.longest.tokens,
            modes=asked_for(self.config),
            micro_batch_tokens=self.config.micro_batch_tokens,
            head_chunk=self.config.head_chunk,
            layout=self.layout,
        )

    def plan(self, gradient_computer: GradientComputer, parameters: Parameters, rows: int) -> MemoryPlan:
        """The settings for a run on so many rows, corrected by a measurement where it is close.

        Raises:
            UserError: Where the longest row does not fit, or the measurement itself runs out of memory.
        """
        given = self.config.micro_batch_tokens
        decided = given is not None and len(asked_for(self.config)) == 1
        planner = self
        if given is not None and not decided:
            whole_step = min(self.config.batch_size, rows) * self.longest.tokens
            config = self.config.model_copy(update={"micro_batch_tokens": min(given, whole_step)})
            planner = replace(self, config=config)
        settings = planner.choose()
        if settings is not None and decided:
            return MemoryPlan(self.machine, self.footprint, settings, why_no_probe="the settings are given")
        if settings is not None and self._has_plenty(settings):
            return MemoryPlan(self.machine, self.footprint, settings, why_no_probe="there is memory to spare")
        measured = planner._measured(gradient_computer, parameters, settings)
        planner = replace(planner, footprint=self.footprint.corrected(measured.correction))
        settings = planner.choose()
        if settings is None:
            raise planner.refusal()
        return MemoryPlan(self.machine, planner.footprint, settings, probe=measured)

    def refusal(self) -> UserError:
        """What to say where the longest row does not fit: how long a row may be, and the ways out."""
        footprint, memory, modes = self.footprint, self.machine.memory, asked_for(self.config)
        fits = max(most_tokens(footprint, mode, memory) for mode in modes)
        of = f"{size(memory)}: {self.machine.basis}"
        ways = [f"--max-length {fits}"] if fits >= 2 else ["a smaller model"]
        if len(modes) < len(MODES):
            ways.append("--grad-checkpoint auto")
        if footprint.itemsize > 2:
            ways.append("--dtype bfloat16")
        if footprint.trains_weights:
            ways.append("--method lora")
        ways.append("--memory-limit, if more may be taken")
        hint = f"give {', '.join(ways[:-1])} or {ways[-1]}"
        if fits < 2:
            need = size(footprint.predict(modes[-1], 1).peak)
            return UserError(
                f"the model and what is trained take {need} before any row ({of})", where="memory", hint=hint
            )
        what = f"{self.longest.tokens} tokens, and no more than {fits} fit ({of})"
        return UserError(what, where=self.longest.origin, hint=hint)

    def _has_plenty(self, settings: BatchSettings) -> bool:
        """Whether the best settings there are take little enough."""
        tokens = max(self.longest.tokens, settings.micro_batch_tokens)
        is_first_mode = settings.mode == asked_for(self.config)[0]
        predicted = self.footprint.predict(settings.mode, tokens, head_chunk=settings.head_chunk)
        return (
            is_first_mode
            and settings.micro_batch_tokens >= most_at_once(self.layout)
            and predicted.peak <= _PLENTY * self.machine.memory
        )

    def _measured(
        self, gradient_computer: GradientComputer, parameters: Parameters, settings: BatchSettings | None
    ) -> Probe:
        """A measurement with the settings, or with those that take least."""
        mode, memory = settings.mode if settings else asked_for(self.config)[-1], self.machine.memory
        if self.footprint.predict(mode, 1).peak > memory:
            raise self.refusal()
        most = (
            settings.micro_batch_tokens if settings else self.footprint.most_tokens(mode, memory, self.longest.tokens)
        )
        try:
            gradient_computer.configure(mode)
            return probe(gradient_computer, parameters, self.footprint, max(1, most))
        except OutOfMemory as error:
            raise UserError(
                f"out of memory at a row of {error.too_large.width} tokens: {error.too_large.message}",
                where="memory",
                hint="free some memory, or give a smaller model, --dtype bfloat16 or --grad-checkpoint blocks",
            ) from error


def refuse_too_large(config: TrainConfig, path: Path, machine: Machine) -> None:
    """Raise `UserError` where the weights alone would not fit, before any of them is read."""
    dtype = resolve_dtype(config.dtype)
    weights = weight_bytes(outline(path, dtype, config.quantize))
    if weights > machine.memory:
        raise UserError(
            f"its weights alone take {size(weights)} in {dtype}, of {size(machine.memory)}: {machine.basis}",
            where=config.model,
            hint="give a smaller model, --dtype bfloat16, or --memory-limit, if more may be taken",
        )


def probe(gradient_computer: GradientComputer, parameters: Parameters, footprint: Footprint, tokens: int) -> Probe:
    """Measure the peak of a small micro-batch of one row; nothing is updated or written, and no random number drawn.

    Args:
        tokens: Of the row, at most; `PROBE_TOKENS` are enough.
    """
    started = time.perf_counter()
    length = min(tokens, PROBE_TOKENS)
    predicted = footprint.predict(gradient_computer.mode, length, supervised=min(length, _PROBE_SUPERVISED))
    expected = max(1, predicted.kept + predicted.passing)
    before, limit = mx.get_active_memory(), mx.get_memory_limit()
    mx.reset_peak_memory()
    if footprint.held:
        mx.set_memory_limit(before + predicted.limit - predicted.weights - predicted.trained)
    try:
        row = _one_row(length)
        gradient_computer.gradient(parameters, [row], weighting=Weighting([row.weights], len(row.weights)))
    finally:
        mx.set_memory_limit(limit)
    correction = (mx.get_peak_memory() - before) / expected
    low, high = _TRUSTED
    return Probe(min(high, max(low, correction)), time.perf_counter() - started)


def _one_row(length: int) -> Batch:
    """A row of one token over and over."""
    positions = np.arange(length, dtype=np.int32)[-_PROBE_SUPERVISED:]
    return Batch(
        token_ids=np.zeros((1, length), np.int32),
        positions=positions,
        targets=np.zeros(len(positions), np.int32),
        weights=np.ones(len(positions), np.float32),
        tokens=length,
        needed_tokens=length,
    )


def planned_steps(config: TrainConfig, data: PreparedData) -> Plan:
    """The steps of a run on this data."""
    together, counts = None, [examples for examples, _ in data.mixture]
    if OBJECTIVES[config.objective].compares:
        together = data.train.by_row()
        of_source = np.searchsorted(np.cumsum(counts), [examples[0] for examples in together], side="right")
        counts = np.bincount(of_source, minlength=len(counts)).tolist()
    weights = [weight for _, weight in data.mixture]
    return Plan(
        sum(counts),
        batch_size=config.batch_size,
        epochs=config.epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        shuffle=config.shuffle,
        mixture=[Portion(rows, weight) for rows, weight in zip(counts, weights, strict=True) if weight is not None],
        together=together,
    )
