"""Runs as processes that take a tenth of a second to start: forked from one that has imported everything and computed nothing.

On macOS, whose Metal does not survive a fork, they are started afresh instead. Knows nothing of what is done to them: a child's `faults`
install themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from tests.faults.injected import Fault

LONGEST = 300.0
"""Seconds of the processor after which a child is taken to hang; it takes one or two. Not of the clock: the machine may have other work."""
IDLE = 120.0
"""Seconds of the clock in which a child has used none of the processor's after which it is taken to hang too."""

_PRELOADED = ["mlx_sft.cli", "mlx_sft.convert.export", "mlx_sft.training.loop", "tests.faults.children"]
_numbers = count(1)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: `code` is negative for a signal."""

    code: int
    out: str
    err: str


class Child:
    """`mlx-sft` with some words, in a process of its own group.

    Args:
        words: What would be typed behind `mlx-sft`.
        folder: What faults are about: they count the calls that change something in it.
        said: Folder for what it says.
        environment: Besides this process's own.
    """

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        said: Path,
        environment: Mapping[str, str],
        faults: Sequence[Fault] = (),
    ) -> None:
        name = f"{os.getpid()}-{next(_numbers)}"
        self._out, self._err = said / f"{name}.out", said / f"{name}.err"
        self._words = words
        for path in (self._out, self._err):  # it may be killed before it opens them
            path.touch()
        # Daemonic: it ends with this process.
        arguments = (list(words), folder, dict(environment), list(faults), self._out, self._err)
        self._process = _context().Process(target=_live, args=arguments, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()

    def is_stopped(self) -> bool:
        """Whether it is put aside, as Ctrl-Z does."""
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)
        except psutil.NoSuchProcess:
            return False

    def wait(self) -> Ended:
        """Until it ends; raises `TimeoutError` for one that does not."""
        self.until(lambda: bool(self._process.join(1.0)))
        return Ended(self._process.exitcode, self._out.read_text(), self._err.read_text())

    def until(self, reached: Callable[[], bool]) -> bool:
        """Wait until something is so; False where it ends before. Raises `TimeoutError` for one that hangs."""
        used, since = -1.0, time.monotonic()
        while self.is_alive():
            if reached():
                return True
            if (now := self._processor_seconds()) != used:
                used, since = now, time.monotonic()
            if used > LONGEST or time.monotonic() > since + IDLE:
                self.kill()
                raise TimeoutError(f"hangs, after {used:.0f} seconds of the processor: mlx-sft {' '.join(self._words)}")
            time.sleep(0.005)
        return False

    def _processor_seconds(self) -> float:
        try:
            return sum(psutil.Process(self.pid).cpu_times()[:2])
        except psutil.Error:
            return 0.0


def _context() -> Any:
    if sys.platform == "darwin":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


# In the child


def _live(
    words: list[str], folder: Path, environment: dict[str, str], faults: list[Fault], out: Path, err: Path
) -> None:
    os.setpgid(0, 0)  # a group that has no parent outside of it cannot be stopped
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore it, those of `nohup` a SIGHUP
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ.update(environment)
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    for name in _PRELOADED:  # nothing is to be done where they are
        import_module(name)
    from mlx_sft.cli import main

    for fault in faults:
        fault.install(folder)
    main(words, prog_name="mlx-sft")
