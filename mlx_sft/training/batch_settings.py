"""How a step is computed: tokens of a micro-batch, recomputation, the head's chunk, the layout of rows.

    footprint + machine + longest row ─► MemoryPlanner ─► BatchSettings

Computing again costs time, and so do micro-batches of a few tokens, and of logits. So `choose` takes the mode that computes least
again among those in which some hundred tokens fit at once, and in any case the longest row. Where it is close, a small step is measured
first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sft.config import TrainConfig
from mlx_sft.console import size
from mlx_sft.data.batches import JOINED, PADDED, Layout, MicroBatch, collate, cut_step
from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Example
from mlx_sft.data.steps import Plan
from mlx_sft.errors import UserError
from mlx_sft.methods import Parameters
from mlx_sft.model.load import resolve_dtype
from mlx_sft.objectives import Weighting
from mlx_sft.registry import OBJECTIVES
from mlx_sft.training.failures import GPU_HINT, Interrupted, OutOfMemory
from mlx_sft.training.machine import Machine, memory_limits_restored
from mlx_sft.training.memory import MODES, Footprint, Prediction
from mlx_sft.training.recompute import Mode
from mlx_sft.training.step import GradientComputer

MOST_TOKENS, MOST_JOINED = 2048, 512
"""More at once is no faster. Rows that are padded want a larger budget, so that they are cut by their lengths and not by it."""

ENOUGH_TOKENS = 512
"""From here on products are near their full speed."""

_MARGIN = 0.95
"""A run may take a twentieth more than was predicted."""

_FARTHEST = 2**18

_STEPS_PREDICTED = 200
"""So many are looked at for the largest micro-batch."""

_PLENTY = 0.7
"""Where no more than this share of the memory is predicted to be taken, a prediction need not be exact."""

PROBE_TOKENS = 256
"""Enough for what grows with the tokens to stand out from what does not."""

_PROBE_SUPERVISED = 16
"""So few that the layers are measured, and not the logits."""

TRUSTED = (0.9, 1.5)
"""A small step that takes less than was counted says little of a large one; one that takes much more measured something else."""


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
    layout: Layout = PADDED


def any_of(ways: Sequence[str]) -> str:
    """The ways out, as a hint names them."""
    return f"give {', '.join(ways[:-1])} or {ways[-1]}"


def asked_for(config: TrainConfig) -> tuple[Mode, ...]:
    """The modes that a configuration leaves to choose among."""
    if config.grad_checkpoint == "auto":
        return MODES
    return ("layers" if config.grad_checkpoint == "on" else config.grad_checkpoint,)


def configured(mode: Mode) -> str:
    """What `grad_checkpoint` calls a mode."""
    return "on" if mode == "layers" else mode


def decided(config: TrainConfig, settings: BatchSettings) -> TrainConfig:
    """Every `auto` replaced by what it stands for here, so that a resumed run repeats it to the byte."""
    decided = {
        "dtype": resolve_dtype(config.dtype),
        "micro_batch_tokens": settings.micro_batch_tokens,
        "grad_checkpoint": configured(settings.mode),
        "head_chunk": settings.head_chunk,
    }
    return config.model_copy(update=decided)


def layout_on(
    machine: Machine, gradient_computer: GradientComputer, parameters: Parameters, examples: Examples
) -> Layout:
    """Of few shapes where they are compiled; else joined, if the model can be computed so, and what is compared then shares its prompt."""
    in_front = gradient_computer.virtual_tokens
    if machine.compiles:
        return replace(Layout.of_few_shapes(examples.needed_lengths), in_front=in_front)
    if in_front:  # which rows that are joined would have in front of the first of them alone
        return replace(PADDED, in_front=in_front)
    if not gradient_computer.keeps_rows_apart(parameters):
        return PADDED
    compares = gradient_computer.objective.compares
    return replace(JOINED, shares=compares and gradient_computer.keeps_rows_apart(parameters, shared=True))


# By prediction


def choose(
    footprint: Footprint,
    limit: int,
    longest: int,
    *,
    modes: Sequence[Mode] = MODES,
    micro_batch_tokens: int | None = None,
    head_chunk: int | None = None,
    layout: Layout = PADDED,
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
    chunks = footprint.chunks if head_chunk is None else (head_chunk,)
    least, most = max(longest, micro_batch_tokens or 0), _most_at_once(layout)
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
    chunk = footprint.chunks[-1] if head_chunk is None else head_chunk
    return footprint.most_tokens(mode, int(_MARGIN * limit), most, chunk)


def _most_at_once(layout: Layout) -> int:
    """As many tokens of a micro-batch as pay off."""
    return MOST_JOINED if layout.joined else MOST_TOKENS


def predicted_peak(footprint: Footprint, settings: BatchSettings, plan: Plan, examples: Examples) -> Prediction:
    """What the largest micro-batch is predicted to take: of the longest row, and of the first steps."""
    lengths, layout = examples.needed_lengths, settings.layout
    longest = int(lengths.argmax())
    micro_batches = [MicroBatch((longest,), layout.width_of(int(lengths[longest])))]
    for step in islice(plan.steps(), _STEPS_PREDICTED):
        micro_batches += cut_step(step.rows, examples, settings.micro_batch_tokens, layout)

    def predicted(micro_batch: MicroBatch) -> Prediction:
        rows = list(micro_batch.rows)
        width, supervised = layout.width_of(int(lengths[rows].max())), int(examples.supervised_tokens[rows].sum())
        chunk = settings.head_chunk
        return footprint.predict(
            settings.mode, micro_batch.tokens, width=width, supervised=supervised, head_chunk=chunk
        )

    return max(map(predicted, micro_batches), key=lambda prediction: prediction.peak)


# With a measurement


@dataclass(frozen=True)
class LongestRow:
    """The row that must fit: tokens that are computed of it, and where it stands."""

    tokens: int
    origin: str

    @classmethod
    def of(cls, examples: Examples, layout: Layout) -> LongestRow:
        row = int(examples.needed_lengths.argmax())
        return cls(layout.width_of(int(examples.needed_lengths[row])), examples[row].origin)


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
class MemoryPlanner:
    """Chooses the settings with which a run is predicted to fit its machine, of those that its configuration leaves open.

    Attributes:
        ways_out: What would fit where this does not, each with its figure; where None, the ways are named without.
        probe: What was measured; None where nothing was, and `why_no_probe` then says why. Where that is given, nothing is.
    """

    config: TrainConfig
    machine: Machine
    footprint: Footprint
    longest: LongestRow
    layout: Layout
    ways_out: Callable[[MemoryPlanner], Sequence[str]] | None = field(default=None, compare=False)
    probe: Probe | None = None
    why_no_probe: str = ""

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

    def plan(
        self, gradient_computer: GradientComputer, parameters: Parameters, rows: int
    ) -> tuple[MemoryPlanner, BatchSettings]:
        """The settings for a run on so many rows, corrected by a measurement where it is close; and the planner that knows of it.

        Raises:
            UserError: Where the longest row does not fit, or the measurement itself runs out of memory.
        """
        given, planner = self.config.micro_batch_tokens, self
        if given is not None and len(asked_for(self.config)) > 1:  # a mode in which a whole step fits is weak enough
            kind = OBJECTIVES[self.config.objective]
            texts = 2 if kind.compares or kind.labelled else 1
            whole_step = min(texts * self.config.batch_size, rows) * self.longest.tokens
            config = self.config.model_copy(update={"micro_batch_tokens": min(given, whole_step)})
            planner = replace(self, config=config)
        settings = planner.choose()
        if settings is None and planner.why_no_probe:
            raise planner.refusal()
        if settings is not None and (why := planner.why_no_probe or planner._why_no_probe(settings)):
            return replace(planner, why_no_probe=why), settings
        probe = planner._measured(gradient_computer, parameters, settings)
        planner = replace(planner, footprint=replace(self.footprint, correction=probe.correction), probe=probe)
        settings = planner.choose()
        if settings is None:
            raise planner.refusal()
        return planner, settings

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

    def refusal(self) -> UserError:
        """What to say where the longest row does not fit: how long a row may be, and the ways out."""
        footprint, memory, modes = self.footprint, self.machine.memory, asked_for(self.config)
        fits = max(most_tokens(footprint, mode, memory) for mode in modes)
        of = f"{size(memory)}: {self.machine.basis}"
        ways = list(self.ways_out(self)) if self.ways_out else self._unpredicted_ways()
        if shorter := self._shorter(fits):
            least = min(footprint.predict(mode, shorter).peak for mode in modes)
            ways.insert(0, f"--max-length {shorter} (takes {size(least)})")
        elif not ways:
            ways = ["a smaller model"]
        hint = any_of([*ways, "--memory-limit, if more may be taken"])
        if fits < 2:
            need = size(footprint.predict(modes[-1], 1).peak)
            return UserError(
                f"the model and what is trained take {need} before any row ({of})", where="memory", hint=hint
            )
        what = f"{self.longest.tokens} tokens, and no more than {fits} fit ({of})"
        return UserError(what, where=self.longest.origin, hint=hint)

    def _shorter(self, fits: int) -> int:
        """The longest row that takes no more than so many tokens as it is padded; 0 where none does."""
        if not self.layout.widths:
            return fits if fits >= 2 else 0
        return next((n for n in range(fits, 1, -1) if Layout.of_few_shapes([n]).width_of(n) <= fits), 0)

    def _unpredicted_ways(self) -> list[str]:
        ways = ["--grad-checkpoint auto"] if len(asked_for(self.config)) < len(MODES) else []
        if self.footprint.itemsize > 2:
            ways.append("--dtype bfloat16")
        if self.footprint.trains_weights:
            ways.append("--method lora")
        return [*ways, "a smaller model"]

    def _why_no_probe(self, settings: BatchSettings) -> str:
        """Why a measurement could change nothing; empty where it could."""
        modes, most = asked_for(self.config), _most_at_once(self.layout)
        if self.config.micro_batch_tokens is not None and len(modes) == 1:
            return "the settings are given"
        tokens = max(self.longest.tokens, settings.micro_batch_tokens)
        predicted = self.footprint.predict(settings.mode, tokens, head_chunk=settings.head_chunk)
        best_there_are = settings.mode == modes[0] and settings.micro_batch_tokens >= most
        plenty = predicted.peak <= _PLENTY * self.machine.memory
        return "there is memory to spare" if best_there_are and plenty else ""

    def _measured(
        self, gradient_computer: GradientComputer, parameters: Parameters, settings: BatchSettings | None
    ) -> Probe:
        """The peak of a small micro-batch of one row, computed with the settings or else with those that take least.

        Nothing is updated or written, and no random number drawn.
        """
        footprint, memory = self.footprint, self.machine.memory
        mode = settings.mode if settings else asked_for(self.config)[-1]
        if footprint.predict(mode, 1).peak > memory:
            raise self.refusal()
        most = settings.micro_batch_tokens if settings else footprint.most_tokens(mode, memory, self.longest.tokens)
        length = self.layout.width_of(max(1, min(most, PROBE_TOKENS)))
        supervised = min(length, _PROBE_SUPERVISED)
        predicted = footprint.predict(mode, length, supervised=supervised)
        loss_weights = np.zeros(length + 1, np.float32)
        loss_weights[-supervised:] = 1
        row = Example("a row of one token over and over", np.zeros(length + 1, np.int32), loss_weights)
        batch = collate([row], MicroBatch((0,), length))
        started, before = time.perf_counter(), mx.get_active_memory()
        mx.reset_peak_memory()
        try:
            with memory_limits_restored():
                if footprint.held:
                    mx.set_memory_limit(before + predicted.limit - predicted.weights - predicted.trained)
                gradient_computer.configure(mode)
                gradient_computer.gradient(parameters, [batch], weighting=Weighting([batch.weights], supervised))
        except OutOfMemory as error:
            raise UserError(
                f"out of memory at a row of {error.batch.width} tokens: {error.batch.message}",
                where="memory",
                hint="free some memory, or give a smaller model, --dtype bfloat16 or --grad-checkpoint blocks",
            ) from error
        except Interrupted as error:
            raise UserError(f"the system took the GPU away: {error}", where="memory", hint=GPU_HINT) from error
        correction = (mx.get_peak_memory() - before) / max(1, predicted.kept + predicted.passing)
        low, high = TRUSTED
        return Probe(min(high, max(low, correction)), time.perf_counter() - started)
