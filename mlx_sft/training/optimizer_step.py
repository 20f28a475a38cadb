"""One optimizer step of a job: its gradient, whether that is finite, the update."""

from __future__ import annotations

import math
import time
from typing import Any

import mlx.core as mx

from mlx_sft.data.feed import PreparedStep, StepFeed
from mlx_sft.optimizers.gradients import clip, global_norm
from mlx_sft.training import checkpoint
from mlx_sft.training.callbacks import Record
from mlx_sft.training.job import Job
from mlx_sft.training.out_of_memory import recover
from mlx_sft.training.step import OutOfMemory, StepGradient, to_float


def train_step(job: Job, prepared: PreparedStep, feed: StepFeed) -> Record:
    """The job's parameters and progress move on; the record of the step is returned.

    A step without a finite gradient is left out, and says so. Where memory runs out the step is repeated from its start, cut smaller;
    the job's state has not changed by then. Nor has it where the job is asked to stop, which raises `Stopped`.
    """
    config, step = job.config, prepared.step
    started = time.perf_counter() - prepared.waited
    computer = job.gradient_computer
    traces_before = len(computer.trace_seconds)
    found, prepared = _gradient(job, prepared, feed)
    loss, gradients, metrics = to_float(found.loss), found.gradients, found.metrics
    del found  # so that nothing but `gradients` keeps them
    norm = global_norm(gradients)
    finite = math.isfinite(loss) and math.isfinite(to_float(norm))
    rate = job.learning_rate(step)
    if finite:
        gradients = clip(gradients, norm, config.max_grad_norm)
        job.parameters = job.optimizer.update(job.parameters, gradients, rate)
        computer.bind(job.parameters)
    del gradients
    seconds, rows, examples = time.perf_counter() - started, list(step.rows), job.data.train
    tokens = int(examples.lengths[rows].sum())
    record: Record = {
        "kind": "train",
        "step": step.number,
        "epoch": round(step.epoch, 6),
        "loss": loss if finite else None,
        "learning_rate": rate,
        "grad_norm": to_float(norm) if finite else None,
        "tokens": tokens,
        "supervised_tokens": int(examples.supervised_tokens[rows].sum()),
        "computed_tokens": sum(batch.needed_tokens for batch in prepared.batches),
        "padded_tokens": sum(batch.token_ids.size for batch in prepared.batches),
        "micro_batches": len(prepared.batches),
        "tokens_per_second": round(tokens / seconds, 2),
        "peak_memory_bytes": mx.get_peak_memory(),
        "seconds": round(seconds, 4),
        "data_wait_seconds": round(prepared.waited, 4),
        **metrics,
    }
    if computer.compiled:
        traces = computer.trace_seconds[traces_before:]
        record |= {"traces": len(traces), "trace_seconds": round(sum(traces), 4)}
    progress: dict[str, Any] = {"step": step.number, "skipped_in_a_row": 0}
    if not finite:
        record["skipped_rows"] = [examples[row].origin for row in rows]
        origins = ", ".join(record["skipped_rows"])
        job.console.warn(f"step {step.number} skipped, its gradient is not finite; rows {origins}")
        progress["skipped"] = job.progress.skipped + 1
        progress["skipped_in_a_row"] = job.progress.skipped_in_a_row + 1
    job.progress = job.progress.after(**progress)
    return record


def _gradient(job: Job, prepared: PreparedStep, feed: StepFeed) -> tuple[StepGradient, PreparedStep]:
    """Loss and gradient, and the step as it was cut in the end."""
    key = checkpoint.dropout_key(job.config.seed, prepared.step.number) if job.method.uses_dropout else None
    while True:
        try:
            computer = job.gradient_computer
            return computer.gradient(job.parameters, prepared.batches, key, job.request.check), prepared
        except OutOfMemory as error:
            too_large = error.too_large
        recover(job, too_large)  # out here, where the error and the arrays of its frames are gone
        prepared = feed.again(job.settings.micro_batch_tokens)
