"""What a run does about divergence (`--on-divergence`): warn, stop, or go back to before it and on with half the learning rate.

Nothing of a rollback is written but its line in the metrics: a run that is killed before its next checkpoint diverges again where it
did, and goes back again. Knows nothing of how a step is taken.
"""

from __future__ import annotations

from mlx_sft.errors import UserError
from mlx_sft.training import checkpoint
from mlx_sft.training.divergence import IN_A_ROW, bound
from mlx_sft.training.records import Metrics, rollback_record
from mlx_sft.training.setup import Job

MOST = 5
"""Rollbacks of a run; the rate is then a thirty-second of what was asked for."""

_FACTOR = 0.5


def answer_divergence(job: Job, metrics: Metrics) -> bool:
    """After a step: whether the run has gone back, so that its next step is another one.

    Raises:
        UserError: If the run is to stop, or cannot go back any more.
    """
    if job.progress.above_bound < IN_A_ROW:
        return False
    last = job.progress.step
    first = last - job.progress.above_bound + 1
    what = (
        f"the loss diverges: of steps {first} to {last} it is above {bound(job.progress.losses):.4g}, "
        "the bound by the steps before, or not finite"
    )
    if job.config.on_divergence == "ignore":
        if job.progress.above_bound == IN_A_ROW:
            job.console.warn(f"{what}; --on-divergence stop or rollback would not go on like this")
        return False
    before = [step for step in job.run.checkpoint_steps() if step < first]
    if job.config.on_divergence == "stop":
        raise UserError(what, where=str(job.run.path), hint=_way_on(job, before))
    if not before or job.progress.rollbacks == MOST:
        why = f"and it was rolled back {MOST} times before" if before else "and there is no checkpoint from before it"
        raise UserError(f"{what}, {why}", where=str(job.run.path), hint="start a new run with a lower --lr")
    _go_back(job, metrics, before[-1], what)
    return True


def _go_back(job: Job, metrics: Metrics, step: int, what: str) -> None:
    last, rollbacks = job.progress.step, job.progress.rollbacks + 1
    factor = job.progress.rate_factor * _FACTOR
    checkpoint.remove_after(job.run, step)
    progress, job.parameters = checkpoint.load(
        job.run, job.parameters, job.optimizer, job.identity, seed=job.config.seed
    )
    job.progress = progress.after(rate_factor=factor, rollbacks=rollbacks)
    job.console.warn(f"{what}; going back to step {step}, and on with {factor:g} times the learning rate")
    metrics.cut(progress.metrics_bytes)
    metrics.write(rollback_record(step, diverged_at=last, rate_factor=factor))


def _way_on(job: Job, before: list[int]) -> str:
    if not before:
        return "start a new run with a lower --lr; no checkpoint is from before it"
    resume = f"mlx-sft train --resume {job.run.path}"
    return (
        f"start a new run with a lower --lr, or go back to step {before[-1]} and on with half the rate: "
        f"{resume} --on-divergence rollback"
    )
