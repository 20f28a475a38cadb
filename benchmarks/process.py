"""A command in a process of its own, watched: one that takes nearly all of the machine's memory is ended before the machine is.

Knows nothing of what the command does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
MOST_OF_MEMORY = 0.92
"""The share of the machine's memory that a process may take."""
LEAST_FREE = 0.03
"""The share that must stay free, whoever takes it."""
_INTERVAL = 0.1
_NO_MEMORY = ("allocate", "insufficient memory", "out of memory", "not enough memory", "memoryerror", "bad_alloc")

OUT_OF_MEMORY = "out of memory"
TOO_SLOW = "too slow"


class Broken(Exception):
    """A process failed for want of something else than memory or time: what it did cannot be a result."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        failure: "" where it went well, "out of memory" or "too slow".
        highest_bytes: Its memory, and its children's, at the highest that was seen.
    """

    failure: str
    highest_bytes: int


def run_watched(command: list[str], added_environment: dict[str, str], timeout: float) -> Ended:
    """Run a command from the repository's root to its end, or to the end of its memory or time.

    Raises:
        Broken: With what it printed last, where it failed otherwise.
    """
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | added_environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            stopped, highest = watch(child, timeout)
        finally:
            end(child)
        output.seek(0)
        printed = output.read().decode(errors="replace")
    if stopped or child.returncode == 0:
        return Ended(stopped, highest)
    if child.returncode == -signal.SIGKILL or any(words in printed[-4000:].lower() for words in _NO_MEMORY):
        return Ended(OUT_OF_MEMORY, highest)
    raise Broken(printed[-4000:].strip() or f"ended with code {child.returncode}")


def watch(child: subprocess.Popen[bytes], timeout: float) -> tuple[str, int]:
    """Why the process must be ended, "" where it ended by itself; and its memory at the highest."""
    highest, deadline = 0, time.monotonic() + timeout
    total = psutil.virtual_memory().total
    while child.poll() is None:
        taken = family_bytes(child.pid)
        highest = max(highest, taken)
        if taken > MOST_OF_MEMORY * total or psutil.virtual_memory().available < LEAST_FREE * total:
            return OUT_OF_MEMORY, highest
        if time.monotonic() > deadline:
            return TOO_SLOW, highest
        time.sleep(_INTERVAL)
    return "", highest


def family_bytes(pid: int) -> int:
    """Resident memory of a process and its children."""
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    total = 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def end(child: subprocess.Popen[bytes]) -> None:
    """End the process with its children; it leads a group of its own."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
