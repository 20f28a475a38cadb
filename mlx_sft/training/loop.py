"""The training loop. Every decision was made before it; here steps are taken, measured, evaluated and saved."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console
from mlx_sft.convert.trained import save_trained, trained_folder
from mlx_sft.data.batches import Step, cut, cut_all
from mlx_sft.errors import INTERRUPTED, UserError
from mlx_sft.model.load import name_elsewhere
from mlx_sft.runs import disk_errors, sync, write_file
from mlx_sft.training import checkpoint
from mlx_sft.training.card import model_card
from mlx_sft.training.optim import clip, global_norm, learning_rate
from mlx_sft.training.preview import show_plan
from mlx_sft.training.setup import Job, prepare_job
from mlx_sft.training.step import to_float

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
    job = prepare_job(config, console)
    show_plan(job)
    loss = None
    with _interruptible(job), _metrics(job) as metrics:
        if job.config.init_adapter and not job.run.checkpoint_steps():
            _save(job, metrics)  # so that a resumed run does not depend on a folder that others may change
        started, first = time.perf_counter(), job.progress.step
        remaining = () if job.progress.stopped else job.plan.steps(after=first)
        for step in remaining:
            record = _take(job, step)
            loss = record["loss"]
            _write(metrics, record)
            per_step = (time.perf_counter() - started) / (step.number - first)
            console.step(record, job.plan.total_steps, per_step * (job.plan.total_steps - step.number))
            if job.data.valid and _due(job.config.eval_every, step, job):
                _evaluate(job, step, metrics)
            if job.progress.stopped or _due(job.config.save_every, step, job):
                _save(job, metrics)
            _stop_if_lost(job, step, metrics)
            if job.progress.stopped:
                console.note(f"stopped after step {step.number}: validation got no better")
                break
    _finish(job)
    progress = job.progress
    return TrainResult(job.run.path, progress.step, loss, progress.best_loss, progress.skipped)


def _take(job: Job, step: Step) -> dict[str, Any]:
    """One optimizer step: the job's parameters and progress move on; the record of it is returned."""
    config, started = job.config, time.perf_counter()
    micro_batches = cut(step.rows, job.lengths, job.micro_batch_tokens)
    key = checkpoint.dropout_key(config.seed, step.number) if config.dropout else None
    loss, gradients = job.learner.gradient(job.parameters, job.data.train, micro_batches, key)
    norm = global_norm(gradients)
    mx.eval(norm)
    finite = math.isfinite(to_float(loss)) and math.isfinite(to_float(norm))
    rate = learning_rate(config, step.number, job.plan.total_steps)
    if finite:
        gradients = clip(gradients, norm, config.max_grad_norm)
        job.parameters = job.optimizer.update(job.parameters, gradients, rate)
    del gradients  # so that the update can take their place
    mx.eval(job.parameters, job.optimizer.state)
    seconds = time.perf_counter() - started
    rows = list(step.rows)
    tokens = int(job.data.train.lengths[rows].sum())
    record: dict[str, Any] = {
        "kind": "train",
        "step": step.number,
        "epoch": round(step.epoch, 6),
        "loss": to_float(loss) if finite else None,
        "learning_rate": rate,
        "grad_norm": to_float(norm) if finite else None,
        "tokens": tokens,
        "supervised_tokens": int(job.data.train.supervised_tokens[rows].sum()),
        "tokens_per_second": round(tokens / seconds, 2),
        "peak_memory_bytes": mx.get_peak_memory(),
        "seconds": round(seconds, 4),
    }
    skipped = 0 if finite else 1
    if skipped:
        record["skipped_rows"] = [job.data.train[row].origin for row in rows]
        origins = ", ".join(record["skipped_rows"])
        job.console.warn(f"step {step.number} skipped, its gradient is not finite; rows {origins}")
    job.progress = job.progress.after(
        step=step.number,
        skipped=job.progress.skipped + skipped,
        skipped_in_a_row=job.progress.skipped_in_a_row + 1 if skipped else 0,
    )
    return record


def _evaluate(job: Job, step: Step, metrics: FileIO) -> None:
    """Loss over the whole validation set; the best parameters so far become the run's result."""
    started = time.perf_counter()
    micro_batches = cut_all(job.data.valid.needed_lengths, job.micro_batch_tokens, job.config.batch_size)
    result = job.learner.evaluate(job.parameters, job.data.valid, micro_batches)
    seconds = time.perf_counter() - started
    best_loss = job.progress.best_loss
    better = math.isfinite(result.loss) and (best_loss is None or result.loss < best_loss)
    record = {
        "kind": "evaluation",
        "step": step.number,
        "epoch": round(step.epoch, 6),
        "loss": result.loss if math.isfinite(result.loss) else None,
        "perplexity": math.exp(min(result.loss, 700)) if math.isfinite(result.loss) else None,
        "token_accuracy": result.token_accuracy,
        "best": better,
        "learning_rate": learning_rate(job.config, step.number, job.plan.total_steps),
        "grad_norm": None,
        "tokens": result.tokens,
        "supervised_tokens": result.supervised_tokens,
        "tokens_per_second": round(result.tokens / seconds, 2),
        "peak_memory_bytes": mx.get_peak_memory(),
        "seconds": round(seconds, 4),
    }
    _write(metrics, record)
    job.console.evaluation(record)
    if better:
        job.progress = job.progress.after(best_loss=result.loss, best_step=step.number, evaluations_without_better=0)
        _save_result(job, trained_folder(job.run, job.method))
    else:
        without = job.progress.evaluations_without_better + 1
        stopped = job.config.early_stop is not None and without >= job.config.early_stop
        job.progress = job.progress.after(evaluations_without_better=without, stopped=stopped)


def _due(every: int | str, step: Step, job: Job) -> bool:
    """Whether something that happens every so often, and always after the last step, happens after this one."""
    last = step.number == job.plan.total_steps
    return last or (step.ends_epoch if every == "epoch" else step.number % int(every) == 0)


def _save(job: Job, metrics: FileIO) -> None:
    with disk_errors(job.run.metrics):
        sync(metrics.fileno())
    job.progress = job.progress.after(metrics_bytes=metrics.tell())
    checkpoint.save(job.run, job.progress, job.parameters, job.optimizer, job.identity, seed=job.config.seed)
    checkpoint.prune(job.run, job.config.keep)
    if job.progress.best_step is None:
        _save_result(job, trained_folder(job.run, job.method))


def _stop_if_lost(job: Job, step: Step, metrics: FileIO) -> None:
    if job.progress.skipped_in_a_row < _MOST_SKIPPED:
        return
    _save(job, metrics)
    raise UserError(
        f"{_MOST_SKIPPED} steps in a row had no finite gradient, the last of them step {step.number}; "
        "the last good state is saved",
        where=str(job.run.path),
        hint="lower --lr, look at the rows named above, or train with --dtype float32",
    )


def _finish(job: Job) -> None:
    """The run's result in its place: the best by validation loss, else the last; and the last beside it.

    A run that was killed after its last checkpoint may lack any of it.
    """
    best = job.progress.best_step
    checkpoint.prune(job.run, job.config.keep)
    if best is None:
        _save_result(job, trained_folder(job.run, job.method))
    elif best != job.progress.step:
        _save_result(job, job.run.last)
    write_file(job.run.card, model_card(job.config, job.base.config, job.data.report, job.progress))
    job.console.stop()


def _save_result(job: Job, folder: Path) -> None:
    save_trained(folder, job.method, job.parameters, name_elsewhere(job.config.model))


@contextmanager
def _metrics(job: Job) -> Iterator[FileIO]:
    """`metrics.jsonl`, cut back to what the checkpoint knows of; without a buffer, which could fail when it is closed."""
    with disk_errors(job.run.metrics):
        file = FileIO(job.run.metrics, "a")
    with file:
        with disk_errors(job.run.metrics):
            file.truncate(min(file.tell(), job.progress.metrics_bytes))
            file.seek(0, os.SEEK_END)
        try:
            yield file
        finally:
            job.console.stop()


@contextmanager
def _interruptible(job: Job) -> Iterator[None]:
    """Ctrl-C, or a machine without memory, ends a run with what to do next."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in ("allocate", "insufficient memory", "out of memory")):
            raise
        raise UserError(
            f"out of memory in step {job.progress.step + 1}: {error}",
            where=str(job.run.path),
            hint=f"start a new run with less --micro-batch-tokens (it was {job.micro_batch_tokens}), "
            "--grad-checkpoint on or a shorter --max-length",
        ) from error
    except KeyboardInterrupt:
        saved = job.run.checkpoint_steps()
        raise UserError(
            f"interrupted after step {job.progress.step}; "
            + (f"the newest checkpoint is of step {saved[-1]}" if saved else "there is no checkpoint yet"),
            hint=f"continue with: mlx-sft train --resume {job.run.path}",
            exit_code=INTERRUPTED,
        ) from None


def _write(metrics: FileIO, record: dict[str, Any]) -> None:
    line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
    with disk_errors(Path(str(metrics.name))):
        if metrics.write(line) < len(line):
            raise OSError(errno.ENOSPC, "no space left for a whole line")
