"""report.html while a run trains, and as it ends, with its first sentences in the terminal then. It is written from the run's files now
and then, and never ends a run.

A checkpoint keeps nothing of it: what the page shows is in metrics.jsonl, which is read on from where it was read last.
"""

from __future__ import annotations

import shlex
import time
from typing import Any, ClassVar

from mlx_sft.errors import UserError
from mlx_sft.report.page import page_html
from mlx_sft.report.run import RunFiles, State
from mlx_sft.report.verdict import verdict
from mlx_sft.training.callbacks import Callback, Record, TrainingRun
from mlx_sft.writing import write_file

EVERY = 30.0
"""Seconds between two pages; more where writing one takes more than a hundredth of that."""
_SHARE = 100


class ReportPage(Callback):
    """The callback `report-page`."""

    name: ClassVar = "report-page"

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._run: TrainingRun | None = None
        self._files: RunFiles | None = None
        self._due = time.monotonic() + EVERY
        self._told = self._failed = self._ended = False

    def on_record(self, run: TrainingRun, record: Record) -> None:
        super().on_record(run, record)
        self._run = run
        if record["kind"] not in ("start", "end") and time.monotonic() >= self._due:
            self._write(run, "running")

    def on_end(self, run: TrainingRun, record: Record) -> None:
        self._ended = self._told = True
        self._write(run, "finished")
        if self._files is not None and not self._failed:
            for sentence in verdict(self._files, "finished"):
                run.console.note(sentence.text)
            run.console.note(f"try      mlx-sft chat --run {shlex.quote(str(run.folder.path))}")
            run.console.note(f"page     {run.folder.page}")

    def load_state(self, state: dict[str, Any]) -> None:
        """The metrics are cut back, and must be read from their start."""
        self._files = None

    def close(self) -> None:
        """A run that did not get to its end says so."""
        if self._run is not None and not self._ended:
            self._write(self._run, "stopped")

    def _write(self, run: TrainingRun, state: State) -> None:
        started = time.monotonic()
        try:
            if self._files is None:
                self._files = RunFiles.of(run.folder)
            self._files.metrics.planned = run.total_steps  # it may be less than at the start
            path = run.folder.page
            write_file(path, page_html(self._files, state))
        except UserError as error:
            if not self._failed:
                self._failed = True
                run.console.warn(f"the page of the run could not be written: {error.where}: {error.what}")
        else:
            if not self._told:
                self._told = True
                run.console.note(f"page     {path}")
        now = time.monotonic()
        self._due = now + max(EVERY, _SHARE * (now - started))
