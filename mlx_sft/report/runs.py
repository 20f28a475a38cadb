"""The runs of a folder: which there are, how they stand, and which may be removed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_sft.console import duration, size
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import folder_bytes, read_errors, user_path
from mlx_sft.report.run import RunFiles
from mlx_sft.run_folder import RunFolder

COLUMNS = ("name", "model", "method", "rows", "steps", "loss", "best", "time", "state", "size")
LEFT = ("name", "model", "method", "state")


@dataclass(frozen=True)
class Listed:
    """A run in a list.

    Attributes:
        path: Of its folder.
        rows: That are trained on.
        step, planned: Steps taken and planned.
        loss: The mean training loss of the last steps; None before the first.
        best_loss, best_step: Of the best evaluation; None without one.
        seconds: That its steps and evaluations took.
        state: `running`, `finished`, `stopped`, or `unreadable`.
        bytes: Of its folder.
        problem: Why it cannot be read; empty where it can.
    """

    path: str
    model: str = ""
    method: str = ""
    rows: int = 0
    step: int = 0
    planned: int = 0
    loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    seconds: float = 0.0
    state: str = "unreadable"
    bytes: int = 0
    problem: str = ""

    def to_json(self) -> str:
        """On one line."""
        return json.dumps(asdict(self))

    def cells(self) -> list[str]:
        """As a person reads them, in the order of `COLUMNS`."""
        if self.problem:
            return [Path(self.path).name, *["-"] * 7, self.state, size(self.bytes)]
        steps = f"{self.step:,} of {self.planned:,}" if self.planned else f"{self.step:,}"
        best = f"{self.best_loss:.4f}" if self.best_loss is not None else "-"
        loss = f"{self.loss:.4f}" if self.loss is not None else "-"
        about = [Path(self.path).name, self.model, self.method, f"{self.rows:,}"]
        return [*about, steps, loss, best, duration(self.seconds), self.state, size(self.bytes)]


def runs_in(folder: str | Path) -> list[RunFolder]:
    """The runs in a folder, those that began last at the end.

    Raises:
        UserError: If the folder cannot be read.
    """
    place = user_path(folder)
    if not place.is_dir():
        hint = "name the folder that has the runs; `mlx-sft train` makes them under runs/"
        raise UserError("there is no such folder", where=str(folder), hint=hint, exit_code=USAGE)
    with read_errors(place):
        begun = [(path / "config.yaml", path) for path in place.iterdir() if path.is_dir()]
        there = [(config.stat().st_mtime, path.name, path) for config, path in begun if config.is_file()]
    return [RunFolder(path) for _, _, path in sorted(there)]


def listed(run: RunFolder) -> Listed:
    """How a run stands; of one that cannot be read, why."""
    try:
        files = read(run)
    except UserError as error:
        return Listed(str(run.path), bytes=bytes_of(run), problem=error.what)
    metrics = files.metrics
    best = metrics.best
    return Listed(
        path=str(run.path),
        model=files.model,
        method=files.method,
        rows=files.rows,
        step=metrics.totals.step,
        planned=files.planned,
        loss=metrics.last_loss,
        best_loss=best.loss if best else None,
        best_step=best.step if best else None,
        seconds=round(metrics.totals.seconds, 3),
        state=files.state,
        bytes=bytes_of(run),
    )


def read(run: RunFolder) -> RunFiles:
    """A run with all of its metrics; raises `UserError` for what is none, or cannot be read."""
    files = RunFiles.of(RunFolder.open(run.path))
    files.metrics.follow()
    return files


def bytes_of(run: RunFolder) -> int:
    """What its folder takes; of one that is being written, about."""
    with suppress(OSError):
        return folder_bytes(run.path)
    return 0


def to_remove(names: Sequence[str]) -> list[tuple[RunFolder, int]]:
    """Runs that are to be removed, each once, with the bytes that they take.

    Raises:
        UserError: For what is no run, is a link to one, or is being trained.
    """
    runs = {run.path.resolve(): run for run in map(RunFolder.removable, names)}
    return [(run, bytes_of(run)) for run in runs.values()]
