"""A loss that diverges: several losses in a row above a bound that moves with those before them.

    bound = median + max(4 · deviation, 1 nat), of the last 50 losses that were within their own bound

The deviation is the median one, scaled as a normal distribution's, so that a steep beginning or a hard row says little. Losses above the
bound do not move it: it does not follow them. `--on-divergence` says what is done: warn, stop, or go back to before it and on with half the
learning rate. Nothing of a rollback is written but its line in the metrics: a run that is killed before its next checkpoint diverges again
where it did, and goes back again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, FiniteFloat, NonNegativeInt

from mlx_sft.errors import UserError
from mlx_sft.settings import OnResume, Settings
from mlx_sft.training.callbacks import Callback, Record, TrainingRun

MOST_ROLLBACKS = 5
"""The rate is then a thirty-second of what was asked for."""

FACTOR = 0.5

IN_A_ROW = 3
"""Losses above the bound that are a divergence: one or two may be of hard rows."""

_WINDOW = 50
_DEVIATIONS = 4.0
_OF_NORMAL = 1.4826
"""A normal distribution's standard deviation is so many of its median deviations (Rousseeuw & Croux 1993)."""
_LEAST = 1.0
_FEW = 10
"""Fewer losses say little of what is usual; then the bound is wide."""
_FEW_LEAST = 4.0


def bound(within: Sequence[float]) -> float:
    """The most that the next loss may be, in nats, after losses that were within their bounds; infinite before the first."""
    if not within:
        return math.inf
    middle = median(within)
    deviation = _OF_NORMAL * median(abs(loss - middle) for loss in within)
    return middle + max(_DEVIATIONS * deviation, _LEAST if len(within) >= _FEW else _FEW_LEAST)


def observe(within: Sequence[float], above: int, loss: float | None) -> tuple[tuple[float, ...], int]:
    """What is known after a further loss.

    Args:
        within: The last losses that were within their bounds.
        above: How many in a row were above, up to now.
        loss: None where a step had no finite one.
    """
    if loss is None or loss > bound(within):
        return tuple(within), above + 1
    return (*within, loss)[-_WINDOW:], 0


class DivergenceSettings(Settings):
    """Settings of the watch over the loss."""

    on_divergence: Annotated[Literal["ignore", "stop", "rollback"], OnResume.REVISED] = "ignore"
    """Where the loss leaves a bound that moves with it: warn, stop the run, or go back to the checkpoint before and on with half
    the learning rate."""


class _State(BaseModel):
    losses: Annotated[tuple[FiniteFloat, ...], Field(max_length=_WINDOW)] = ()
    above_bound: NonNegativeInt = 0
    rollbacks: Annotated[int, Field(ge=0, le=MOST_ROLLBACKS)] = 0


class Divergence(Callback):
    """The callback `divergence`."""

    name: ClassVar = "divergence"
    Settings: ClassVar = DivergenceSettings

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self.may_go_back = self.settings.on_divergence == "rollback"
        self._state = _State()

    def on_start(self, run: TrainingRun, record: Record) -> None:
        run.suspect(self._state.above_bound)

    def on_step(self, run: TrainingRun, record: Record) -> None:
        losses, above = observe(self._state.losses, self._state.above_bound, record["loss"])
        self._state.losses, self._state.above_bound = losses, above
        run.suspect(above)
        if above < IN_A_ROW:
            return
        last = record["step"]
        first = last - above + 1
        what = (
            f"the loss diverges: of steps {first} to {last} it is above {bound(losses):.4g}, "
            "the bound by the steps before, or not finite"
        )
        if self.settings.on_divergence == "ignore":
            if above == IN_A_ROW:
                run.console.warn(f"{what}; --on-divergence stop or rollback would not go on like this")
            return
        where = str(run.folder.path)
        before = [step for step in run.folder.checkpoint_steps() if step < first]
        if self.settings.on_divergence == "stop":
            raise UserError(what, where=where, hint=_way_on(where, before))
        if not before or self._state.rollbacks == MOST_ROLLBACKS:
            often = f"and it was rolled back {MOST_ROLLBACKS} times before"
            why = often if before else "and there is no checkpoint from before it"
            raise UserError(f"{what}, {why}", where=where, hint="start a new run with a lower --lr")
        self._go_back(run, last, before[-1], what)

    def _go_back(self, run: TrainingRun, last: int, step: int, what: str) -> None:
        rollbacks = self._state.rollbacks + 1
        factor = FACTOR**rollbacks
        run.go_back(step, rate_factor=factor)
        self._state.rollbacks = rollbacks  # the checkpoint does not know of this one
        run.console.warn(f"{what}; going back to step {step}, and on with {factor:g} times the learning rate")
        run.emit({"kind": "rollback", "step": step, "diverged_at": last, "learning_rate_factor": factor})

    def state(self) -> dict[str, Any]:
        return self._state.model_dump(mode="json")

    def load_state(self, state: dict[str, Any]) -> None:
        self._state = _State.model_validate(state)


def _way_on(run: str, before: list[int]) -> str:
    if not before:
        return "start a new run with a lower --lr; no checkpoint is from before it"
    return (
        f"start a new run with a lower --lr, or go back to step {before[-1]} and on with half the rate: "
        f"mlx-sft train --resume {run} --on-divergence rollback"
    )
