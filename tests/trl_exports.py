"""A run and its twin, and the twin's script on the CPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS = 10


@dataclass(frozen=True)
class Pair:
    """A finished run and its twin, which nobody has trained."""

    run: Path
    twin: Path
    settings: dict[str, Any]


def carry_out(twin: Path, folder: Path, *options: str) -> Path:
    """A copy of a twin in a folder, after its script."""
    copy = shutil.copytree(twin, folder / "twin")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    ended = subprocess.run(
        [sys.executable, "train.py", *options], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == str(copy / "adapter")
    return copy
