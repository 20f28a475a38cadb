"""The verb `doctor`: what this machine is, what a run may take of it, what is missing for what; and the largest model that fits."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import get_token, is_offline_mode

from mlx_sft.config import TrainConfig
from mlx_sft.console import count, size
from mlx_sft.errors import blamed_on
from mlx_sft.files import cache_folder, free_bytes
from mlx_sft.registry import TARGETS
from mlx_sft.training.batch_settings import most_tokens
from mlx_sft.training.callbacks.power import conditions
from mlx_sft.training.fitting import QWEN3, qwen3_footprint
from mlx_sft.training.machine import Machine, this_machine
from mlx_sft.training.memory import MODES

_PACKAGES = ("mlx-sft", "mlx", "mlx-lm", "transformers", "huggingface_hub", "numpy")
_OLDEST_MACOS = 14
_LITTLE_DISK = 10 * 2**30
_LITTLE_MEMORY = 4 * 2**30

USEFUL_TOKENS = 1024
"""A row that is shorter than this is no use for most chats."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: What.
        found: What it is.
        to_do: What can be done about it; empty where nothing need be.
        wrong: Whether training will not work so.
    """

    name: str
    found: str
    to_do: str = ""
    wrong: bool = False


def findings() -> Iterator[Finding]:
    """Everything, each as soon as it is known."""
    machine = this_machine()
    yield _system()
    yield Finding("packages", ", ".join(f"{name} {version(name)}" for name in _PACKAGES))
    yield _device(machine)
    yield _memory(machine)
    for name, place in (("disk, here", Path.cwd()), ("disk, cache", cache_folder())):
        if place is None:
            yield Finding(name, "none: this user has no home folder", "MLX_SFT_CACHE names one")
            continue
        free = free_bytes(place)
        little = "a run with its checkpoints and an export may want more" if free < _LITTLE_DISK else ""
        yield Finding(name, f"{size(free)} free ({place})", little)
    yield _hub()
    for name, target in TARGETS.items():
        yield from (Finding(f"{name}: {what}", found or "not found", to_do) for what, found, to_do in target.needs())
    if (found := conditions()) is not None:
        yield Finding("power", "; ".join(found.words()) or "nothing slows this Mac down")
    yield _largest(machine)


def described(found: Finding) -> str:
    """For a person: a line, and a second one with what to do."""
    mark = "✗" if found.wrong else "•" if found.to_do else "✓"
    return f"{mark} {found.name}: {found.found}\n" + (f"    {found.to_do}\n" if found.to_do else "")


def as_json(found: Finding) -> str:
    return json.dumps(asdict(found), ensure_ascii=False) + "\n"


def _system() -> Finding:
    release = platform.mac_ver()[0]
    if not release:
        return Finding("system", f"{platform.platform()}, Python {platform.python_version()}")
    found = f"macOS {release} on {platform.machine()}, Python {platform.python_version()}"
    if int(release.partition(".")[0]) < _OLDEST_MACOS:
        return Finding("system", found, f"MLX wants macOS {_OLDEST_MACOS} or later: update it", wrong=True)
    if platform.machine() != "arm64":
        return Finding("system", found, "MLX's Metal wants an Apple silicon Mac, and a Python built for it", wrong=True)
    return Finding("system", found)


def _device(machine: Machine) -> Finding:
    found = f"{machine.name}, by MLX's {machine.backend}, in {machine.dtype} where nothing else is asked for"
    if machine.backend != "cpu":
        return Finding("device", found)
    on_mac = sys.platform == "darwin"
    why = "this Python's MLX sees no Metal: install mlx anew in a Python for arm64" if on_mac else ""
    return Finding(
        "device", found, why or "a CPU is for trying things out: an Apple silicon Mac is far faster", wrong=on_mac
    )


def _memory(machine: Machine) -> Finding:
    little = "close what takes memory; only the smallest models fit" if machine.memory < _LITTLE_MEMORY else ""
    return Finding("memory", f"{size(machine.memory)} for a run ({machine.basis})", little)


def _hub() -> Finding:
    if is_offline_mode():
        return Finding("Hub", "not asked, because HF_HUB_OFFLINE is set", "unset it to download models or to push")
    with blamed_on("", "the token cannot be had", "`hf auth login`"):
        token = get_token()
    if token is None:
        return Finding("Hub", "no token", "for gated models and for `push`: hf auth login")
    return Finding("Hub", "a token is there")


def _largest(machine: Machine) -> Finding:
    """The largest of Qwen3's sizes with which a row of some use fits, plain and quantized."""
    found = []
    for quantize in (None, "4"):
        sizes = ((name, _longest(name, machine, quantize)) for name in reversed(QWEN3))
        name, tokens = next(((name, tokens) for name, tokens in sizes if tokens >= USEFUL_TOKENS), ("", 0))
        if name:
            how = f" with --quantize {quantize}" if quantize else ""
            found.append(f"Qwen3-{name}{how} (rows of up to {count(tokens)} tokens)")
    hint = "" if found else f"no size of Qwen3 fits with rows of {USEFUL_TOKENS} tokens"
    return Finding("largest model, LoRA", ", ".join(found) or "none", hint)


def _longest(name: str, machine: Machine, quantize: str | None) -> int:
    settings = TrainConfig(data=["-"], model="Qwen/Qwen3-" + name, quantize=quantize)
    footprint = qwen3_footprint(name, settings, machine.dtype, fused=machine.fused)
    return max(most_tokens(footprint, mode, machine.memory) for mode in MODES)
