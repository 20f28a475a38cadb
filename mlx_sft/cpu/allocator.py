"""What the C library does with memory that MLX gives back, where MLX's CPU backend takes it straight from there: on Linux.

By default glibc returns every large array to the system as soon as it is freed, and the next one is made of fresh pages, each of them
a fault and zeroed: 37 ms instead of 6 for an array of 64 MiB on a virtual machine. A step makes and frees thousands.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3)
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed memory for the arrays that come next, until the process ends; whether this C library can."""
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, 2**30)) and bool(mallopt(_TRIM_THRESHOLD, _LARGEST))
