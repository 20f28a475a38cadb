"""`doctor --hosts`: whether several machines can share a run, how fast the line between them is, and what would be gained.

`looked_at` asks each by ssh, then starts the same command on all of them with `mlx.launch`; there `measured` says the rest.
"""

from __future__ import annotations

import json
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx

from mlx_sft.console import size
from mlx_sft.doctor import Finding
from mlx_sft.launch import launcher
from mlx_sft.training.lead import versions
from mlx_sft.training.machine import measured_teraflops, this_machine
from mlx_sft.training.plan import REACHED
from mlx_sft.training.ranks import Ranks
from mlx_sft.writing import private_folder, write_file

_SECONDS, _TOGETHER_SECONDS = 10, 120
"""In which a machine must answer, and all of them have measured."""
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_SECONDS}")
_LOCAL = ("127.0.0.1", "localhost")
_TRIES, _LARGE = 5, 32 * 2**20
_STEP_TOKENS, _OPERATIONS, _ADAPTER = 4096, 4 * 0.6e9, 20e6
"""The step that the gain is told of: tokens, operations a token of Qwen3-0.6B with a frozen base, bytes of a LoRA of rank 8 in float32."""


def looked_at(hosts: Sequence[str]) -> Iterator[Finding]:
    """What each of the hosts answers, by name or address; the first of them leads."""
    for host in hosts:
        yield _answer(host)


def measure_together(hosts: Sequence[str], options: Sequence[str]) -> Iterator[Finding]:
    """Start `doctor` on all hosts at once, which says itself what is measured between them; what keeps it from that is found here."""
    with private_folder() as folder:
        hostfile = Path(folder) / "hosts.json"
        write_file(hostfile, json.dumps(as_hostfile(hosts)))
        command = [launcher(), "--hostfile", str(hostfile), "--", sys.executable, "-m", "mlx_sft", "doctor", *options]
        try:
            subprocess.run(command, check=False, timeout=_TOGETHER_SECONDS)  # noqa: S603
        except subprocess.TimeoutExpired:
            to_do = "does a firewall keep them from each other? Ports from 32323 on must be open"
            yield Finding("line", f"nothing came through in {_TOGETHER_SECONDS} s", to_do, wrong=True)


def as_hostfile(hosts: Sequence[str]) -> list[dict[str, object]]:
    """What `mlx.launch --hostfile` reads."""
    return [{"ssh": "127.0.0.1" if host in _LOCAL else host, "ips": [_address(host)]} for host in hosts]


def measured(ranks: Ranks) -> Iterator[Finding]:
    """Of the processes that this one was started among: what they are, how fast the line is, and what would be gained; in each alike."""
    machine = this_machine()
    own = {
        "node": platform.node(),
        "name": machine.name,
        "memory": machine.memory,
        "speed": measured_teraflops(machine.dtype),
    }
    every = [json.loads(text) for text in ranks.said(json.dumps(own))]
    packages = [json.loads(text) for text in ranks.said(json.dumps(versions()))]
    for rank, (said, theirs) in enumerate(zip(every, packages, strict=True)):
        other = [f"{name} {value[:12]}" for name, value in theirs.items() if value != packages[0][name]]
        wrong = f"it has {', '.join(other)}: install the same on all of them" if other else ""
        found = f"{said['node']}, {said['name']}, {size(said['memory'])} for a run, {said['speed']:.2g} TFLOP/s"
        yield Finding(f"process {rank}", found, wrong, wrong=bool(wrong))
    latency, rate = _line(ranks)
    yield Finding("line", f"{1000 * latency:.2f} ms for a word, {size(int(rate))} a second")
    if len({said["node"] for said in every}) < len(every):
        yield Finding("gain", "not told: some of these are one machine, whose speed they share")
        return
    yield _gain([said["speed"] for said in every], latency, rate)


def _gain(speeds: Sequence[float], latency: float, rate: float) -> Finding:
    """Shares go by speed; a step's exchange sends 2 (N - 1) / N of the adapter, and some words before it."""
    work = _STEP_TOKENS * _OPERATIONS / (REACHED * 1e12)
    alone, exchange = work / max(speeds), 4 * latency + 2 * (len(speeds) - 1) / len(speeds) * _ADAPTER / rate
    together = work / sum(speeds) + exchange
    words = (
        f"{alone / together:.1f} times the fastest alone"
        if together < alone
        else "nothing: the fastest alone is faster"
    )
    found = f"{words} (estimated: a LoRA step of Qwen3-0.6B over {_STEP_TOKENS:,} tokens, {alone:.2f} s and {together:.2f} s"
    return Finding("gain", f"{found}, of it {exchange:.2f} s for the exchange)")


def _line(ranks: Ranks) -> tuple[float, float]:
    """Seconds that a short exchange takes, and bytes a second of a long one, as each machine sends them."""
    short, long = (min(_seconds(ranks, count) for _ in range(_TRIES)) for count in (1, _LARGE // 4))
    return short, 2 * (ranks.size - 1) / ranks.size * _LARGE / max(long - short, 1e-9)


def _seconds(ranks: Ranks, count: int) -> float:
    numbers = mx.ones(count)
    mx.eval(numbers)
    ranks.as_in_the_first({"": mx.zeros(1)})  # all begin together
    started = time.perf_counter()
    ranks.as_in_the_first({"": numbers})
    return time.perf_counter() - started


def _answer(host: str) -> Finding:
    if host in _LOCAL:
        return Finding(host, "this machine")
    try:
        address = _address(host)
    except OSError as error:
        return Finding(host, f"no such machine: {error}", "look at its name, or give its address", wrong=True)
    command = [*_SSH, host, f"{sys.executable} -m mlx_sft --version"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=3 * _SECONDS, check=False)  # noqa: S603
    except FileNotFoundError:
        return Finding(host, "there is no ssh here", "install it", wrong=True)
    except subprocess.TimeoutExpired:
        return Finding(host, f"{address} does not answer", "is it awake, and is Remote Login on?", wrong=True)
    if found.returncode == 255:  # ssh's own
        said = found.stderr.strip().splitlines()[-1:] or ["it does not answer"]
        to_do = f"turn on Remote Login there, and let ssh in without a password: ssh-copy-id {host}"
        return Finding(host, f"{address}: {said[0]}", to_do, wrong=True)
    if found.returncode:
        to_do = f"install it there at the same place as here: {Path(sys.executable).parents[1]}"
        return Finding(host, f"{address} answers, but has no mlx-sft at {sys.executable}", to_do, wrong=True)
    return Finding(host, f"{address} answers, {found.stdout.strip()}")


def _address(host: str) -> str:
    return socket.gethostbyname(host)
