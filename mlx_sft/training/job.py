"""A run that is ready to take its next step: what the loop works on, and what callbacks see of it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console
from mlx_sft.data.prepare import PreparedData
from mlx_sft.data.steps import Plan, Step
from mlx_sft.errors import UserError
from mlx_sft.generate import responses
from mlx_sft.generation_settings import GenerationSettings
from mlx_sft.load import adapted
from mlx_sft.methods import Method, Parameters
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import LoadedModel
from mlx_sft.optimizers import Optimizer
from mlx_sft.run_folder import RunFolder
from mlx_sft.training import checkpoint
from mlx_sft.training.batch_settings import BatchSettings, MemoryPlanner
from mlx_sft.training.callbacks import Callbacks, Record
from mlx_sft.training.checkpoint import Progress, Unfinished
from mlx_sft.training.disk_need import DiskNeed
from mlx_sft.training.failures import is_interrupted, is_out_of_memory, reason
from mlx_sft.training.forgetting import ForgettingMeter
from mlx_sft.training.memory import Prediction
from mlx_sft.training.resume import record_revision
from mlx_sft.training.schedule import learning_rate, planned_steps
from mlx_sft.training.step import GradientComputer
from mlx_sft.training.stopping import StopRequest


@dataclass
class Job:
    """A run that is ready to take its next step; callbacks see it as a `TrainingRun`.

    Attributes:
        memory: How its settings were chosen, and on which machine.
        settings: How its steps are computed now.
        predicted: The parts of its peak, as it was planned.
        disk: What it writes at the most.
        meter: What measures forgetting at an evaluation, if anything.
        unfinished: What follows the last step, while that is under way.
        torn: Whether an update is under way, so that parameters and optimizer are of no step.
    """

    config: TrainConfig
    run: RunFolder
    base: LoadedModel
    split: SplitModel
    method: Method
    gradient_computer: GradientComputer
    plan: Plan
    data: PreparedData
    parameters: Parameters
    optimizer: Optimizer
    callbacks: Callbacks
    identity: dict[str, str]
    progress: Progress
    console: Console
    memory: MemoryPlanner
    settings: BatchSettings
    predicted: Prediction
    disk: DiskNeed
    meter: ForgettingMeter | None = None
    request: StopRequest = field(default_factory=StopRequest)
    stop_reason: str | None = None
    replanned: bool = False
    told_of_no_gradient: bool = False
    unfinished: Unfinished | None = None
    torn: bool = False

    @property
    def finished(self) -> bool:
        """Whether no step is left to take, nor what follows one."""
        ended = self.progress.stopped_of is not None or self.progress.step >= self.plan.total_steps
        return ended and self.progress.unfinished is None

    def learning_rate(self, step: Step) -> float:
        """That of the schedule, or what rollbacks have left of it."""
        return learning_rate(self.config, step.number, self.plan.total_steps) * self.progress.rate_factor

    # As callbacks see it

    @property
    def folder(self) -> RunFolder:
        return self.run

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def total_steps(self) -> int:
        return self.plan.total_steps

    @property
    def model(self) -> nn.Module:
        return self.base.model

    @property
    def tokenizer(self) -> Any:
        return self.base.tokenizer

    def writes(self, token_ids: list[int], most: int, *, base: bool = False) -> Generator[tuple[str, str | None]]:
        if self.gradient_computer.ranks.sharded:
            raise UserError("the base is split among processes, and no process can write alone")
        is_bare = base and self.config.init_adapter is None and self.config.resume_from_peft is None
        loaded = self.base if is_bare else adapted(self.base, self.method, self.run, self.config)
        put_back = self.method.detach(self.model) if is_bare else None
        try:
            with closing(responses(loaded, token_ids, GenerationSettings(max_tokens=most))) as found:
                for response in found:
                    yield response.text, response.finish_reason
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error) or is_interrupted(error):
                raise UserError(f"the model could not write: {reason(error)}", where=str(self.run.path)) from error
            raise
        finally:
            if put_back is not None:
                put_back()

    def emit(self, record: Record) -> None:
        self.callbacks.emit(self, record)

    def stop(self, reason: str) -> None:
        self.stop_reason = reason
        self.progress = self.progress.after(stopped_of=self.plan.total_steps)

    def check_stop(self) -> None:
        self.request.check()

    def shorten(self, total_steps: int) -> None:
        self.config = self.config.model_copy(update={"max_steps": total_steps})
        self.plan = planned_steps(self.config, self.data)
        record_revision(self.run, self.config, self.plan.total_steps)
        self.replanned = True

    def suspect(self, steps: int) -> None:
        self.progress = self.progress.after(suspect=steps)

    def go_back(self, step: int, *, rate_factor: float) -> None:
        checkpoint.remove_after(self.run, step)
        seed = self.config.seed
        expected = self.parameters | self.method.fixed
        progress, kept, states = checkpoint.load(self.run, expected, self.optimizer, self.identity, seed=seed)
        self.parameters = self.method.take_up(kept)
        self.progress = progress.after(rate_factor=rate_factor)
        self.callbacks.load_state(states)
        self.gradient_computer.ranks.hand_out(self.parameters, self.method.fixed, self.optimizer.flat_state())
        self.replanned = True
