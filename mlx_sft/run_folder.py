"""The run folder: the one place that knows its file names."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from mlx_sft.errors import UserError
from mlx_sft.files import disk_errors, recover_replaced_folder, user_path, write_file


class RunFolder:
    """A run on disk.

    ```
    runs/x/
      config.yaml         the resolved configuration; `mlx-sft train --config` on it repeats the run
      environment.json    versions and machine
      data_report.json    every input row: kept, truncated or dropped, and why
      metrics.jsonl       a line an optimizer step and an evaluation
      adapter/            PEFT's files: the best by validation loss, else the last (weights/ for --method full)
      last/               the last, where adapter/ holds an earlier, better one
      checkpoints/        step-00000050/, ...: what --resume continues from
      README.md           a model card
    ```
    """

    def __init__(self, path: str | Path) -> None:
        self.path = user_path(path)
        self.config = self.path / "config.yaml"
        self.environment = self.path / "environment.json"
        self.data_report = self.path / "data_report.json"
        self.metrics = self.path / "metrics.jsonl"
        self.adapter = self.path / "adapter"
        self.weights = self.path / "weights"
        self.last = self.path / "last"
        self.checkpoints = self.path / "checkpoints"
        self.card = self.path / "README.md"
        self._made = False

    @classmethod
    def new(cls, path: str | Path) -> RunFolder:
        """A run that is to be made; refuses a folder that holds anything but the first files of a run that never began."""
        run = cls(path)
        with disk_errors(run.path):
            if run.path.exists() and (not run.path.is_dir() or not run._is_free()):
                resume = f"continue it with --resume {run.path}, or " if run.config.exists() else ""
                raise UserError(
                    "this folder already holds something",
                    where=str(run.path),
                    hint=f"{resume}give another --out",
                )
        return run

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """Make a new, empty run folder; refuse as `new` does."""
        run = cls.new(path)
        run._made = not run.path.exists()
        with disk_errors(run.path):
            run.path.mkdir(parents=True, exist_ok=True)
        return run

    def write_head(self, config: str, data_report: str, environment: str) -> None:
        """Write the files that a run begins with, all three or none; from then on it can be resumed."""
        try:
            write_file(self.data_report, data_report)
            write_file(self.environment, environment)
            write_file(self.config, config)
        except BaseException:
            for file in (self.data_report, self.environment, self.config):
                with suppress(OSError):  # what keeps it from being written may keep it from being removed
                    file.unlink(missing_ok=True)
            if self._made:
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    def _is_free(self) -> bool:
        names = {path.name.removeprefix(".writing-") for path in self.path.iterdir()}
        head = {self.data_report.name, self.environment.name, self.config.name}
        return names <= head and not self.config.exists()

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open a run that `train` made."""
        run = cls(path)
        if not run.config.is_file():
            raise UserError(
                "not a run folder: it has no config.yaml",
                where=str(run.path),
                hint="give the folder that `mlx-sft train` printed last, such as runs/...",
            )
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While the block runs, no other process writes this run. The lock is released when the process ends, even when it is killed.

        Raises:
            UserError: If another process holds it.
        """
        with disk_errors(self.path):
            descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                hint = "wait until it has ended, or end it; a run has one process at a time"
                raise UserError("another process is training this run", where=str(self.path), hint=hint) from error
            except OSError:
                pass  # not every file system has locks
            self._refuse_links_out()
            with disk_errors(self.checkpoints):
                for old in self.checkpoints.glob(".replaced-*"):
                    recover_replaced_folder(old.with_name(old.name.removeprefix(".replaced-")))
            yield
        finally:
            os.close(descriptor)

    def _refuse_links_out(self) -> None:
        """The maker of a folder must not decide where else this process writes."""
        inside = self.path.resolve()
        for path in sorted(self.path.rglob("*")):
            if path.is_symlink() and not path.resolve().is_relative_to(inside):
                raise UserError(
                    "a symbolic link out of the run folder, through which nothing is written",
                    where=str(path),
                    hint="remove it, or put in its place what it stands for",
                )

    @staticmethod
    def default_path(model: str) -> Path:
        """`runs/qwen3-0.6b-20260131-154500`, numbered further where that is taken."""
        base = f"{Path(model).resolve().name.lower()}-{datetime.now():%Y%m%d-%H%M%S}"
        path = Path("runs") / base
        number = 2
        while path.exists():
            path = Path("runs") / f"{base}-{number}"
            number += 1
        return path

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        digits = (p.name.removeprefix("step-") for p in self.checkpoints.glob("step-*") if p.is_dir())
        return sorted(int(step) for step in digits if step.isdecimal())
