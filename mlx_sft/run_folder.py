"""The run folder: the one place that knows its file names, and how a file is written so that it is whole or absent.

Knows nothing of what the files mean.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_sft.console import size
from mlx_sft.errors import USAGE, UserError


def user_path(name: str | Path) -> Path:
    """A path as a person wrote it, with `~` put in full; raises `UserError` for one that cannot even be looked for."""
    try:
        path = Path(name).expanduser()
        path.exists()
    except RuntimeError:  # `~` of an unknown user
        return Path(name)
    except OSError as error:
        what, hint = f"cannot be read: {error.strerror}", "check the path"
        raise UserError(what, where=str(name), hint=hint, exit_code=USAGE) from error
    return path


@contextmanager
def disk_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn a failed write into a `UserError` that names the place and a way out.

    Args:
        needed: Bytes that are to be written, where that is known.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            some = size(needed) if needed else "some space"
            hint = f"free {some}; what was written before is intact, and a run goes on with --resume"
            raise UserError("the disk is full", where=str(path), hint=hint) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "choose a folder that you may write to"
            raise UserError("no permission to write here", where=str(path), hint=hint) from error
        hint = "check the path and the disk; what was written before is intact"
        raise UserError(f"cannot write: {error.strerror or error}", where=str(path), hint=hint) from error


def sync(descriptor: int) -> None:
    """Make what was written survive a loss of power."""
    os.fsync(descriptor)
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone leaves it in the drive's cache
        with suppress(OSError):  # which not every file system can empty
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)


def sync_path(path: Path) -> None:
    """`sync` for a file's content, or for the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file that is the old one or the new one at every instant, never a part."""
    write_file_with(path, lambda temporary: _write(temporary, content))


def write_file_with(path: Path, write: Callable[[Path], None]) -> None:
    """As `write_file`, where `write(temporary_path)` does the writing.

    The temporary name keeps the suffix, because some writers choose their format by it.
    """
    temporary = path.with_name(f".writing-{path.name}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            sync_path(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_path(path.parent)


def free_folder(to: str | Path) -> Path:
    """A folder to write, resolved; raises `UserError` where it already holds something."""
    target = Path(to).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("this folder already holds something", where=str(to), hint="give another --to")
    return target


@contextmanager
def write_folder(path: Path, needed: int = 0) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` when the block ends well, remove it when not.

    A folder already at `path` is replaced.

    Args:
        needed: Bytes that it will take, where that is known.
    """
    temporary = path.with_name(f".writing-{path.name}")
    with disk_errors(path, needed):
        put_back(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for written in [*temporary.rglob("*"), temporary]:
                sync_path(written)
            _replace_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync_path(path.parent)


def put_back(path: Path) -> None:
    """Undo what a process left that was killed while it replaced this folder: the old one is in its place again."""
    old = path.with_name(f".replaced-{path.name}")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.is_dir():
        old.rename(path)


def _replace_folder(new: Path, path: Path) -> None:
    if not path.exists():
        new.rename(path)
        return
    old = path.with_name(f".replaced-{path.name}")
    path.rename(old)
    new.rename(path)
    shutil.rmtree(old)


def _write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


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
        """A run that is to be made; refuses a folder that holds anything but the head of a run that never began."""
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
        """Write what a run begins with, all of it or nothing; from then on it can be resumed."""
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
        """While the block runs, no other process writes this run. The lock ends with its process, however that ends.

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
                    put_back(old.with_name(old.name.removeprefix(".replaced-")))
            yield
        finally:
            os.close(descriptor)

    def _refuse_links_out(self) -> None:
        """Who made the folder must not choose where else this process writes."""
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
        """Steps that have a whole checkpoint, ascending."""
        digits = (p.name.removeprefix("step-") for p in self.checkpoints.glob("step-*") if p.is_dir())
        return sorted(int(step) for step in digits if step.isdecimal())
