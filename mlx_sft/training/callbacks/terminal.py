"""What the terminal shows of steps and evaluations, with the time that is left; in a notebook a display with a curve takes its place."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from mlx_sft.console import step_line
from mlx_sft.registry import OBJECTIVES
from mlx_sft.report.metrics import Smoothed, smoothed
from mlx_sft.training.callbacks import Callback, Record, TrainingRun
from mlx_sft.training.notebook import NotebookDisplay, is_notebook


class Terminal(Callback):
    """The callback `terminal`."""

    name: ClassVar = "terminal"

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._since: float | None = None
        self._first = 0
        self._loss: Smoothed = smoothed(0)
        self._display: NotebookDisplay | None = None
        self._run: TrainingRun | None = None

    def on_record(self, run: TrainingRun, record: Record) -> None:
        super().on_record(run, record)
        if record["kind"] in ("start", "rollback"):
            self._since, self._first = None, record["step"]
            self._loss = smoothed(run.total_steps)

    def on_start(self, run: TrainingRun, record: Record) -> None:
        if is_notebook() and not (run.config.quiet or run.config.json_lines):
            self._display, self._run = NotebookDisplay(run.folder, run.step, run.total_steps), run

    def on_step(self, run: TrainingRun, record: Record) -> None:
        if self._since is None:  # what stands before the first step is no part of the pace
            self._since = time.perf_counter() - record["seconds"]
        steps = max(1, record["step"] - self._first)  # none where a run goes on with what followed its last step
        a_step = (time.perf_counter() - self._since) / steps
        left = a_step * (run.total_steps - record["step"])
        if record["loss"] is not None:
            self._loss.add(record["step"], record["loss"])
        shown = OBJECTIVES[run.config.objective].shown
        if self._display is not None:
            line = step_line(record, run.total_steps, left, shown, self._loss.value)
            self._display.show(record["step"], run.total_steps, line)
        else:
            run.console.step(record, run.total_steps, left, shown, self._loss.value)

    def on_evaluation(self, run: TrainingRun, record: Record) -> None:
        run.console.evaluation(record, OBJECTIVES[run.config.objective].shown)

    def on_end(self, run: TrainingRun, record: Record) -> None:
        """The live line stays as it stands, and what is said of the run comes below it."""
        run.console.stop()

    def close(self) -> None:
        if self._display is not None and self._run is not None:
            self._display.show(self._run.step, self._run.total_steps, at_once=True)
