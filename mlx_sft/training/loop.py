"""The training loop. Every decision was made before it; here steps are taken, evaluated, and saved."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console
from mlx_sft.data.batches import Step
from mlx_sft.data.feed import StepFeed
from mlx_sft.errors import UserError
from mlx_sft.training.machine import memory_limit_restored
from mlx_sft.training.optimizer_step import train_step
from mlx_sft.training.preview import show_plan
from mlx_sft.training.records import Metrics
from mlx_sft.training.results import finish, save
from mlx_sft.training.rollback import answer_divergence
from mlx_sft.training.setup import Job, prepare_job
from mlx_sft.training.step import is_out_of_memory
from mlx_sft.training.stopping import Stopped, stop_request
from mlx_sft.training.validation import evaluate

_MOST_SKIPPED = 5
"""Steps in a row without a finite gradient after which a run stops."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        run_dir: Its folder.
        steps: Optimizer steps taken in all.
        loss: Training loss of the last step; None where it was skipped, or nothing was left to do.
        best_loss: Lowest validation loss; None without validation rows.
        skipped: Steps left out because loss or gradient was not finite.
    """

    run_dir: Path
    steps: int
    loss: float | None
    best_loss: float | None
    skipped: int


def train(config: TrainConfig) -> TrainResult:
    """Fine-tune a model as configured, or continue a run (`config.resume`) exactly where it stopped.

    Raises:
        UserError: For anything in data, model or configuration that cannot be; earlier results stay as they are.
    """
    console = Console(quiet=config.quiet, json_lines=config.json_lines)
    with memory_limit_restored(), ExitStack() as held:
        job = prepare_job(config, console, held)
        show_plan(job)
        with stop_request() as job.request, _ended_in_words(job):
            loss = _take_steps(job, console)
            finish(job)
    if traces := job.gradient_computer.trace_seconds:
        shapes = "1 shape" if len(traces) == 1 else f"{len(traces)} shapes"
        console.note(f"{shapes} compiled; first runs took {sum(traces):.0f} s in all")
    progress = job.progress
    return TrainResult(job.run.path, progress.step, loss, progress.best_loss, progress.skipped)


def _take_steps(job: Job, console: Console) -> float | None:
    """All that are left; the training loss of the last of them is returned."""
    loss = None
    with Metrics.open(job.run.metrics, job.progress.metrics_bytes) as metrics, _saved_when_stopped(job, metrics):
        if _begins_with_a_checkpoint(job.config) and not job.run.checkpoint_steps():
            save(job, metrics)
        while job.progress.stopped_of is None and job.progress.step < job.plan.total_steps:
            loss = _take_steps_from_here(job, console, metrics)
    return loss


def _take_steps_from_here(job: Job, console: Console, metrics: Metrics) -> float | None:
    """As many as there are up to the end, or to where the run goes back to an earlier one."""
    loss = None
    started, first = time.perf_counter(), job.progress.step
    with _steps_left(job) as steps:
        for prepared in steps:
            step = prepared.step
            record = train_step(job, prepared, steps, metrics)
            loss = record["loss"]
            metrics.write(record)
            per_step = (time.perf_counter() - started) / (step.number - first)
            console.step(record, job.plan.total_steps, per_step * (job.plan.total_steps - step.number))
            if answer_divergence(job, metrics):
                break
            if job.data.valid and _due(job.config.eval_every, step, job):
                evaluate(job, step, metrics)
            stopped = job.progress.stopped_of is not None
            if stopped or _due(job.config.save_every, step, job):
                save(job, metrics)
            _stop_if_lost(job, step, metrics)
            if stopped:
                console.note(f"stopped after step {step.number}: validation got no better")
                break
    return loss


def _begins_with_a_checkpoint(config: TrainConfig) -> bool:
    """Where a resumed run must not depend on a folder that others may change, or there must be something to go back to."""
    started_elsewhere = config.init_adapter is not None or config.resume_from_peft is not None
    return started_elsewhere or config.on_divergence == "rollback"


def _steps_left(job: Job) -> StepFeed:
    return StepFeed(
        job.plan,
        job.data.train,
        after=job.progress.step,
        token_budget=job.settings.micro_batch_tokens,
        layout=job.settings.layout,
    )


def _due(every: int | str, step: Step, job: Job) -> bool:
    """Whether something that happens every so often, and always after the last step, happens after this one."""
    last = step.number == job.plan.total_steps
    return last or (step.ends_epoch if every == "epoch" else step.number % int(every) == 0)


def _stop_if_lost(job: Job, step: Step, metrics: Metrics) -> None:
    if job.progress.skipped_in_a_row < _MOST_SKIPPED:
        return
    save(job, metrics)
    raise UserError(
        f"{_MOST_SKIPPED} steps in a row had no finite gradient, the last of them step {step.number}; "
        "the last good state is saved",
        where=str(job.run.path),
        hint="lower --lr, look at the rows named above, or train with --dtype float32",
    )


@contextmanager
def _saved_when_stopped(job: Job, metrics: Metrics) -> Iterator[None]:
    """A run that is asked to stop ends with a checkpoint of its last step, and with the command that goes on."""
    try:
        yield
    except Stopped as stopped:
        if job.progress.step not in job.run.checkpoint_steps():
            save(job, metrics)
        raise UserError(
            f"stopped by {stopped} after step {job.progress.step}, which is saved",
            hint=f"continue with: mlx-sft train --resume {job.run.path}",
            exit_code=128 + stopped.number,
        ) from None


@contextmanager
def _ended_in_words(job: Job) -> Iterator[None]:
    """A machine without memory ends a run with what to do next; the live line is left as it stands."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory after step {job.progress.step}: {error}; {_saved(job)}",
            where=str(job.run.path),
            hint="free some memory, or give a smaller --micro-batch-tokens, and go on with --resume",
        ) from error
    finally:
        job.console.stop()


def _saved(job: Job) -> str:
    saved = job.run.checkpoint_steps()
    return f"the newest checkpoint is of step {saved[-1]}" if saved else "there is no checkpoint yet"
