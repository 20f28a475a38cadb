"""report.html while a run trains, and as it ends, with its first sentences in the terminal then; with `--live` also in a browser, as it
changes. It never ends a run.

A checkpoint keeps nothing of it: what the page shows is in metrics.jsonl, which is read on from where it was read last.
"""

from __future__ import annotations

import shlex
import time
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from mlx_sft.config import TrainConfig
from mlx_sft.errors import USAGE, UserError
from mlx_sft.report.live import LivePage, next_time
from mlx_sft.report.page import page_html
from mlx_sft.report.run import RunFiles, State
from mlx_sft.report.verdict import verdict
from mlx_sft.settings import OnResume, Settings
from mlx_sft.training.callbacks import Callback, Record, TrainingRun
from mlx_sft.writing import write_file

if TYPE_CHECKING:
    from mlx_sft.data.prepare import PreparedData

EVERY = 30.0
"""Seconds between two pages; more where writing one takes more than a hundredth of that."""
_SHARE = 100


class ReportPageSettings(Settings):
    """Settings of the page of a run."""

    live: Annotated[bool, OnResume.FREE] = False
    """Serve the run's page on this machine while it trains, where it changes by itself; the address is told at the start."""
    port: Annotated[int | None, OnResume.FREE] = Field(default=None, ge=1, le=65535)
    """With --live: the port; one that is free where not given."""


class ReportPage(Callback):
    """The callback `report-page`."""

    name: ClassVar = "report-page"
    Settings: ClassVar = ReportPageSettings

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._run: TrainingRun | None = None
        self._files: RunFiles | None = None
        self._live: LivePage | None = None
        self._due = time.monotonic() + EVERY
        self._live_due = 0.0
        self._told = self._failed = self._ended = False

    def check(self, config: TrainConfig, data: PreparedData) -> None:
        if self.settings.port is not None and not self.settings.live:
            raise UserError("--port goes with --live", hint="give both, or leave it out", exit_code=USAGE)
        if self.settings.live and (config.quiet or config.json_lines):
            option = "--quiet" if config.quiet else "--json"
            raise UserError(f"with {option} nobody is told the address of --live", hint=f"leave {option} out, or look at the page with "
                            "`mlx-sft report RUN --serve`", exit_code=USAGE)  # fmt: skip

    def on_record(self, run: TrainingRun, record: Record) -> None:
        super().on_record(run, record)
        self._run = run
        if record["kind"] in ("start", "end"):
            return
        if time.monotonic() >= self._due:
            self._write(run, "running")
        if self._live and self._live.is_watched and time.monotonic() >= self._live_due:
            began = time.monotonic()
            if (page := self._page(run, "running", live=True)) is not None:
                self._live.publish(page)
            self._live_due = next_time(began)

    def on_start(self, run: TrainingRun, record: Record) -> None:
        if self.settings.live and (page := self._page(run, "running", live=True)) is not None:
            try:
                self._live = _served(run, page, self.settings.port)
            except UserError as error:
                run.console.warn(f"the page of the run is not served: {error.what}")
                return
            run.console.note(f"live     {self._live.url}")

    def on_end(self, run: TrainingRun, record: Record) -> None:
        self._ended = self._told = True
        self._write(run, "finished")
        if self._files is not None and not self._failed:
            for sentence in verdict(self._files, "finished"):
                run.console.note(sentence.text)
            run.console.note(f"try      mlx-sft chat {shlex.quote(str(run.folder.path))}")
            run.console.note(f"page     {run.folder.page}")

    def close(self) -> None:
        """A run that did not get to its end says so."""
        if self._run is None:
            return
        if not self._ended:
            self._failed = True  # what ended the run is said, and not what keeps this from being written
            self._write(self._run, "stopped")
        if self._live is not None:
            page = self._page(self._run, "finished" if self._ended else "stopped", live=True)
            last_words = f"The run has ended, and with it the server of this page. It stays as {self._run.folder.page}."
            self._live.end(page or self._live.page, last_words)

    def _page(self, run: TrainingRun, state: State, *, live: bool = False) -> str | None:
        """None where the files of the run cannot be read, which is said once."""
        try:
            if self._files is None:
                self._files = RunFiles.of(run.folder)
            self._files.metrics.planned = run.total_steps  # it may be less than at the start
            return page_html(self._files, state, live=live)
        except UserError as error:
            self._warn(run, error)
            return None

    def _write(self, run: TrainingRun, state: State) -> None:
        started = time.monotonic()
        if (page := self._page(run, state)) is not None:
            try:
                write_file(run.folder.page, page)
            except UserError as error:
                self._warn(run, error)
            else:
                if not self._told:
                    self._told = True
                    run.console.note(f"page     {run.folder.page}")
        now = time.monotonic()
        self._due = now + max(EVERY, _SHARE * (now - started))

    def _warn(self, run: TrainingRun, error: UserError) -> None:
        if not self._failed:
            self._failed = True
            run.console.warn(f"the page of the run could not be written: {error.where}: {error.what}")


def _served(run: TrainingRun, page: str, port: int | None) -> LivePage:
    """On the port that was asked for, or where another program has it on one that is free."""
    try:
        return LivePage(page, port)
    except UserError as error:
        if port is None:
            raise
        run.console.warn(f"{error.what}; the page of the run is served on another")
        return LivePage(page)
