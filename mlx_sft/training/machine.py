"""What a machine has: the memory that a run may take, and how fast it multiplies matrices; and MLX's limit on what it takes."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import mlx.core as mx

from mlx_sft.config import TrainConfig
from mlx_sft.cpu.allocator import keep_freed_memory
from mlx_sft.errors import USAGE, UserError
from mlx_sft.settings import parse_bytes

if TYPE_CHECKING:
    from mlx_sft.training.memory import Prediction

Backend = Literal["metal", "cuda", "cpu"]

GIB = 2**30

COMMON_MACS = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128)
"""Sizes of memory, in GB as Apple sells them."""

_PEAK_TERAFLOPS = {
    "M1": 2.6, "M1 Pro": 5.2, "M1 Max": 10.4, "M1 Ultra": 21.0,
    "M2": 3.6, "M2 Pro": 6.8, "M2 Max": 13.5, "M2 Ultra": 27.2,
    "M3": 4.1, "M3 Pro": 7.4, "M3 Max": 14.2, "M3 Ultra": 28.4,
    "M4": 4.6, "M4 Pro": 9.2, "M4 Max": 18.4,
}  # fmt: skip
"""Of the largest GPU of each chip (https://github.com/huggingface/huggingface.js, packages/tasks/src/hardware.ts and its pull request 1044;
M3 Ultra: two M3 Max). In bfloat16 these GPUs multiply no faster than in float32."""

_SUSTAINED = 0.6
"""The share of it that products reach: 2.9 of 4.6 on an M4 with Apple's library (https://arxiv.org/abs/2502.05317), 2.78 with MLX
in bfloat16 (https://dev.to/tinyalg/278-tflops-on-a-fanless-macbook-air-benchmarking-apples-m4-with-mlx-38n4)."""

_MEASURED_TERAFLOPS = {"M5": 6.5}
"""Products of 1280 × 1280 in bfloat16 with MLX (https://github.com/ml-explore/mlx/issues/3196)."""

_FREE_SHARE = 0.9
"""Of what the system says is free; the rest is for what this process takes beside MLX's arrays, and for the others."""


_LEAST_CACHE = 2 * GIB
"""A smaller cache costs more than it saves: a third of the speed and more, at half of this."""

_RUSAGE_INFO_V4, _PHYS_FOOTPRINT = 4, 9
"""The kind that libproc is asked for, and where it says it, in words of eight bytes: after a UUID and seven counts (<sys/resource.h>)."""

_LONG_ENOUGH, _MOST_ROWS = 0.05, 2**16
"""Seconds after which a measured product tells, and the largest that is tried."""


@dataclass(frozen=True)
class Machine:
    """A machine as a plan sees it.

    Attributes:
        memory: Bytes that a run may take in all, its weights included.
        basis: Where that figure comes from, in words.
        teraflops: 10¹² operations a second in products of matrices; None where no one knows it.
    """

    name: str
    backend: Backend
    memory: int
    basis: str
    teraflops: float | None = None

    @property
    def fused(self) -> bool:
        """Whether MLX computes attention and norms in one piece on it."""
        return self.backend != "cpu"

    @property
    def compiles(self) -> bool:
        """Whether a compiled step pays on it: on the CPU a trace takes seconds of g++ and saves nothing."""
        return self.backend != "cpu"

    @property
    def dtype(self) -> str:
        """The precision that `auto` stands for on it."""
        return "float32" if self.backend == "cpu" else "bfloat16"


def prepare_device() -> None:
    """On a CPU, let freed memory be used again."""
    if mx.default_device() == mx.Device(mx.cpu):
        keep_freed_memory()


def hold_to(machine: Machine, predicted: Prediction) -> None:
    """Hold MLX to what a run is predicted to take.

    On a CPU its arrays may take no more: a third less than otherwise, in the same time. Far below what is needed, where each operation
    waits for the last, it would take twice as long. On a GPU what is freed stays in a cache, which would grow to the whole of the memory,
    and stay wired: it may hold what a step takes beside the weights, so that a step finds all of it there. No more than both is wired.
    """
    if machine.backend == "cpu":
        mx.set_memory_limit(min(machine.memory, predicted.limit))
        return
    cache = max(_LEAST_CACHE, predicted.kept + predicted.passing)
    mx.set_cache_limit(cache)
    if machine.backend == "metal":
        mx.set_wired_limit(min(machine.memory, predicted.peak + cache))


def this_machine() -> Machine:
    """The machine that this runs on, with MLX's default device."""
    gpu = mx.default_device() == mx.Device(mx.gpu)
    backend: Backend = "cpu" if not gpu else "metal" if mx.metal.is_available() else "cuda"
    facts = mx.device_info(mx.gpu) if gpu or mx.metal.is_available() else {}
    memory, basis = usable_bytes(facts, free_bytes(), mx.get_active_memory())
    return Machine(str(mx.device_info().get("device_name", "this machine")), backend, memory, basis)


def usable_bytes(device: Mapping[str, object], free: int, active: int) -> tuple[int, str]:
    """What MLX's arrays may take in all, and why: the device's word, else the system's.

    Args:
        device: As `mx.device_info` describes it; empty for the CPU.
        free: Bytes that the system can still give.
        active: Bytes that MLX's arrays take already.
    """
    recommended, unused = device.get("max_recommended_working_set_size"), device.get("free_memory")
    if isinstance(recommended, int):
        return recommended, "the working set that Metal recommends"
    if isinstance(unused, int):
        return active + int(_FREE_SHARE * unused), "nine tenths of what is free on the GPU"
    return active + int(_FREE_SHARE * free), "nine tenths of what the system says is free"


def mac(name: str, gigabytes: float, chip: str = "") -> Machine:
    """A Mac with so much memory, and of a chip's speed where it is named."""
    share, words = (2 / 3, "two thirds") if gigabytes <= 36 else (3 / 4, "three quarters")
    speed = _MEASURED_TERAFLOPS.get(chip, _SUSTAINED * _PEAK_TERAFLOPS.get(chip, 0.0))
    # As reported for 8, 16, 32, 48, 64 and 96 GB; newer systems recommend more (docs/memory.md has the sources).
    basis = f"{words} of its memory, as Metal recommends at least"
    return Machine(name, "metal", int(share * gigabytes * GIB), basis, round(speed, 1) or None)


def read_machine(text: str) -> Machine:
    """`M2 16GB`, `M3 Max 64GB` or `16GB` → that Mac.

    Raises:
        UserError: For anything else.
    """
    hint = "write a Mac's chip and memory, such as 'M2 16GB' or 'M3 Max 64GB', or its memory alone: 16GB"
    match = re.fullmatch(
        r"(?:(?:apple\s+)?(m\d+(?:\s*(?:pro|max|ultra))?)\s*,?\s+)?(\d+)\s*g(?:i?b)?", text.strip(), re.IGNORECASE
    )
    if match is None or int(match[2]) == 0:
        raise UserError(f"no machine that is known: {text!r}", where="--machine", hint=hint, exit_code=USAGE)
    chip = " ".join(re.findall(r"m\d+|pro|max|ultra", (match[1] or "").lower())).title()
    known = [*_PEAK_TERAFLOPS, *_MEASURED_TERAFLOPS]
    if chip and chip not in known:
        hint = f"chips that are known: {', '.join(sorted(known))}; or give the memory alone: {match[2]}GB"
        raise UserError(f"no chip that is known: {chip}", where="--machine", hint=hint, exit_code=USAGE)
    return mac(f"{chip} {match[2]}GB".strip(), int(match[2]), chip)


def measured_teraflops(dtype: str) -> float:
    """What this machine reaches in a product of the kind that training is made of; takes a fraction of a second."""
    kind: mx.Dtype = getattr(mx, dtype)
    columns = mx.ones((1024, 1024), kind)
    rows, seconds = 32, 0.0
    while seconds < _LONG_ENOUGH and rows < _MOST_ROWS:
        rows *= 2
        states = mx.ones((rows, 1024), kind)
        mx.eval(states @ columns)
        started = time.perf_counter()
        mx.eval(states @ columns)
        seconds = time.perf_counter() - started
    return 2 * rows * 1024 * 1024 / seconds / 1e12


def free_bytes(root: Path = Path("/")) -> int:
    """What the system can still give to this process: on Linux what it says is available, within the limits of its control groups."""
    available = re.search(r"^MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if available is None:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min([int(available[1]) * 1024, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> list[int]:
    """What each control group that this process is in leaves, in either version's files."""
    left = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        group = top / path.lstrip("/")
        for folder in {top, group, *(parent for parent in group.parents if top in parent.parents)}:
            limit, used = (_text(folder / name).strip() for name in names)
            if limit.isdigit() and used.isdigit():
                # The cache of files counts as used, and is given back when it is needed.
                cache = re.search(r"^(?:total_)?inactive_file (\d+)", _text(folder / "memory.stat"), re.MULTILINE)
                left.append(max(0, int(limit) - int(used) + (int(cache[1]) if cache else 0)))
    return left


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def within(machine: Machine, config: TrainConfig) -> Machine:
    """A machine with as much memory as the configuration allows."""
    if config.memory_limit is None:
        return machine
    return replace(machine, memory=parse_bytes(config.memory_limit), basis="--memory-limit")


@contextmanager
def memory_limits_restored() -> Iterator[None]:
    """After the block, MLX's limits (on all memory, on its cache, on what is wired) are again what they were before."""
    wires = mx.metal.is_available()
    memory, cache, wired = mx.get_memory_limit(), mx.set_cache_limit(0), mx.set_wired_limit(0) if wires else 0
    mx.set_cache_limit(cache)
    try:
        yield
    finally:
        mx.set_memory_limit(memory)
        mx.set_cache_limit(cache)
        if wires:
            mx.set_wired_limit(wired)


def footprint_bytes() -> int | None:
    """What the system counts as this process's memory: macOS's `phys_footprint`, which Activity Monitor shows, or Linux's resident
    pages; None where it does not say."""
    if sys.platform == "darwin":
        usage = (ctypes.c_uint64 * 64)()
        if ctypes.CDLL(None).proc_pid_rusage(os.getpid(), _RUSAGE_INFO_V4, usage) != 0:
            return None
        return int(usage[_PHYS_FOOTPRINT])
    pages = _text(Path("/proc/self/statm")).split()
    return int(pages[1]) * os.sysconf("SC_PAGE_SIZE") if len(pages) > 1 else None
