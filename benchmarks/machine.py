"""What a result was measured on, and what this process takes of it."""

from __future__ import annotations

import ctypes.util
import hashlib
import os
import platform
import re
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def environment(packages: Iterable[str]) -> dict[str, Any]:
    """Time, machine and the versions of these packages, where installed."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": total_bytes(),
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := _version(name))},
    }


def code_digest() -> str:
    """Of the package's source: that it is the same before and after tells that one program was measured."""
    package = Path(__file__).parents[1] / "mlx_sft"
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def total_bytes() -> int:
    """The machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def fast_blas() -> str | None:
    """OpenBLAS on Linux, where there is one: MLX's CPU build there comes with the reference BLAS, which no one should time."""
    return ctypes.util.find_library("openblas") if sys.platform == "linux" else None


def reset_peak() -> None:
    """Count this process's peak anew, where the system can do so (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def resident_bytes() -> int:
    """This process's memory now; elsewhere than on Linux its peak so far."""
    return _status("VmRSS") if STATUS.exists() else peak_resident_bytes()


def peak_resident_bytes() -> int:
    """This process's memory at its highest."""
    if STATUS.exists():
        return _status("VmHWM")
    # macOS counts bytes, others kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text(encoding="utf-8"))
    return int(found[1]) * 1024 if found else 0
