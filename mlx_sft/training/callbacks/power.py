"""What slows a Mac down or stops it: battery, Low Power Mode, heat, a want of memory. Said once where it matters.

What macOS says is asked with its own commands, `pmset` and `sysctl`; elsewhere there are none, and nothing is said.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Annotated, Any, ClassVar, Literal

from mlx_sft.settings import OnResume, Settings
from mlx_sft.training.callbacks import Callback, Record, TrainingRun

SLOWER = 0.7
"""Of the usual speed, from where on a slowdown is told."""
WINDOW = 10
"""Steps whose median speed is compared with that of the first ones."""

_LEAST_FREE = 15
"""Percent of memory that macOS calls free, below which it compresses and swaps."""
_POLL = 10.0
"""Seconds between two looks at the battery of a run that waits for power."""


@dataclass(frozen=True)
class Conditions:
    """What macOS says.

    Attributes:
        on_battery: Whether it draws from its battery.
        percent: What is left in it; None without one.
        low_power: Whether Low Power Mode is on.
        hot: What it says of heat; empty where it says nothing.
        free: Percent of its memory that is free; None where that is not known.
    """

    on_battery: bool = False
    percent: int | None = None
    low_power: bool = False
    hot: str = ""
    free: int | None = None

    def words(self) -> list[str]:
        """What of it makes training slow or ends it."""
        left = f", {self.percent} % left" if self.percent is not None else ""
        found = {
            f"on battery{left}": self.on_battery,
            "Low Power Mode is on": self.low_power,
            f"heat: {self.hot}": bool(self.hot),
            f"{self.free} % of the memory is free": self.free is not None and self.free < _LEAST_FREE,
        }
        return [words for words, holds in found.items() if holds]


def read_conditions(battery: str, settings: str, heat: str, free: str) -> Conditions:
    """From the texts of `pmset -g batt`, `pmset -g`, `pmset -g therm` and `sysctl -n kern.memorystatus_level`."""
    percent = re.search(r"(\d+)%", battery)
    low_power = re.search(r"^\s*(?:lowpowermode|powermode)\s+1\b", settings, re.MULTILINE)
    limits = [
        f"{name} {value} %" for name, value in re.findall(r"(\w+_Speed_Limit)\s*=\s*(\d+)", heat) if value != "100"
    ]
    warned = re.findall(r"[Tt]hermal warning level[^\n]*?(\d+)", heat)
    return Conditions(
        on_battery="'Battery Power'" in battery,
        percent=int(percent[1]) if percent else None,
        low_power=low_power is not None,
        hot=", ".join(limits or [f"thermal warning level {level}" for level in warned if level != "0"]),
        free=int(free) if free.strip().isdigit() else None,
    )


def conditions() -> Conditions | None:
    """Those of this Mac; None elsewhere."""
    if shutil.which("pmset") is None:
        return None
    asked = (
        ["pmset", "-g", "batt"],
        ["pmset", "-g"],
        ["pmset", "-g", "therm"],
        ["sysctl", "-n", "kern.memorystatus_level"],
    )
    return read_conditions(*map(_said, asked))


def _said(command: list[str]) -> str:
    """What a command of the system writes; nothing where it cannot be asked."""
    try:
        found = subprocess.run(command, capture_output=True, timeout=10, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.decode("utf-8", "replace")


class PowerSettings(Settings):
    """Settings of the watch over a Mac's power."""

    on_battery: Annotated[Literal["go", "pause"], OnResume.FREE] = "go"
    """Whether a Mac trains while it draws from its battery, or waits until it has power."""


class Power(Callback):
    """The callback `power`."""

    name: ClassVar = "power"
    Settings: ClassVar = PowerSettings

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._told = False
        self._asks = shutil.which("pmset") is not None
        self._asked = 0.0
        """When the battery was last looked at."""

    def on_start(self, run: TrainingRun, record: Record) -> None:
        if (found := conditions()) and (words := found.words()):
            run.console.warn(f"this Mac may be slow, or stop: {'; '.join(words)}")

    def on_step(self, run: TrainingRun, record: Record) -> None:
        if not self._asks:
            return
        self._notice_slowdown(run, record)
        if self.settings.on_battery == "pause":
            self._wait_for_power(run, record["step"])

    def _notice_slowdown(self, run: TrainingRun, record: Record) -> None:
        """Once, where the last steps are slower by 30 % than the first that compiled nothing."""
        if record.get("traces") or self._told:
            return
        speed = record["tokens_per_second"]
        if len(self._first) < WINDOW:
            self._first.append(speed)
            return
        self._last.append(speed)
        usual = median(self._first)
        if len(self._last) == WINDOW and median(self._last) < SLOWER * usual:
            self._told = True
            found = conditions()
            why = "; ".join(found.words() if found else []) or "macOS names no cause"
            now = median(self._last)
            run.console.note(
                f"steps have become slower, {now:,.0f} tokens a second where {usual:,.0f} were usual: {why}"
            )

    def _wait_for_power(self, run: TrainingRun, step: int) -> None:
        if time.monotonic() - self._asked < _POLL:
            return
        self._asked = time.monotonic()
        if not ((found := conditions()) and found.on_battery):
            return
        run.console.note(f"paused after step {step}, on battery; it goes on with power (--on-battery go does not wait)")
        while (found := conditions()) and found.on_battery:
            run.check_stop()
            time.sleep(_POLL)
        run.console.note("power is there again")
