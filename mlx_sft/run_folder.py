"""The run folder: the one place that knows its file names."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import disk_errors, open_regular, read_errors, read_json, read_text, sha256_line, user_path
from mlx_sft.gate import checked
from mlx_sft.near_paths import instead_of_run
from mlx_sft.writing import (
    is_temporary,
    path_of,
    recover_replaced_folder,
    refuse_link,
    remove,
    write_file,
    write_file_with,
)

CHECKPOINT_PARAMETERS, CHECKPOINT_SUMS = "parameters.safetensors", "SHA256SUMS"
"""In the folder of a checkpoint: what is trained, and the checksums of its files."""

MOST_SUMS_BYTES = 2**16
_WAITS = (0.01, 0.03, 0.1)
"""Seconds."""
LONGEST_METRIC = 2**20
"""Bytes; a longer line comes in pieces."""


class Inside:
    """A file or folder of a run by its path within, wherever the run lies now."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, run: RunFolder, kind: type[RunFolder]) -> Path:
        return run.path / self._name


def _lock(descriptor: int) -> None:
    """Raise `BlockingIOError` where another process has the lock, and not only for the moment in which it looks whether one does."""
    for wait in _WAITS:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(wait)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


class RunFolder:
    """A run on disk.

    ```
    runs/x/
      config.yaml         the resolved configuration; `mlx-sft train --config` on it repeats the run
      environment.json    versions and machine
      data_report.json    every input row: kept, truncated or dropped, and why
      metrics.jsonl       a line an optimizer step and an evaluation
      samples.jsonl       what the model answered to a few prompts before the first step and at each evaluation
      reference.safetensors  for preferences: log p of every text under the model as training started
      adapter/            PEFT's files: the best by validation loss, else the last (weights/ for --method full)
      last/               the last, where adapter/ holds an earlier, better one
      checkpoints/        step-00000050/, ...: what --resume continues from
      report.html         all of it as a page, while it trains and at its end
      tensorboard/        with --report-to tensorboard: its event files
      README.md           a model card, which is there once the run has finished
      error.log           the traceback of an error that nobody foresaw, where one ended the run
    ```
    """

    config, environment, data_report = Inside("config.yaml"), Inside("environment.json"), Inside("data_report.json")
    metrics, card, error_log = Inside("metrics.jsonl"), Inside("README.md"), Inside("error.log")
    reference, samples = Inside("reference.safetensors"), Inside("samples.jsonl")
    page = Inside("report.html")
    tensorboard = Inside("tensorboard")
    adapter, weights, last, checkpoints = Inside("adapter"), Inside("weights"), Inside("last"), Inside("checkpoints")

    def __init__(self, path: str | Path) -> None:
        self._path = user_path(path)
        self._held: int | None = None
        self._tell: Callable[[str], None] = lambda message: None
        self._made = False

    @property
    def path(self) -> Path:
        """The folder; while it is locked, where it lies now.

        Raises:
            UserError: If it was removed meanwhile.
        """
        if self._held is not None and not is_at(self._held, self._path):
            self._follow(self._held)
        return self._path

    def _follow(self, held: int) -> None:
        """Someone has renamed the folder that this process writes, or removed it; another one may have its place."""
        found = None
        with suppress(OSError):
            found = path_of(held)
        if found is None or not is_at(held, found):
            what = "the run folder was removed, or moved to another disk, while it was written"
            hint = "where there is a copy of it, go on with: mlx-sft train --resume COPY"
            raise UserError(what, where=str(self._path), hint=hint)
        self._tell(f"the run folder {self._path} is now {found}, where the run goes on")
        self._path = found
        self._remove_left()  # what was being written there when it was moved

    @classmethod
    def new(cls, path: str | Path) -> RunFolder:
        """A run that is to be made; refuses a folder that holds anything but the first files of a run that never began."""
        run = cls(path)
        with disk_errors(run.path):
            refuse_link(run.path)
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

    def note_on(self, error: BaseException) -> None:
        """Have an error on its way out say of which run it is; the inverse of `noted_on`."""
        error.add_note(f"{_NOTE}{self.path}")

    @classmethod
    def noted_on(cls, error: BaseException) -> list[RunFolder]:
        """The run that an error ended; none where it ended none."""
        notes = getattr(error, "__notes__", [])
        return [cls(note.removeprefix(_NOTE)) for note in notes if note.startswith(_NOTE)][:1]

    def write_head(
        self, config: str, data_report: str, environment: str, reference: Callable[[Path], None] | None = None
    ) -> None:
        """Write the files that a run begins with, all or none; from then on it can be resumed.

        Args:
            reference: Writes that file; None for a run that has none.
        """
        try:
            if reference is not None:
                write_file_with(self.reference, reference)
            write_file(self.data_report, data_report)
            write_file(self.environment, environment)
            write_file(self.config, config)
        except BaseException:
            for file in self._head:
                with suppress(OSError):  # what keeps it from being written may keep it from being removed
                    file.unlink(missing_ok=True)
            if self._made:
                shutil.rmtree(self.path, ignore_errors=True)
            raise

    @property
    def _head(self) -> tuple[Path, ...]:
        """What is written before the first step, in this order."""
        return self.reference, self.data_report, self.environment, self.config

    def _is_free(self) -> bool:
        head = {path.name for path in self._head if path != self.config}
        return all(path.name in head or is_temporary(path) for path in self.path.iterdir())

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open a run that `train` made; raises `UserError` for any other folder, and for one with what is no regular file."""
        run = cls(path)
        if not run.config.is_file():
            why = (
                "it has no config.yaml"
                if run.path.is_dir()
                else "it is a file"
                if run.path.exists()
                else "it is not there"
            )
            hint = instead_of_run(run.path) or "give the folder that `mlx-sft train` printed last, such as runs/..."
            raise UserError(f"not a run folder: {why}", where=str(run.path), hint=hint)
        checked(run.path, deep=True)
        return run

    @contextmanager
    def locked(self, tell: Callable[[str], None] = lambda message: None) -> Iterator[None]:
        """While the block runs, no other process writes this run. The lock is released when the process ends, even when it is killed.

        Args:
            tell: Is told where the folder is, when someone has renamed it.

        Raises:
            UserError: If another process holds it.
        """
        with self._claimed() as descriptor:
            self._refuse_links_out()
            with disk_errors(self.checkpoints):
                for old in self.checkpoints.glob(".replaced-?*"):
                    recover_replaced_folder(old.with_name(old.name.removeprefix(".replaced-")))
            self._remove_left()
            if is_at(descriptor, self._path):  # else this file system gives a folder several numbers
                self._held, self._tell = descriptor, tell
            try:
                yield
            finally:
                self._held = None

    @contextmanager
    def _claimed(self) -> Iterator[int]:
        """The folder, opened and locked; raises `UserError` as `locked` does."""
        with disk_errors(self.path):
            descriptor = os.open(self.path, os.O_RDONLY)
        try:
            try:
                _lock(descriptor)
            except BlockingIOError as error:
                hint = "wait until it has ended, or end it; a run has one process at a time"
                raise UserError("another process is training this run", where=str(self.path), hint=hint) from error
            except OSError:
                pass  # not every file system has locks
            yield descriptor
        finally:
            os.close(descriptor)

    @property
    def is_training(self) -> bool:
        """Whether a process is writing the run, as far as this file system tells."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return False

    @classmethod
    def removable(cls, path: str | Path) -> RunFolder:
        """A run that may be removed; raises `UserError` for what is none, is a link, or is being trained."""
        run = cls(path)
        refuse_link(run.path)
        needed = [file for file in run._head if file != run.reference]
        if missing := next((file.name for file in needed if not file.is_file()), None):
            hint = instead_of_run(run.path) or "give a folder that `mlx-sft runs` lists; what is no run is not removed"
            why = f"it has no {missing}" if run.path.exists() else "it is not there"
            raise UserError(f"not a run folder: {why}", where=str(run.path), hint=hint, exit_code=USAGE)
        with run._claimed():
            return run

    def remove(self) -> None:
        """Remove the folder with all that is in it; what links in it lead to stays. Raises `UserError` as `removable` does."""
        with self._claimed(), disk_errors(self.path):
            remove(self.path.absolute())

    def _remove_left(self) -> None:
        """Remove what a killed process was writing; as the run is locked, no one is writing it now."""
        for path in [*self._path.glob(".writing-*"), *self._path.glob("*/.writing-*")]:
            # What an export is writing into a folder here is no part of the run.
            kept = is_temporary(path.parent) or (path.is_dir() and path.parent.name != "checkpoints")
            if is_temporary(path) and not kept:
                with disk_errors(path):
                    remove(path)

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
        base = f"{user_path(model).resolve().name.lower()}-{datetime.now():%Y%m%d-%H%M%S}"
        path = Path("runs") / base
        number = 2
        while path.exists():
            path = Path("runs") / f"{base}-{number}"
            number += 1
        return path

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended: at its last step, or where a callback ended it. Its card is written last, and goes when it goes on."""
        return self.card.is_file()

    def refuse_unfinished(self, way_out: str = "") -> None:
        """Raise `UserError` for a run that has not ended.

        Args:
            way_out: How a checkpoint of it is used, before the steps that have one.
        """
        if self.is_finished:
            return
        steps = self.checkpoint_steps()
        planned = read_json(self.environment).get("total_steps") if self.environment.is_file() else None
        of = f" of {planned}" if isinstance(planned, int) else ""
        stands = f"step {steps[-1]}{of} is its newest checkpoint" if steps else "it has no checkpoint yet"
        finish = f"finish it with `mlx-sft train --resume {self.path}`"
        hint = "it is training now: wait until it ends" if self.is_training else finish
        hint += f", or {way_out} {_listed(steps)}" if steps and way_out else ""
        raise UserError(f"this run has not finished: {stands}", where=str(self.path), hint=hint)

    def trained_on(self) -> str | None:
        """The fingerprint of the checkpoint that the run began with; None where it does not say so."""
        if not self.environment.is_file():
            return None
        identity = read_json(self.environment).get("identity")
        found = identity.get("model") if isinstance(identity, dict) else None
        return found if isinstance(found, str) else None

    def best_step(self) -> int | None:
        """The step of the best evaluation so far, whose result is kept; None before the first."""
        best = None
        for line in self.metric_lines() if self.metrics.is_file() else ():
            with suppress(ValueError, RecursionError):  # a line that was cut is no evaluation
                record = json.loads(line)
                if isinstance(record, dict) and record.get("kind") == "evaluation" and record.get("best") is True:
                    best = record.get("step")
        return best if isinstance(best, int) else None

    def metric_lines(self, after: int = 0) -> Iterator[bytes]:
        """The lines of its metrics behind so many bytes; one that is longer than any comes in pieces."""
        with read_errors(self.metrics), open_regular(self.metrics) as file:
            file.seek(after)
            yield from iter(lambda: file.readline(LONGEST_METRIC), b"")

    def trained_parameters(self, step: int) -> Path:
        """The file with what was trained up to a step.

        Raises:
            UserError: If there is no checkpoint of the step, or the file is not as it was written.
        """
        steps, folder = self.checkpoint_steps(), self.checkpoint(step)
        if step not in steps:
            hint = f"those of {_listed(steps)} are there" if steps else "best and last are what it has"
            raise UserError(f"there is no checkpoint of step {step}", where=str(self.path), hint=hint, exit_code=USAGE)
        file = folder / CHECKPOINT_PARAMETERS
        with read_errors(folder, "give another --step"):
            sums = read_text(folder / CHECKPOINT_SUMS, most=MOST_SUMS_BYTES)
            written = sha256_line(file) in sums.splitlines(keepends=True)
        if not written:
            what = f"damaged checkpoint: {file.name} changed since it was written"
            raise UserError(what, where=str(folder), hint="give another --step")
        return file

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def checkpoint_steps(self) -> list[int]:
        """Steps that have a complete checkpoint, ascending."""
        named = ((path, path.name.removeprefix("step-")) for path in self.checkpoints.glob("step-*") if path.is_dir())
        return sorted(
            int(digits) for path, digits in named if digits.isdecimal() and path == self.checkpoint(int(digits))
        )


def is_at(held: int, path: Path) -> bool:
    """Whether an open folder lies at a path."""
    try:
        return os.path.samestat(os.fstat(held), path.stat())
    except OSError:
        return False


_NOTE = "this ended the run in "

_MOST_LISTED = 6


def _listed(steps: list[int]) -> str:
    """The numbers of steps, of many the newest."""
    return ("..., " if len(steps) > _MOST_LISTED else "") + ", ".join(map(str, steps[-_MOST_LISTED:]))
