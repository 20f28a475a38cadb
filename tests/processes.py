"""Runs as processes of their own, for tests that do something to them."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

from mlx_sft.common_settings import option_name


def options_of(settings: dict[str, Any]) -> list[str]:
    """What to type for settings; whether it is quiet is for the test to say."""
    named = {name: value for name, value in settings.items() if name != "quiet"}
    return [part for name, value in named.items() for part in (option_name(name), str(value))]


def wait_for_lines(process: subprocess.Popen[bytes], metrics: Path, lines: int) -> None:
    """Until a run has written so many lines; it must not end before."""
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
