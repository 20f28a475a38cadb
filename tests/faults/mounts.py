"""Small disks, and folders that may not be written to: real ones, where this process may make them. Knows nothing of runs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


@cache
def can_mount() -> bool:
    """Whether this process may mount file systems: on Linux, as root."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    with tempfile.TemporaryDirectory() as folder:
        if not _mounts("-t", "tmpfs", "-o", "size=64k", "tmpfs", folder):
            return False
        return _run("umount", folder)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A disk of so many bytes at `folder`, which is gone afterwards with all that is on it."""
    _must("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield
    finally:
        _must("umount", "--lazy", str(folder))


def enlarge(folder: Path, size: int) -> None:
    """Give a small disk more space."""
    _must("mount", "-o", f"remount,size={size}", str(folder))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """While the block runs, nothing can be written in `folder`.

    Where this process cannot mount, its permissions say so; nothing is forbidden to root, who then cannot use this.
    """
    if can_mount():
        _must("mount", "--bind", str(folder), str(folder))
        try:
            _must("mount", "-o", "remount,ro,bind", str(folder))
            yield
        finally:
            _must("umount", "--lazy", str(folder))
        return
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path in folders:
            path.chmod(0o755)


def can_forbid() -> bool:
    """Whether `read_only` works here."""
    return can_mount() or os.geteuid() != 0


def _mounts(*arguments: str) -> bool:
    try:
        return _run("mount", *arguments)
    except OSError:  # there is no such command
        return False


def _run(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _must(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=True)
