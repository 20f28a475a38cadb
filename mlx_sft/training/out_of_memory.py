"""What is tried when a micro-batch fails: smaller ones, then stronger recomputation, from now to the end of the run.

`step.py` notices that a micro-batch does not fit, or that the system took the GPU away; then the same is tried twice again before it is
cut smaller. No answer changes an update beyond rounding, but for dropout, which then drops other positions. The state before the step is
saved before anything is computed otherwise, so that a resumed run repeats what the interrupted one did, and nothing is lost should the
next try end the process.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

import mlx.core as mx

from mlx_sft.console import many
from mlx_sft.data.batches import Batch, Layout, collate, cut_examples
from mlx_sft.data.dataset import Examples
from mlx_sft.data.feed import Prefetch
from mlx_sft.errors import UserError
from mlx_sft.methods import Parameters
from mlx_sft.training.batch_settings import configured
from mlx_sft.training.evaluation import Evaluation
from mlx_sft.training.failures import GPU_HINT, BatchFailed, FailedBatch, Interrupted
from mlx_sft.training.job import Job
from mlx_sft.training.memory import MODES
from mlx_sft.training.recompute import Mode
from mlx_sft.training.results import save
from mlx_sft.training.shapes import compiled_shapes
from mlx_sft.training.step import GradientComputer

T = TypeVar("T")

WAITS = (2, 10)
"""Seconds before what the system interrupted is tried again as it is."""


def recover(job: Job, failed: FailedBatch) -> None:
    """Make the job compute smaller, after a micro-batch of its next step did not fit; the arrays of that step must be gone by now.

    Raises:
        UserError: If nothing smaller is left to try.
    """
    free_memory()
    step = job.progress.step + 1
    tried = next_try(failed, job.settings.micro_batch_tokens, job.settings.mode)
    if tried is None:
        save(job)
        raise UserError(
            f"out of memory in step {step}: a row of {failed.width} tokens does not fit, with all that can be recomputed: "
            f"{failed.message}",
            where=str(job.run.path),
            hint="what was trained is saved; free some memory and go on with --resume, or start a new run with a shorter --max-length",
        )
    _go_on_with(job, failed, "out_of_memory", *tried)


def wait_for_gpu(job: Job, failed: FailedBatch, times: int) -> None:
    """After the system took the GPU away in the job's next step: wait, and after the second time make it compute smaller pieces.

    Args:
        times: How often it has happened in this step.

    Raises:
        UserError: If it happens with the smallest there is.
    """
    free_memory()
    step = job.progress.step + 1
    if times <= len(WAITS):
        seconds = WAITS[times - 1]
        job.console.warn(f"step {step}: {failed.message}; it is repeated in {seconds} s")
        job.emit({"kind": "interrupted", "step": step, "times": times, "message": failed.message})
        time.sleep(seconds)
        return
    smaller = smaller_budget(failed)
    if smaller is None:
        save(job)
        raise UserError(
            f"the system took the GPU away {times} times in step {step}: {failed.message}",
            where=str(job.run.path),
            hint=f"what was trained is saved; {GPU_HINT}, and go on with --resume",
        )
    _go_on_with(job, failed, "interrupted", smaller, job.settings.mode)


def _go_on_with(job: Job, failed: FailedBatch, cause: str, tokens: int, mode: Mode) -> None:
    """From now on the job computes so many tokens at once, in this mode; saved before it is tried."""
    step = job.progress.step + 1
    stronger = "" if mode == job.settings.mode else f", --grad-checkpoint {configured(mode)}"
    job.console.warn(
        f"{cause.replace('_', ' ')} in step {step}, at {many(failed.rows, 'row')} of up to {failed.width} tokens; it is repeated "
        f"with up to {tokens} tokens at once{stronger}, and so are those that follow"
    )
    job.settings = replace(job.settings, micro_batch_tokens=tokens, mode=mode)
    if job.gradient_computer.ranks.leads:
        job.gradient_computer.ranks.tell({"do": "configure", "tokens": tokens, "mode": mode})
    job.gradient_computer.configure(mode, compiled_shapes(job.plan, job.data.train, tokens, job.settings.layout))
    kept = {"micro_batch_tokens": tokens, "recompute": mode}
    job.progress = job.progress.after(**kept)
    job.emit({"kind": cause, "step": step, "rows": failed.rows, "width": failed.width, **kept})
    save(job)


def free_memory() -> None:
    """What a failed computation has left."""
    gc.collect()
    mx.clear_cache()


def smaller_budget(failed: FailedBatch) -> int | None:
    """Half of the micro-batch that failed; None where that was a single row."""
    return failed.tokens // 2 if failed.rows > 1 else None


def next_try(failed: FailedBatch, token_budget: int, mode: Mode) -> tuple[int, Mode] | None:
    """The budget and the recomputation to try next, smaller micro-batches first; None after the last."""
    smaller = smaller_budget(failed)
    if smaller is not None:
        return smaller, mode
    stronger = MODES[MODES.index(mode) + 1 :]
    return (token_budget, stronger[0]) if stronger else None


def evaluate_in_memory(
    gradient_computer: GradientComputer, parameters: Parameters, examples: Examples, token_budget: int, layout: Layout
) -> tuple[Evaluation, int]:
    """An evaluation of all examples, and the budget that it fits in.

    Raises:
        UserError: As `in_memory`.
    """

    def evaluate(batches: Iterable[Batch]) -> Evaluation:
        return gradient_computer.evaluate(parameters, batches)

    return in_memory(evaluate, examples, token_budget, layout)


def in_memory(
    compute: Callable[[Iterable[Batch]], T], examples: Examples, token_budget: int, layout: Layout
) -> tuple[T, int]:
    """What is computed without gradients of all examples, and the budget that it fits in; where it fails it begins again, with smaller
    micro-batches for want of memory, and after a while where the system took the GPU away.

    Raises:
        UserError: If a single row does not fit, or the GPU is taken away again and again.
    """
    waits = iter(WAITS)
    while True:
        try:
            cuts = cut_examples(examples, token_budget, layout)
            with Prefetch(collate(examples, micro_batch) for micro_batch in cuts) as batches:
                return compute(batches), token_budget
        except BatchFailed as error:
            failed, interrupted = error.batch, isinstance(error, Interrupted)
        free_memory()
        if interrupted and (seconds := next(waits, None)) is not None:
            time.sleep(seconds)
            continue
        smaller = smaller_budget(failed)
        if smaller is None:
            if interrupted:
                raise UserError(f"the system took the GPU away in an evaluation: {failed.message}", hint=GPU_HINT)
            what = f"out of memory in an evaluation: a row of {failed.width} tokens does not fit: {failed.message}"
            raise UserError(what, hint="free some memory, or give shorter rows (--max-length)")
        token_budget = smaller
