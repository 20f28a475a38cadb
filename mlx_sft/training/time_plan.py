"""`--for`: how many steps end, evaluated and saved, in a given time. A few are computed to see, and change nothing.

The number is settled before the first step and written to the run's configuration: the learning rate runs its whole course over them, and
a run that goes on takes the very steps that were planned.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console, duration, many
from mlx_sft.data.batches import collate, cut_step
from mlx_sft.data.prepare import PreparedData
from mlx_sft.data.steps import Plan, Step
from mlx_sft.errors import USAGE, UserError
from mlx_sft.methods import Parameters
from mlx_sft.settings import parse_duration
from mlx_sft.training import checkpoint
from mlx_sft.training.batch_settings import BatchSettings
from mlx_sft.training.failures import BatchFailed
from mlx_sft.training.schedule import planned_steps
from mlx_sft.training.step import GradientComputer

_TRIED = 0.02
"""Share of the time after which enough steps were tried."""
_MOST_TRIED = 8
_LOOKED_AT = 2000
"""Steps whose tokens are counted."""
_EVALUATED = 0.5
"""What a token takes in an evaluation, without gradients, beside one in a step."""
_MARGIN = 0.92
"""Of the time that is left, what is planned; updates, a machine that grows warm, and what is not foreseen take the rest."""
_BYTES_A_SECOND = 300e6
"""That a checkpoint is written at, its checksum included."""


@dataclass(frozen=True)
class Pace:
    """Seconds, as far as they were seen.

    Attributes:
        step: That a step takes.
        traces: That compiling takes, once.
        evaluation: That one takes.
        saving: That a checkpoint takes.
    """

    step: float
    traces: float
    evaluation: float
    saving: float

    def seconds(self, steps: int, config: TrainConfig, plan: Plan) -> float:
        """That so many steps take, with their evaluations and checkpoints, and the result."""
        evaluations, saves = (
            math.ceil(steps / (plan.steps_per_epoch if every == "epoch" else int(every)))
            for every in (config.eval_every, config.save_every)
        )
        return steps * self.step + self.traces + evaluations * self.evaluation + (saves + 1) * self.saving


def within_time(
    config: TrainConfig,
    plan: Plan,
    data: PreparedData,
    computer: GradientComputer,
    parameters: Parameters,
    settings: BatchSettings,
    *,
    checkpoint_bytes: int,
    started: float,
    console: Console,
) -> tuple[TrainConfig, Plan]:
    """The configuration and the plan with no more steps than end in the time that `--for` gives; as they are where all do.

    Args:
        computer: Set up as the run will compute.
        started: When the run was asked for, on the clock of `time.monotonic`.

    Raises:
        UserError: If not even one step does.
    """
    if config.time_limit is None:
        return config, plan
    limit, lengths = parse_duration(config.time_limit), data.train.needed_lengths

    def seconds_of(step: Step) -> float:
        """Of its gradient, once it is cut and collated, which in training another thread does."""
        micro_batches = cut_step(step.rows, data.train, settings.micro_batch_tokens, settings.layout)
        batches = [collate(data.train, micro_batch) for micro_batch in micro_batches]
        key = checkpoint.dropout_key(config.seed, step.number)
        before = time.perf_counter()
        computer.gradient(parameters, batches, key)
        return time.perf_counter() - before

    tried, traces = _tried(list(islice(plan.steps(), _MOST_TRIED)), seconds_of, computer, _TRIED * limit)
    tokens = [int(lengths[list(step.rows)].sum()) for step in islice(plan.steps(), _LOOKED_AT)]
    a_token = sum(tried) / sum(tokens[: len(tried)])
    pace = Pace(
        step=a_token * sum(tokens) / len(tokens),
        traces=traces,
        evaluation=_EVALUATED * a_token * (int(data.valid.needed_lengths.sum()) if data.valid else 0),
        saving=checkpoint_bytes / _BYTES_A_SECOND,
    )
    left = _MARGIN * (limit - (time.monotonic() - started))
    low, high = 0, plan.total_steps + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if pace.seconds(middle, config, plan) <= left else (low, middle)
    if low == 0:
        need = duration(pace.seconds(1, config, plan) / _MARGIN + limit - left / _MARGIN)
        what = f"--for {config.time_limit} is too short for a step, its evaluation and a checkpoint, which take about {need}"
        raise UserError(what, hint="give more time, or a smaller --batch-size or validation set", exit_code=USAGE)
    ends = "ends" if low == 1 else "end"
    console.note(
        f"--for {config.time_limit}: {low} of {many(plan.total_steps, 'step')} {ends} in it, at {pace.step:.2f} s a step"
        + (f" and {pace.evaluation:.1f} s an evaluation" if data.valid else "")
    )
    if low == plan.total_steps:
        return config, plan
    config = config.model_copy(update={"max_steps": low})
    return config, planned_steps(config, data)


def _tried(
    steps: Sequence[Step], seconds_of: Callable[[Step], float], computer: GradientComputer, most: float
) -> tuple[list[float], float]:
    """The seconds of each of the first steps that take no more than `most` together, each of which is tried twice and counts the
    second time; and those that compiling what is not compiled yet will take."""
    before, first, tried = len(computer.trace_seconds), 0.0, 0
    try:
        while tried < len(steps) and first <= most:
            first += seconds_of(steps[tried])
            tried += 1
        seconds = list(map(seconds_of, steps[:tried]))
    except BatchFailed as error:
        what = f"--for cannot tell what a step takes: {error.batch.message}"
        raise UserError(what, hint="give a smaller --micro-batch-tokens, or --max-steps in place of --for") from error
    traces = computer.trace_seconds[before:]
    to_come = len(computer.compiled) - len(traces)
    return seconds, to_come * (sum(traces) / len(traces)) if traces else 0.0
