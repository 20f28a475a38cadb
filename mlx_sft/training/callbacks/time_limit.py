"""`--for`: a run that is slower than it was planned to be still ends in its time, evaluated and saved.

How many steps are planned is settled before the first of them (`training/time_plan.py`). A Mac that grows warm is slower than it was then:
at a checkpoint, the steps that are left become as many as there is time for. What cannot wait for a checkpoint ends the run.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, TypeAdapter

from mlx_sft.config import TrainConfig
from mlx_sft.console import many
from mlx_sft.errors import UserError
from mlx_sft.settings import parse_duration
from mlx_sft.training.callbacks import Callback, Record, TrainingRun

if TYPE_CHECKING:
    from mlx_sft.data.prepare import PreparedData

_SAVING = 5.0
"""Seconds that are kept for the last checkpoint and the result."""
_WINDOW = 10
"""Steps, and what happens between them, that tell the pace."""
_SLOWER = 0.95
"""Of the planned steps, below which fewer are planned."""


_SECONDS: TypeAdapter[float] = TypeAdapter(Annotated[float, Field(ge=0, allow_inf_nan=False)])


class TimeLimit(Callback):
    """The callback `time-limit`. The time of a run that was resumed is what it took up to its checkpoint, and what came after that."""

    name: ClassVar = "time-limit"

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._limited = False
        self._started = time.monotonic()
        self._before = 0.0
        self._valid_tokens = 0
        self._evaluation: float | None = None
        """Seconds that the last one took."""
        self._is_up = False
        self._times: deque[float] = deque(maxlen=_WINDOW)
        """When the last steps ended."""

    def check(self, config: TrainConfig, data: PreparedData) -> None:
        self._limited = config.time_limit is not None
        self._valid_tokens = int(data.valid.lengths.sum()) if data.valid else 0

    def on_start(self, run: TrainingRun, record: Record) -> None:
        limit = run.config.time_limit
        if limit is not None and run.step < run.total_steps and self._used() >= parse_duration(limit):
            what = f"the {limit} of --for are used up, after step {run.step} of {run.total_steps}"
            raise UserError(what, where=str(run.folder.path), hint="give --resume with a longer --for")

    def on_step(self, run: TrainingRun, record: Record) -> None:
        limit = run.config.time_limit
        if limit is None or run.step == run.total_steps:
            return
        self._times.append(time.monotonic())
        if self._evaluation is None:  # which takes less than training on as many tokens
            self._evaluation = self._valid_tokens / record["tokens_per_second"]
        if record["seconds"] > self._left(limit):
            self._is_up = True
            run.stop(f"the time is up (--for {limit}); --resume with a longer one goes on")

    def on_save(self, run: TrainingRun, record: Record) -> None:
        limit = run.config.time_limit
        if limit is None or self._is_up or len(self._times) < _WINDOW:
            return  # a run that has stopped keeps its plan, for when it is given more time
        pace = max(1e-6, self._times[-1] - self._times[0]) / (_WINDOW - 1)
        end = run.step + max(1, int(self._left(limit) / pace))
        if end < _SLOWER * run.total_steps and run.step < run.total_steps:
            run.console.note(
                f"at {pace:.2f} s a step, --for {limit} is time for {many(end, 'step')}, not {run.total_steps}"
            )
            run.shorten(end)

    def on_evaluation(self, run: TrainingRun, record: Record) -> None:
        # With the samples, which the callback before this one has written.
        since = time.monotonic() - self._times[-1] if self._times else 0.0
        self._evaluation = max(record["seconds"], since)

    def _left(self, limit: str) -> float:
        """Seconds for further steps."""
        return parse_duration(limit) - self._used() - (self._evaluation or 0) - _SAVING

    def _used(self) -> float:
        return self._before + time.monotonic() - self._started

    def state(self) -> dict[str, Any]:
        return {"seconds": round(self._used(), 3)} if self._limited else {}

    def load_state(self, state: dict[str, Any]) -> None:
        self._before = _SECONDS.validate_python(state.get("seconds", 0.0))
