"""The training loop. Every decision was made before it; here steps are taken, evaluated, and saved."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console, many
from mlx_sft.data.feed import PreparedStep, StepFeed
from mlx_sft.data.steps import Step
from mlx_sft.errors import UserError
from mlx_sft.optimizers.gradients import clip_scale, global_norm
from mlx_sft.training import checkpoint, lead
from mlx_sft.training.callbacks import Callback, Record
from mlx_sft.training.checkpoint import Unfinished
from mlx_sft.training.disk_need import begins_with_a_checkpoint
from mlx_sft.training.failures import GPU_HINT, BatchFailed, Interrupted, is_interrupted, is_out_of_memory, reason
from mlx_sft.training.job import Job
from mlx_sft.training.machine import footprint_bytes, memory_limits_restored
from mlx_sft.training.out_of_memory import evaluate_in_memory, recover, wait_for_gpu
from mlx_sft.training.preview import show_plan
from mlx_sft.training.ranks import started
from mlx_sft.training.results import begin, finish, save, save_result
from mlx_sft.training.setup import Given, prepare_job
from mlx_sft.training.step import StepGradient, to_float
from mlx_sft.training.stopping import Stopped, stop_request
from mlx_sft.training.worker import work

_MOST_SKIPPED = 5
"""Steps in a row without a finite gradient after which a run stops."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        run_dir: Its folder.
        steps: Optimizer steps taken in all.
        loss: Training loss of the last step; None where it was skipped, or nothing was left to do.
        best_loss: Validation loss of the best evaluation; None without validation rows.
        skipped: Steps left out because loss or gradient was not finite.
    """

    run_dir: Path
    steps: int
    loss: float | None
    best_loss: float | None
    skipped: int


def train(
    config: TrainConfig,
    *,
    data: Any = None,
    valid: Any = None,
    model: Any = None,
    tokenizer: Any = None,
    callbacks: Sequence[Callback] = (),
) -> TrainResult:
    """Fine-tune a model as configured, or continue a run (`config.resume`) exactly where it stopped.

    Args:
        config: The settings.
        data: Rows in memory instead of `config.data`: a list of dicts, a `datasets.Dataset`, or any sequence of mappings.
        valid: Validation rows in memory instead of `config.valid`.
        model: A model that is loaded already, instead of loading `config.model`: what `load_model` gives, or a model of mlx-lm's with
            its `tokenizer`. It must be the checkpoint that `config.model` names, and is trained in place.
        tokenizer: The model's, of transformers or mlx-lm's wrapper of one.
        callbacks: Objects that hear of steps, evaluations, samples, checkpoints and the end.

    Raises:
        UserError: For anything in data, model or configuration that cannot be; earlier results stay as they are.
    """
    console = Console(quiet=config.quiet, json_lines=config.json_lines)
    given = Given(data, valid, model, tokenizer, tuple(callbacks))
    ranks = started()
    if ranks.rank:
        return _as_the_first_says(work(ranks, lambda: config, given))
    with ranks.led(), memory_limits_restored(), ExitStack() as held:
        job = prepare_job(config, console, held, given, ranks)
        held.callback(job.callbacks.close)
        show_plan(job)
        with stop_request() as job.request, _ended_in_words(job):
            loss = _take_steps(job)
            finish(job)
            best_loss = job.progress.best_loss
            if traces := job.gradient_computer.trace_seconds:
                console.note(f"{many(len(traces), 'shape')} compiled; first runs took {sum(traces):.0f} s in all")
            job.emit(
                {"kind": "end", "step": job.step, "loss": loss, "best_loss": best_loss, "stopped": job.stop_reason}
            )
        progress = job.progress
        result = TrainResult(job.run.path, progress.step, loss, progress.best_loss, progress.skipped)
    ranks.end(0, result=asdict(result) | {"run_dir": str(result.run_dir)})
    return result


def _as_the_first_says(told: Mapping[str, Any]) -> TrainResult:
    """In another process than the first of a run."""
    if told["code"]:
        raise UserError("process 0 ended the run; it says why", exit_code=told["code"])
    return TrainResult(**told["result"] | {"run_dir": Path(told["result"]["run_dir"])})


def _take_steps(job: Job) -> float | None:
    """All that are left; the training loss of the last of them is returned."""
    loss = None
    begin(job)
    with _saved_on_the_way_out(job):
        job.emit({"kind": "start", "step": job.step, "total_steps": job.total_steps})
        goes_back = job.callbacks.may_go_back
        if begins_with_a_checkpoint(job.config, goes_back=goes_back) and not job.run.checkpoint_steps():
            save(job)
        while not job.finished:
            if job.progress.unfinished:
                job.unfinished, job.progress = job.progress.unfinished, job.progress.after(unfinished=None)
                _follow_up(job, next(job.plan.steps(job.step - 1)))
            else:
                loss = _take_steps_from_here(job)
    return loss


def _take_steps_from_here(job: Job) -> float | None:
    """As many as there are up to the end, or to where a callback goes back to an earlier one or plans fewer."""
    loss = None
    job.replanned = False
    with _steps_left(job) as steps:
        for prepared in steps:
            record = train_step(job, prepared, steps)
            loss = record["loss"]
            _follow_up(job, prepared.step)
            if job.progress.stopped_of is not None or job.replanned:
                break
    return loss


def _follow_up(job: Job, step: Step) -> None:
    """What follows a step: callbacks hear of it, and it is evaluated and saved where that is due. It goes on from `job.unfinished`."""
    todo = job.unfinished
    if todo is not None and todo.record["kind"] == "train":
        job.callbacks.emit(job, todo.record, todo.heard)
        if job.replanned:
            job.unfinished = None
            return
        if job.data.valid and (job.progress.stopped_of is not None or _due(job.config.eval_every, step, job)):
            job.unfinished = todo = Unfinished(evaluate(job, step))
    if todo is not None and todo.record["kind"] == "evaluation":
        job.callbacks.emit(job, todo.record, todo.heard)
        if todo.record["best"]:
            save_result(job)
    stopped = job.progress.stopped_of is not None
    saves = stopped or _due(job.config.save_every, step, job)
    lead.after_step(job, saves=saves)
    if saves:
        save(job)
    job.unfinished = None
    _stop_if_lost(job, step)
    if stopped:
        job.console.note(f"stopped after step {step.number}: {job.stop_reason or 'as it was asked to before'}")


def _steps_left(job: Job) -> StepFeed:
    return StepFeed(
        job.plan,
        job.data.train,
        after=job.step,
        token_budget=job.settings.micro_batch_tokens,
        layout=job.settings.layout,
    )


def _due(every: int | str, step: Step, job: Job) -> bool:
    """Whether something that happens every so often, and always after the last step, happens after this one."""
    last = step.number == job.plan.total_steps
    return last or (step.ends_epoch if every == "epoch" else step.number % int(every) == 0)


def _stop_if_lost(job: Job, step: Step) -> None:
    if job.progress.skipped_in_a_row < _MOST_SKIPPED:
        return
    save(job)
    raise UserError(
        f"{_MOST_SKIPPED} steps in a row had no finite gradient, the last of them step {step.number}; "
        "the last good state is saved",
        where=str(job.run.path),
        hint="lower --lr, look at the rows named above, or train with --dtype float32",
    )


@contextmanager
def _saved_on_the_way_out(job: Job) -> Iterator[None]:
    """Whatever ends a run, the state after its last step is saved; one that was asked to stop says how to go on."""
    try:
        yield
    except Stopped as stopped:
        _save_last_step(job)
        raise UserError(
            f"stopped by {stopped} after step {job.progress.step}, which is saved",
            hint=f"continue with: mlx-sft train --resume {job.run.path}",
            exit_code=128 + stopped.number,
        ) from None
    except BaseException:
        # Not a state that a watch over the loss holds to be lost: a run would go on from it, and older ones make room for it.
        if job.step and not job.progress.suspect and not job.torn:
            with suppress(
                UserError, RuntimeError, MemoryError
            ):  # what ended the run is said, not what keeps it from saving
                _save_last_step(job)
        raise


def _save_last_step(job: Job) -> None:
    """What has not happened yet after the step is saved with it, and happens when the run goes on."""
    if job.step in job.run.checkpoint_steps():
        return
    job.progress = job.progress.after(unfinished=job.unfinished)
    save(job)
    job.console.note(f"the state after step {job.step} is saved in {job.run.checkpoint(job.step)}")


@contextmanager
def _ended_in_words(job: Job) -> Iterator[None]:
    """A machine without memory ends a run with what to do next; the live line is left as it stands."""
    try:
        yield
    except BaseException as error:
        job.run.note_on(error)
        if not isinstance(error, RuntimeError | MemoryError):
            raise
        if is_interrupted(error):
            raise UserError(
                f"the system took the GPU away after step {job.progress.step}, in its update: {error}; {_saved(job)}",
                where=str(job.run.path),
                hint=f"{GPU_HINT}, and go on with --resume",
            ) from error
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory after step {job.progress.step}: {reason(error)}; {_saved(job)}",
            where=str(job.run.path),
            hint="free some memory, or give a smaller --micro-batch-tokens, and go on with --resume",
        ) from error
    finally:
        job.console.stop()


def _saved(job: Job) -> str:
    saved = job.run.checkpoint_steps()
    return f"the newest checkpoint is of step {saved[-1]}" if saved else "there is no checkpoint yet"


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
        scale = clip_scale(norm, config.max_grad_norm)
        key = checkpoint.rounding_key(config.seed, step.number)
        if computer.ranks.leads:
            told = None if scale is None else to_float(scale)
            computer.ranks.tell({"do": "update", "rate": rate, "scale": told, "key": key.tolist()})
        job.torn = True
        job.parameters = job.optimizer.update(job.parameters, gradients, rate, scale, key)
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
        "active_memory_bytes": mx.get_active_memory(),
        "cache_memory_bytes": mx.get_cache_memory(),
        "footprint_bytes": footprint_bytes(),
        "seconds": round(seconds, 4),
        "data_wait_seconds": round(prepared.waited, 4),
    }
    _add_metrics(record, metrics, config)
    if computer.compiled:
        traces = computer.trace_seconds[traces_before:]
        record |= {"traces": len(traces), "trace_seconds": round(sum(traces), 4)}
    if record["grad_norm"] == 0 and not job.told_of_no_gradient:
        job.told_of_no_gradient = True
        job.console.warn(
            f"step {step.number}: the gradient is zero, so that nothing is trained (--method {config.method})"
        )
    progress: dict[str, Any] = {"step": step.number, "skipped_in_a_row": 0}
    if not finite:
        record["skipped_rows"] = [examples[row].origin for row in rows]
        origins = ", ".join(record["skipped_rows"])
        job.console.warn(f"step {step.number} skipped, its gradient is not finite; rows {origins}")
        progress["skipped"] = job.progress.skipped + 1
        progress["skipped_in_a_row"] = job.progress.skipped_in_a_row + 1
    job.progress, job.unfinished, job.torn = job.progress.after(**progress), Unfinished(record), False
    return record


def _add_metrics(record: Record, metrics: Mapping[str, float], config: TrainConfig) -> None:
    """What the objective says of itself, beside what every record has; a number that is not finite is null."""
    if taken := sorted(metrics.keys() & {*record, "time"}):
        what = f"--objective {config.objective} has a metric named {taken[0]}, as every record has"
        raise UserError(what, hint="whoever wrote it can give it another name")
    record.update({name: value if math.isfinite(value) else None for name, value in metrics.items()})


def _gradient(job: Job, prepared: PreparedStep, feed: StepFeed) -> tuple[StepGradient, PreparedStep]:
    """Loss and gradient, and the step as it was cut in the end."""
    key = checkpoint.dropout_key(job.config.seed, prepared.step.number)
    times = 0
    while True:
        try:
            computer = job.gradient_computer
            return computer.gradient(job.parameters, prepared.batches, key, job.request.check), prepared
        except BatchFailed as error:
            failed, interrupted = error.batch, isinstance(error, Interrupted)
        # Out here, where the error and the arrays of its frames are gone.
        if interrupted:
            times += 1
            wait_for_gpu(job, failed, times)
        else:
            recover(job, failed)
        prepared = feed.again(job.settings.micro_batch_tokens)


def evaluate(job: Job, step: Step) -> Record:
    """Loss over the whole validation set, as a record; whether it is the best so far is the job's progress from then on."""
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
    finite = math.isfinite(result.loss)
    judged, before = job.gradient_computer.objective.judged(result.loss, result.own), job.progress.best_judged
    best = finite and (before is None or judged < before)
    if best:
        job.progress = job.progress.after(best_loss=result.loss, best_judged=judged, best_step=step.number)
    record: Record = {
        "kind": "evaluation",
        "step": step.number,
        "epoch": round(step.epoch, 6),
        "loss": result.loss if finite else None,
        "perplexity": result.perplexity if finite else None,
        "token_accuracy": result.token_accuracy,
        "exact_match": result.exact_match,
        "best": best,
        "learning_rate": job.learning_rate(step),
        "grad_norm": None,
        "tokens": result.tokens,
        "supervised_tokens": result.supervised_tokens,
        "tokens_per_second": round(result.tokens / seconds, 2),
        "peak_memory_bytes": mx.get_peak_memory(),
        "seconds": round(seconds, 4),
    }
    if job.meter is not None:
        forgotten = job.meter.measured(job.split)
        record["forgetting"] = forgotten if math.isfinite(forgotten) else None
    _add_metrics(record, result.own, job.config)
    return record
