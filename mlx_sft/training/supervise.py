"""A run in a process of its own, resumed where something ends it that no Python can catch: an error inside of a driver, a crash."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console
from mlx_sft.run_folder import RunFolder

MOST_IN_VAIN = 3
"""So often in a row it may end without a checkpoint more than before."""

_OWN = "--supervise"
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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
    while True:
        code = _run(command)
        if code >= 0:
            return code
        newest = _newest(out)
        in_vain = 0 if newest > saved else in_vain + 1
        saved = newest
        ended = f"training ended with {signal.Signals(-code).name}"
        if in_vain == MOST_IN_VAIN:
            console.warn(f"{ended}, {MOST_IN_VAIN} times without a step more; it is not tried again (run: {out})")
            return 128 - code
        if _begun(out) and "--resume" not in command:
            command += ["--resume", out]
        console.warn(f"{ended}; it goes on from {f'step {newest}' if newest else 'its beginning'}")


def _run(command: Sequence[str]) -> int:
    """The exit code of a process, negative where a signal ended it; signals that are sent here go to it, once each."""
    child = subprocess.Popen(command, start_new_session=True)  # noqa: S603
    before = {number: signal.signal(number, lambda number, _: child.send_signal(number)) for number in _PASSED_ON}
    try:
        return child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _begun(out: str) -> bool:
    return RunFolder(out).config.is_file()


def _newest(out: str) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max(RunFolder(out).checkpoint_steps(), default=0) if _begun(out) else 0
