"""What is done to a process from inside of it: killed, stopped or held up at a call, told that the disk is full, given another clock.

Each is data that can be pickled, `install(folder)`ed by the child for the rest of its life; calls are counted from 1 over what the child
does in `folder`. Knows nothing of what the process is there for.
"""

from __future__ import annotations

import errno
import os
import pty
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime, tzinfo
from functools import partial
from itertools import count
from pathlib import Path
from typing import Protocol

from tests.faults.layer import CHANGES, Call, Watch, bound_names, watched

TAKES_SPACE = frozenset({"open", "write", "fsync", "rename", "mkdir"})
"""The calls that a full disk may refuse."""

_for_life = ExitStack()
"""Never closed: a fault stays until its process ends."""


class Fault(Protocol):
    def install(self, folder: Path) -> None: ...


class _Counting:
    """Counts the calls of some names; the fault comes before the call `at`."""

    def __init__(
        self, at: int, names: frozenset[str], strike: Callable[[Call], None], *, lasting: bool = False
    ) -> None:
        self._at, self._names, self._strike, self._lasting = at, names, strike, lasting
        self._made = 0

    def before(self, call: Call) -> None:
        if call.name in self._names:
            self._made += 1
            if self._made == self._at or (self._lasting and self._made > self._at):
                self._strike(call)

    def after(self, call: Call) -> None:
        pass


def _install(folder: Path, watch: Watch) -> None:
    _for_life.enter_context(watched(folder, watch))


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL before the call `at`, of which a share is done if it is a write."""

    at: int
    share: float = 0.0

    def install(self, folder: Path) -> None:
        _install(folder, _Counting(self.at, CHANGES, self._strike))

    def _strike(self, call: Call) -> None:
        call.write_part(self.share)
        _killed()


@dataclass(frozen=True, slots=True)
class Refuse:
    """The call `at` fails with an error of the system, of which a share is done if it is a write; all that follow too if it lasts.

    Args:
        error: Such as `errno.ENOSPC`.
        names: The calls that count, and can fail.
    """

    at: int
    error: int
    names: frozenset[str]
    share: float = 0.0
    lasting: bool = False

    def install(self, folder: Path) -> None:
        _install(folder, self.watch())

    def watch(self) -> Watch:
        return _Counting(self.at, self.names, self._strike, lasting=self.lasting)

    def _strike(self, call: Call) -> None:
        with suppress(OSError):
            call.write_part(self.share)
        raise OSError(self.error, os.strerror(self.error), call.path)


@dataclass(frozen=True, slots=True)
class Stop:
    """The process stops itself before the call `at`, as Ctrl-Z does, until someone continues it."""

    at: int

    def install(self, folder: Path) -> None:
        _install(folder, _Counting(self.at, CHANGES, lambda call: os.kill(os.getpid(), signal.SIGTSTP)))


STREAMS = ("full", "closed", "gone", "terminal", "unread")
"""What a stream may be: on a full disk, closed, a pipe whose reader has left, a terminal that was closed, a pipe that nobody reads."""


@dataclass(frozen=True, slots=True)
class Stream:
    """Standard output (1) or error (2) is one of `STREAMS`; a pipe that nobody reads has room for so many bytes."""

    descriptor: int
    what: str
    room: int = 0

    def install(self, folder: Path) -> None:
        if self.what == "closed":
            os.close(self.descriptor)
            for name in (("stdout", "__stdout__"), ("stderr", "__stderr__"))[self.descriptor - 1]:
                setattr(sys, name, None)
            return
        opened = self._open()
        os.dup2(opened, self.descriptor)
        os.close(opened)

    def _open(self) -> int:
        if self.what == "full":
            return os.open("/dev/full", os.O_WRONLY)
        read, write = pty.openpty() if self.what == "terminal" else os.pipe()
        if self.what != "unread":
            os.close(read)
            return write
        os.set_blocking(write, False)
        with suppress(BlockingIOError):
            while True:
                os.write(write, bytes(select.PIPE_BUF))
        os.set_blocking(write, True)
        for _ in range(0, self.room, select.PIPE_BUF):
            os.read(read, select.PIPE_BUF)
        return write


@dataclass(frozen=True, slots=True)
class Wait:
    """Before the call `at` the process makes the file `here`, and waits until it is gone."""

    at: int
    here: Path

    def install(self, folder: Path) -> None:
        _install(folder, _Counting(self.at, CHANGES, self._strike))

    def _strike(self, call: Call) -> None:
        self.here.touch()
        while self.here.exists():
            time.sleep(0.005)


@dataclass(frozen=True, slots=True)
class Record:
    """Every call, one a line, in the file `to`: its name, and the path within the folder."""

    to: Path

    def install(self, folder: Path) -> None:
        file = os.open(self.to, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        line = lambda call: f"{call.name} {os.path.relpath(call.path, folder)}\n"  # noqa: E731
        write = lambda call: os.write(file, line(call).encode())  # noqa: E731
        everything = _Counting(1, CHANGES | {"read"}, write, lasting=True)
        _install(folder, everything)


@dataclass(frozen=True, slots=True)
class Clock:
    """The time of day is off by so many seconds, and from the call `at` on by others; what only measures is right, as it would be."""

    off: float
    later: float = 0.0
    at: int = 0

    def install(self, folder: Path) -> None:
        seconds = [self.off]
        if self.at:
            _install(folder, _Counting(self.at, CHANGES, lambda call: seconds.__setitem__(0, self.later)))
        own, own_ns = time.time, time.time_ns

        class Clocked(datetime):
            @classmethod
            def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
                return datetime.fromtimestamp(own() + seconds[0], tz)

        time.time = lambda: own() + seconds[0]
        time.time_ns = lambda: own_ns() + int(seconds[0] * 10**9)
        for original, replacement in ((own, time.time), (own_ns, time.time_ns), (datetime, Clocked)):
            for owner, name in list(bound_names(original)):
                setattr(owner, name, replacement)


@dataclass(frozen=True, slots=True)
class PowerCut:
    """As `Kill`, and what no one has synced is lost: the content of files, and the newest of the changes of names.

    A file keeps what it had when it was last synced. A change of names (a file made, renamed or removed) is certain once its folder is
    synced; of those that are not, the newest `undone` are lost: last in, first out.
    """

    at: int
    undone: int
    share: float = 0.0

    def install(self, folder: Path) -> None:
        _install(folder, self.watch(folder, _killed))

    def watch(self, folder: Path, end: Callable[[], None]) -> Losing:
        return Losing(self, folder, end)


class Losing(_Counting):
    """Knows what is not synced: `_kept`, the synced bytes of files that were written since, and `_undo`, changes of names."""

    def __init__(self, cut: PowerCut, folder: Path, end: Callable[[], None]) -> None:
        super().__init__(cut.at, CHANGES, self._cut_off)
        self._cut, self._end, self._losing = cut, end, False
        self._kept: dict[str, int] = {}
        self._undo: list[tuple[set[str], Callable[[], None]]] = []
        self._backups = (folder / f".lost-{os.getpid()}-{number}" for number in count())

    def before(self, call: Call) -> None:
        if self._losing:
            return
        super().before(call)
        path = Path(call.path)
        if call.name in ("open", "write", "truncate") and path.exists():
            self._kept.setdefault(call.path, path.stat().st_size)
        if call.name == "open" and not path.exists():
            self._kept[call.path] = 0
            self._changes(path.unlink, path)
        elif call.name == "mkdir" and not path.exists():
            self._changes(partial(shutil.rmtree, path), path)
        elif call.name == "rmdir" and path.is_dir():
            self._changes(path.mkdir, path)
        elif call.name == "unlink" and path.is_file():
            self._changes(partial(os.link, self._backup(path), path), path)
        elif call.name == "rename":
            self._renames(path, Path(call.to))

    def after(self, call: Call) -> None:
        if call.name == "fsync":
            self._kept.pop(call.path, None)
            left = [(folders - {call.path}, undo) for folders, undo in self._undo]
            self._undo = [(folders, undo) for folders, undo in left if folders]

    def _renames(self, old: Path, new: Path) -> None:
        backup = self._backup(new) if new.is_file() else None

        def undo() -> None:
            new.rename(old)
            if backup:
                os.link(backup, new)

        self._changes(undo, old, new)
        for path in [path for path in self._kept if path == str(old) or path.startswith(f"{old}/")]:
            self._kept[str(new) + path.removeprefix(str(old))] = self._kept.pop(path)

    def _changes(self, undo: Callable[[], None], *paths: Path) -> None:
        self._undo.append(({str(path.parent) for path in paths}, undo))

    def _backup(self, path: Path) -> Path:
        backup = next(self._backups)
        os.link(path, backup)
        return backup

    def _cut_off(self, call: Call) -> None:
        call.write_part(self._cut.share)
        self.lose()

    def lose(self) -> None:
        """Lose what a power cut now would take, and end."""
        self._losing = True
        lost = self._undo[max(0, len(self._undo) - self._cut.undone) :]
        for path, size in list(self._kept.items()):
            with suppress(OSError):  # of a file that is gone by now
                os.truncate(path, min(size, Path(path).stat().st_size))
        for _, undo in reversed(lost):
            with suppress(OSError):  # of something that is gone by now, or beneath another name
                undo()
        self._end()


def error_names(error: int) -> frozenset[str]:
    """The calls that an error of the system can come from."""
    if error in (errno.ENOSPC, errno.EDQUOT):
        return TAKES_SPACE
    if error in (errno.EROFS, errno.EACCES):
        return CHANGES - {"fsync"}
    return CHANGES | {"read"}
