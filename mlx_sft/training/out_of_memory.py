"""Out-of-memory recovery: smaller micro-batches, then stronger recomputation, from now to the end of the run.

`step.py` notices that a micro-batch does not fit. Neither answer changes an update beyond rounding, but for dropout, which then drops
other positions. The state before the step is saved first, so that a resumed run repeats what the interrupted one did, and nothing is
lost should the next try end the process.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx

from mlx_sft.data.batches import Batch, Layout, collate, cut_all
from mlx_sft.data.dataset import Examples
from mlx_sft.data.feed import Prefetch
from mlx_sft.errors import UserError
from mlx_sft.methods import Parameters
from mlx_sft.training.batch_settings import compiled_shapes, configured
from mlx_sft.training.job import Job
from mlx_sft.training.memory import MODES
from mlx_sft.training.recompute import Mode
from mlx_sft.training.results import save
from mlx_sft.training.step import Evaluation, GradientComputer, OutOfMemory, TooLarge


def recover(job: Job, too_large: TooLarge) -> None:
    """Make the job compute smaller, after a micro-batch of its next step did not fit; the arrays of that step must be gone by now.

    Raises:
        UserError: If nothing smaller is left to try.
    """
    gc.collect()
    mx.clear_cache()
    step = job.progress.step + 1
    tried = next_try(too_large, job.settings.micro_batch_tokens, job.settings.mode)
    if tried is None:
        save(job)
        raise UserError(
            f"out of memory in step {step}: a row of {too_large.width} tokens does not fit, with all that can be recomputed: "
            f"{too_large.message}",
            where=str(job.run.path),
            hint="what was trained is saved; free some memory and go on with --resume, or start a new run with a shorter --max-length",
        )
    tokens, mode = tried
    stronger = "" if mode == job.settings.mode else f", --grad-checkpoint {configured(mode)}"
    job.console.warn(
        f"out of memory in step {step}, at {too_large.rows} rows of up to {too_large.width} tokens; it is repeated "
        f"with up to {tokens} tokens at once{stronger}, and so are those that follow"
    )
    job.settings = replace(job.settings, micro_batch_tokens=tokens, mode=mode)
    job.gradient_computer.configure(mode, compiled_shapes(job.memory.machine, job.plan, job.data.train, tokens))
    kept = {"micro_batch_tokens": tokens, "recompute": mode}
    job.progress = job.progress.after(**kept)
    job.emit({"kind": "out_of_memory", "step": step, "rows": too_large.rows, "width": too_large.width, **kept})
    save(job)


def smaller_budget(too_large: TooLarge) -> int | None:
    """Half of the micro-batch that did not fit; None where that was a single row."""
    return too_large.tokens // 2 if too_large.rows > 1 else None


def next_try(too_large: TooLarge, token_budget: int, mode: Mode) -> tuple[int, Mode] | None:
    """The budget and the recomputation to try next, smaller micro-batches first; None after the last."""
    smaller = smaller_budget(too_large)
    if smaller is not None:
        return smaller, mode
    stronger = MODES[MODES.index(mode) + 1 :]
    return (token_budget, stronger[0]) if stronger else None


def evaluate_in_memory(
    gradient_computer: GradientComputer, parameters: Parameters, examples: Examples, token_budget: int, layout: Layout
) -> tuple[Evaluation, int]:
    """An evaluation of all examples, and the budget that it fits in; where memory runs out it begins again with smaller micro-batches.

    Raises:
        UserError: If a single row does not fit.
    """
    while True:
        try:
            with Prefetch(_collated(examples, token_budget, layout)) as batches:
                return gradient_computer.evaluate(parameters, batches), token_budget
        except OutOfMemory as error:
            too_large = error.too_large
        gc.collect()
        mx.clear_cache()
        smaller = smaller_budget(too_large)
        if smaller is None:
            what = (
                f"out of memory in an evaluation: a row of {too_large.width} tokens does not fit: {too_large.message}"
            )
            raise UserError(what, hint="free some memory, or give shorter rows (--max-length)")
        token_budget = smaller


def _collated(examples: Examples, token_budget: int, layout: Layout) -> Iterator[Batch]:
    for micro_batch in cut_all(examples.needed_lengths, token_budget, layout):
        yield collate(examples, micro_batch)
