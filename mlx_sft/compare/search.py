"""Which learning rate, and how many steps: successive halving (Jamieson & Talwalkar 2016, https://arxiv.org/abs/1502.07943).

    rung      steps    learning rates (of six)
    1         R / 6    all
    2         R        the two with the lowest validation loss, of which the better one is the result

Each trial is a run of its own, with a whole course of the learning rate; so a candidate takes three times the R steps of a longest run. Two
are trained to the end because short runs like high rates: what looked best may be too high for a run that is six times as long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mlx_sft.compare.trials import Trial, evaluations_of
from mlx_sft.console import duration, many
from mlx_sft.errors import USAGE, UserError

REDUCTION, LONGER = 3, 6
"""A rung has a third of the rates of the one before it, and six times the steps."""
_FINALISTS = 2
"""Rates that are trained to the end, at most."""
_FEWEST = 5
"""Steps below which a trial says nothing of its rate."""


@dataclass(frozen=True)
class Rung:
    """So many rates, each tried for so many steps."""

    rates: int
    steps: int


def rungs(rates: int, steps: int) -> list[Rung]:
    """From all the rates to those that are trained for `steps`."""
    counts = [rates]
    while counts[-1] > _FINALISTS:
        counts.append(math.ceil(counts[-1] / REDUCTION))
    lengths = [max(_FEWEST, round(steps / LONGER ** (len(counts) - 1 - at))) for at in range(len(counts) - 1)]
    # Where the run is short, a rung that is as long as the last one is the last one.
    early = [Rung(count, length) for count, length in zip(counts, lengths, strict=False) if length < steps]
    return [*early, Rung(counts[len(early)], steps)]


def halving(rates: Sequence[float], steps: int, trial: Callable[[float, int], Trial]) -> Iterator[tuple[Trial, bool]]:
    """Every trial, and whether it is one of the longest, of which the best is the result; none follows where all of a rung failed.

    Of equal losses the lower rate is taken.
    """
    left = sorted(rates)
    for rung in rungs(len(left), steps):
        tried = []
        for rate in left[: rung.rates]:
            tried.append(trial(rate, rung.steps))
            yield tried[-1], rung.steps == steps
        left = [one.rate for one in sorted(tried, key=by_loss) if one.failed is None and one.loss is not None]


def by_loss(trial: Trial) -> tuple[float, float]:
    """What the best trial has the least of."""
    return math.inf if trial.loss is None else trial.loss, trial.rate


@dataclass(frozen=True)
class Pace:
    """What a candidate's runs take, as its first one showed.

    Attributes:
        step, evaluation: Seconds of one.
        around: Seconds of a run beside these: loading, saving.
        rates: How many learning rates it tries.
    """

    step: float
    evaluation: float
    around: float
    rates: int

    @classmethod
    def of(cls, trial: Trial, rates: int) -> Pace:
        """As a trial showed it."""
        around = trial.wall - trial.steps * trial.step_seconds - evaluations_of(trial.steps) * trial.evaluation_seconds
        return cls(trial.step_seconds, trial.evaluation_seconds, max(0.0, around), rates)

    def seconds(self, steps: int) -> float:
        """Of all its trials."""
        return sum(
            rung.rates * (self.around + rung.steps * self.step + evaluations_of(rung.steps) * self.evaluation)
            for rung in rungs(self.rates, steps)
        )


def steps_within(paces: Sequence[Pace], seconds: float, most: int) -> int:
    """The most steps, up to `most`, with which the trials of all these candidates end in this time.

    Raises:
        UserError: If not even the shortest do.
    """

    def needed(steps: int) -> float:
        return sum(pace.seconds(steps) for pace in paces)

    fewest = min(_FEWEST, most)
    if needed(fewest) > seconds:
        what = f"the time is too short: runs of {many(fewest, 'step')} take about {duration(needed(fewest))} in all"
        hint = "give --budget-minutes more, fewer --methods, or fewer --learning-rates"
        raise UserError(what, hint=hint, exit_code=USAGE)
    low, high = fewest, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= seconds else (low, middle)
    return low
