"""What a run leaves on the disk as it goes: checkpoints, its result, and the card beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path

from mlx_sft.convert.model_card import model_card, run_summary
from mlx_sft.errors import UserError
from mlx_sft.files import disk_errors
from mlx_sft.model.load import name_elsewhere
from mlx_sft.training import checkpoint
from mlx_sft.training.job import Job
from mlx_sft.writing import remove, write_file


def _where_the_run_lies(write: Callable[[Job], None]) -> Callable[[Job], None]:
    """A function that writes in the run folder, as one that does it once more where someone has renamed the folder meanwhile."""

    @wraps(write)
    def written(job: Job) -> None:
        while True:
            before = job.run.path
            try:
                write(job)
            except UserError:
                if job.run.path == before:
                    raise
            if job.run.path == before:
                return

    return written


@_where_the_run_lies
def begin(job: Job) -> None:
    """A run that has ended, and goes on, is not finished: its card goes, by which that is told."""
    if job.progress.stopped_of is None and job.step < job.total_steps:
        with disk_errors(job.run.card):
            job.run.card.unlink(missing_ok=True)


def save(job: Job) -> None:
    """A checkpoint of the job as it stands; where there is no validation, it is the result too."""
    _save(job)
    job.emit({"kind": "save", "step": job.progress.step, "path": str(job.run.checkpoint(job.progress.step))})


@_where_the_run_lies
def _save(job: Job) -> None:
    states = job.callbacks.state()
    kept = job.parameters | job.method.fixed
    checkpoint.save(job.run, job.progress, kept, job.optimizer, states, job.identity, seed=job.config.seed)
    checkpoint.prune(job.run, job.config.keep, job.progress)
    if job.progress.best_step is None:
        save_result(job)


@_where_the_run_lies
def save_result(job: Job) -> None:
    """The parameters as the run's result."""
    _write(job, _result(job))


@_where_the_run_lies
def finish(job: Job) -> None:
    """The run's result in its place: the best by validation loss, else the last; and the last beside it.

    A run that was killed after its last checkpoint may lack any of it.
    """
    best = job.progress.best_step
    checkpoint.prune(job.run, job.config.keep, job.progress)
    if best is None:
        save_result(job)
    elif best != job.progress.step:
        _write(job, job.run.last)
        if not _result(job).is_dir():
            raise UserError(
                f"the best result, of step {best}, is gone; last/ holds that of step {job.progress.step}",
                where=str(_result(job)),
                hint="put it back from a copy, or go on from last/ with --init-adapter",
            )
    elif job.run.last.exists():  # of when the run was shorter
        with disk_errors(job.run.last):
            remove(job.run.last)
    summary = run_summary(job.run, job.config, job.data.report.to_json())
    write_file(job.run.card, model_card(summary))


def _result(job: Job) -> Path:
    return job.run.path / job.method.folder


def _write(job: Job, folder: Path) -> None:
    job.method.write(folder, job.parameters, name_elsewhere(job.config.model))
