"""What a parser must never do: write outside of its folders, start programs, ask the network. Seen through Python's audit hooks.

An audit hook stays for the life of its process; it looks only while `guarded`. Knows nothing of parsers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "socket.connect",
    "socket.getaddrinfo",
)
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.utime",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_folders: tuple[str, ...] = ()
_seen: list[str] = []
_installed = False


@contextmanager
def guarded(folders: Sequence[Path]) -> Iterator[list[str]]:
    """Yield a list that fills with what is done outside of these folders."""
    global _folders, _installed
    if not _installed:
        sys.addaudithook(_hook)
        _installed = True
    _seen.clear()
    _folders = tuple(f"{folder}/" for folder in folders)
    try:
        yield _seen
    finally:
        _folders = ()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _folders:
        return
    if event.startswith(_FORBIDDEN):
        _seen.append(f"{event} {arguments!r:.200}")
    elif event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & _WRITING:
            _check(event, path)
    elif event in _CHANGES and not _is_relative(event, arguments):
        _check(event, arguments[0])


def _is_relative(event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a path is relative to an open folder, as in the removal of a tree, which is an event of its own."""
    return event in ("os.remove", "os.rmdir") and arguments[1] != -1


def _check(event: str, path: Any) -> None:
    if not isinstance(path, str | bytes | os.PathLike):
        return  # an open file
    full = os.path.abspath(os.fsdecode(path))  # noqa: PTH100 (a hook must not touch the disk)
    if not f"{full}/".startswith(_folders) and full != os.devnull:
        _seen.append(f"{event} {full}")
