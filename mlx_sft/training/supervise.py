"""A run in a process of its own, resumed where something ends it that no Python can catch: an error inside of a driver, a crash."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console
from mlx_sft.files import user_path
from mlx_sft.launch import signals_passed_to
from mlx_sft.run_folder import RunFolder, is_at
from mlx_sft.writing import path_of

MOST_IN_VAIN = 3
"""So often in a row it may end without a checkpoint more than before."""

_OWN = "--supervise"


def supervised(config: TrainConfig, arguments: Sequence[str]) -> int:
    """Train as `mlx-sft` with these arguments would, and go on where a signal that nobody sent on purpose ends it; the exit code.

    Args:
        config: What the arguments say.
        arguments: As they were typed.
    """
    out = config.resume or config.out or str(RunFolder.default_path(config.model))
    command = [sys.executable, "-m", "mlx_sft", *(part for part in arguments if part != _OWN)]
    if not (config.resume or config.out):
        command += ["--out", out]
    console = Console(quiet=config.quiet, json_lines=config.json_lines)
    saved, in_vain = _newest(out), 0
    with _followed(out) as place:
        while True:
            code = _run(command)
            if code >= 0:
                return code
            before, out = out, place()
            newest = _newest(out)
            in_vain = 0 if newest > saved else in_vain + 1
            saved = newest
            ended = f"training ended with {signal.Signals(-code).name}"
            if in_vain == MOST_IN_VAIN:
                console.warn(f"{ended}, {MOST_IN_VAIN} times without a step more; it is not tried again (run: {out})")
                return 128 - code
            if _begun(out) and (out != before or "--resume" not in command):
                command += ["--resume", out, "--out", out]  # what is given last counts
            console.warn(f"{ended}; it goes on from {f'step {newest}' if newest else 'its beginning'}")


@contextmanager
def _followed(out: str) -> Iterator[Callable[[], str]]:
    """Yield what says where the run folder lies, which someone may rename while a process trains it.

    It is made here, to be known again; where nothing comes of the run, it is removed. Where it cannot be, the process says why.
    """
    path = user_path(out)
    try:
        if made := not os.path.lexists(path):
            path.mkdir(parents=True)
        held = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except (OSError, ValueError):
        yield lambda: out
        return

    def place() -> str:
        with suppress(OSError):
            found = path_of(held)
            if not is_at(held, path) and is_at(held, found):
                return str(found)
        return out

    try:
        yield place
    finally:
        os.close(held)
        if made:
            with suppress(OSError):  # it holds the run
                path.rmdir()


def _run(command: Sequence[str]) -> int:
    """The exit code of a process, negative where a signal ended it; signals that are sent here go to it, once each."""
    child = subprocess.Popen(command, start_new_session=True)  # noqa: S603
    with signals_passed_to(child):
        return child.wait()


def _begun(out: str) -> bool:
    return RunFolder(out).config.is_file()


def _newest(out: str) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max(RunFolder(out).checkpoint_steps(), default=0) if _begun(out) else 0
