"""An evaluation in the course of a run: its record, and whether it is the best so far."""

from __future__ import annotations

import math
import time

import mlx.core as mx

from mlx_sft.data.batches import Step
from mlx_sft.training.callbacks import Record
from mlx_sft.training.job import Job
from mlx_sft.training.out_of_memory import evaluate_in_memory
from mlx_sft.training.results import save_result


def evaluate(job: Job, step: Step) -> None:
    """Loss over the whole validation set; the best parameters so far become the run's result."""
    started = time.perf_counter()
    tokens = job.settings.micro_batch_tokens
    budget = min(tokens, job.progress.evaluation_tokens or tokens)
    result, fitting = evaluate_in_memory(
        job.gradient_computer, job.parameters, job.data.valid, budget, job.settings.layout
    )
    if fitting < budget:
        job.console.warn(
            f"out of memory in the evaluation after step {step.number}; evaluations take up to {fitting} tokens at once from now on"
        )
        job.progress = job.progress.after(evaluation_tokens=fitting)
    seconds = time.perf_counter() - started
    best_loss = job.progress.best_loss
    finite = math.isfinite(result.loss)
    best = finite and (best_loss is None or result.loss < best_loss)
    if best:
        job.progress = job.progress.after(best_loss=result.loss, best_step=step.number)
    record: Record = {
        "kind": "evaluation",
        "step": step.number,
        "epoch": round(step.epoch, 6),
        "loss": result.loss if finite else None,
        "perplexity": math.exp(min(result.loss, 700)) if finite else None,
        "token_accuracy": result.token_accuracy,
        **result.own,
        "best": best,
        "learning_rate": job.learning_rate(step),
        "grad_norm": None,
        "tokens": result.tokens,
        "supervised_tokens": result.supervised_tokens,
        "tokens_per_second": round(result.tokens / seconds, 2),
        "peak_memory_bytes": mx.get_peak_memory(),
        "seconds": round(seconds, 4),
    }
    job.emit(record)
    if best:
        save_result(job)
