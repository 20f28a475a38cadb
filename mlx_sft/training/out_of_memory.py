"""What a run does about a shortage of memory: smaller micro-batches, then stronger recomputation, from now to its end.

Neither changes an update beyond rounding, but for dropout, which then drops other positions. The state before the step is saved first,
so that a resumed run repeats what the interrupted one did, and nothing is lost should the next try end the process. Knows nothing of
how a step is taken.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx

from mlx_sft.data.batches import Batch, Layout, collate, cut_all
from mlx_sft.data.dataset import Examples
from mlx_sft.data.prefetch import Prefetch
from mlx_sft.errors import UserError
from mlx_sft.methods import Parameters
from mlx_sft.training.batch_settings import compiled_shapes, configured
from mlx_sft.training.recompute import Mode
from mlx_sft.training.records import out_of_memory_record
from mlx_sft.training.results import save
from mlx_sft.training.setup import Job
from mlx_sft.training.step import Evaluation, GradientComputer, OutOfMemory, TooLarge

_STRONGER: dict[Mode, Mode] = {"off": "light", "light": "layers", "layers": "blocks"}
"""Which recomputation keeps less."""


def recover(job: Job, shortage: TooLarge) -> None:
    """After a shortage in the step that follows the job's progress, whose arrays must be gone by now.

    Raises:
        UserError: If nothing smaller is left to try.
    """
    gc.collect()
    mx.clear_cache()
    step = job.progress.step + 1
    tried = next_try(shortage, job.settings.micro_batch_tokens, job.settings.mode)
    if tried is None:
        save(job)
        raise UserError(
            f"out of memory in step {step}: a row of {shortage.width} tokens does not fit, with all that can be recomputed: "
            f"{shortage.message}",
            where=str(job.run.path),
            hint="what was trained is saved; free some memory and go on with --resume, or start a new run with a shorter --max-length",
        )
    tokens, mode = tried
    stronger = "" if mode == job.settings.mode else f", --grad-checkpoint {configured(mode)}"
    job.console.warn(
        f"out of memory in step {step}, at {shortage.rows} rows of up to {shortage.width} tokens; it is repeated "
        f"with up to {tokens} tokens at once{stronger}, and so are those that follow"
    )
    job.memory = replace(job.memory, settings=replace(job.settings, micro_batch_tokens=tokens, mode=mode))
    job.gradient_computer.configure(mode, compiled_shapes(job.memory.machine, job.plan, job.data.train, tokens))
    job.progress = job.progress.after(micro_batch_tokens=tokens, recompute=mode)
    shape = {"rows": shortage.rows, "width": shortage.width}
    job.emit(out_of_memory_record(step, **shape, micro_batch_tokens=tokens, recompute=mode))
    save(job)


def smaller_budget(shortage: TooLarge) -> int | None:
    """Half of the micro-batch that did not fit; None where that was a single row."""
    return shortage.tokens // 2 if shortage.rows > 1 else None


def next_try(shortage: TooLarge, token_budget: int, mode: Mode) -> tuple[int, Mode] | None:
    """The budget and the recomputation to try after a shortage, smaller micro-batches first; None after the last."""
    smaller = smaller_budget(shortage)
    if smaller is not None:
        return smaller, mode
    if mode in _STRONGER:
        return token_budget, _STRONGER[mode]
    return None


def evaluate_in_memory(
    gradient_computer: GradientComputer, parameters: Parameters, examples: Examples, token_budget: int, layout: Layout
) -> tuple[Evaluation, int]:
    """An evaluation of all examples, and the budget that it came to fit in; begun again with smaller micro-batches after a shortage.

    Raises:
        UserError: If a single row does not fit.
    """
    while True:
        try:
            with Prefetch(_collated(examples, token_budget, layout)) as batches:
                return gradient_computer.evaluate(parameters, batches), token_budget
        except OutOfMemory as error:
            shortage = error.too_large
        gc.collect()
        mx.clear_cache()
        smaller = smaller_budget(shortage)
        if smaller is None:
            what = f"out of memory in an evaluation: a row of {shortage.width} tokens does not fit: {shortage.message}"
            raise UserError(what, hint="free some memory, or give shorter rows (--max-length)")
        token_budget = smaller


def _collated(examples: Examples, token_budget: int, layout: Layout) -> Iterator[Batch]:
    for micro_batch in cut_all(examples.needed_lengths, token_budget, layout):
        yield collate(examples, micro_batch)
