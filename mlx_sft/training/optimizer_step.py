"""One optimizer step of a job: its gradient, whether that is finite, the update. Knows nothing of evaluation or saving."""

from __future__ import annotations

import math
import time

import mlx.core as mx

from mlx_sft.data.feed import PreparedStep, StepFeed
from mlx_sft.methods import Parameters
from mlx_sft.training import checkpoint
from mlx_sft.training.divergence import observe
from mlx_sft.training.optim import clip, global_norm
from mlx_sft.training.records import Metrics, Record, step_record
from mlx_sft.training.out_of_memory import recover
from mlx_sft.training.setup import Job
from mlx_sft.training.step import OutOfMemory
from mlx_sft.training.step import to_float


def train_step(job: Job, prepared: PreparedStep, feed: StepFeed, metrics: Metrics) -> Record:
    """The job's parameters and progress move on; the record of the step is returned.

    A step without a finite gradient is left out, and says so. After a shortage of memory the step is repeated from its start,
    cut smaller; the job's state has not changed by then. Nor has it where the job is asked to stop, which raises `Stopped`.
    """
    config, step = job.config, prepared.step
    started = time.perf_counter() - prepared.waited
    traces_before = len(job.gradient_computer.trace_seconds)
    loss, gradients, prepared = _gradient(job, prepared, feed, metrics)
    norm = global_norm(gradients)
    finite = math.isfinite(to_float(loss)) and math.isfinite(to_float(norm))
    rate = job.learning_rate(step)
    if finite:
        gradients = clip(gradients, norm, config.max_grad_norm)
        job.parameters = job.optimizer.update(job.parameters, gradients, rate)
    del gradients
    record = step_record(
        step,
        prepared.batches,
        job.data.train,
        loss=to_float(loss) if finite else None,
        learning_rate=rate,
        grad_norm=to_float(norm) if finite else None,
        seconds=time.perf_counter() - started,
        data_wait_seconds=prepared.waited,
        trace_seconds=job.gradient_computer.trace_seconds[traces_before:] if job.gradient_computer.compiled else None,
    )
    skipped = 0 if finite else 1
    if skipped:
        origins = ", ".join(record["skipped_rows"])
        job.console.warn(f"step {step.number} skipped, its gradient is not finite; rows {origins}")
    losses, above_bound = observe(job.progress.losses, job.progress.above_bound, record["loss"])
    job.progress = job.progress.after(
        step=step.number,
        losses=losses,
        above_bound=above_bound,
        skipped=job.progress.skipped + skipped,
        skipped_in_a_row=job.progress.skipped_in_a_row + 1 if skipped else 0,
    )
    return record


def _gradient(
    job: Job, prepared: PreparedStep, feed: StepFeed, metrics: Metrics
) -> tuple[mx.array, Parameters, PreparedStep]:
    """Loss and gradient, and the step as it was cut in the end."""
    key = checkpoint.dropout_key(job.config.seed, prepared.step.number) if job.config.dropout else None
    while True:
        try:
            return *job.gradient_computer.gradient(job.parameters, prepared.batches, key, job.request.check), prepared
        except OutOfMemory as error:
            shortage = error.too_large
        recover(job, shortage, metrics)  # out here, where the error and the arrays of its frames are gone
        prepared = feed.again(job.settings.micro_batch_tokens)
