"""The processes of one run, started together on this machine; on several machines `mlx.launch` starts them.

`mlx.launch` would do it here too, but it ends with 0 whatever its processes end with, gives them pipes instead of the terminal, and
takes the same ports for every run. Knows nothing of MLX, so that it costs no time to import.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mlx_sft.writing import private_folder, write_file

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PATIENCE = 60.0
"""Seconds for the others after the first has ended, and for the first after one of them has."""


def own_rank() -> int | None:
    """The number of this process among those of a run; None where it was started alone."""
    hosts = Path(os.environ.get("MLX_HOSTFILE", ""))
    if hosts.is_file() and not hosts.read_text().strip():  # `mlx.launch` with one host
        return None
    number = os.environ.get("MLX_RANK", os.environ.get("OMPI_COMM_WORLD_RANK"))
    return int(number) if number is not None and number.isdigit() else None


def launcher() -> str:
    """MLX's own `mlx.launch`, beside this Python or on the path."""
    beside = Path(sys.executable).with_name("mlx.launch")
    return str(beside) if beside.exists() else shutil.which("mlx.launch") or "mlx.launch"


def environments(number: int, folder: Path) -> list[dict[str, str]]:
    """What each of so many processes of this machine has in its environment; their hostfile is written into the folder."""
    with ExitStack() as bound:
        sockets = [bound.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    file = folder / "hosts.json"
    write_file(file, json.dumps(hosts))
    return [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(file)} for rank in range(number)]


def launched(number: int, arguments: Sequence[str]) -> int:
    """Start `mlx-sft` with these arguments in so many processes, which share a run, and wait for them; the first's exit code."""
    with private_folder() as folder, ExitStack() as ended:
        started = []
        for rank, own in enumerate(environments(number, Path(folder))):
            child = subprocess.Popen(  # noqa: S603
                [sys.executable, "-m", "mlx_sft", *arguments],
                env=os.environ | own,
                stdin=subprocess.DEVNULL if rank else None,
                start_new_session=True,  # signals reach the first, which tells the others
            )
            started.append(ended.enter_context(child))
            ended.callback(_end, child)
        first, *others = started
        with signals_passed_to(first):
            while first.poll() is None and all(other.poll() in (None, 0) for other in others):
                with suppress(subprocess.TimeoutExpired):
                    first.wait(1)
            _end(first)
    return first.returncode if first.returncode >= 0 else 128 - first.returncode


@contextmanager
def signals_passed_to(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """While the block runs, what asks this process to end asks the child."""
    before = {number: signal.signal(number, lambda number, _: child.send_signal(number)) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(child: subprocess.Popen[bytes]) -> None:
    """It ends by itself, in a while, or is ended."""
    for stop in (child.terminate, child.kill):
        with suppress(subprocess.TimeoutExpired):
            child.wait(_PATIENCE)
            return
        stop()
