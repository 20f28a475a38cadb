"""What the terminal shows of steps and evaluations, with the time that is left."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from mlx_sft.registry import OBJECTIVES
from mlx_sft.training.callbacks import Callback, Record, TrainingRun


class Terminal(Callback):
    """The callback `terminal`."""

    name: ClassVar = "terminal"

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._since: float | None = None
        self._first = 0

    def on_record(self, run: TrainingRun, record: Record) -> None:
        super().on_record(run, record)
        if record["kind"] in ("start", "rollback"):
            self._since, self._first = None, record["step"]

    def on_step(self, run: TrainingRun, record: Record) -> None:
        if self._since is None:  # what stands before the first step is no part of the pace
            self._since = time.perf_counter() - record["seconds"]
        steps = max(1, record["step"] - self._first)  # none where a run goes on with what followed its last step
        a_step = (time.perf_counter() - self._since) / steps
        left = a_step * (run.total_steps - record["step"])
        run.console.step(record, run.total_steps, left, OBJECTIVES[run.config.objective].shown)

    def on_evaluation(self, run: TrainingRun, record: Record) -> None:
        run.console.evaluation(record, OBJECTIVES[run.config.objective].shown)
