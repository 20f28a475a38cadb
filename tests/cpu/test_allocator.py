"""Freed memory stays with the process, for the arrays that come next."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mlx_sft.cpu.allocator import keep_freed_memory

pytestmark = pytest.mark.fast

_PROGRAM = """
import sys
import mlx.core as mx
from mlx_sft.cpu.allocator import keep_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

mx.set_default_device(mx.cpu)
kept = sys.argv[1] == "keep" and keep_freed_memory()
mx.eval(mx.ones(4))
before = resident()
array = mx.ones((64, 2**20))
mx.eval(array)
del array
print(kept, resident() - before)
"""


def _left(what: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, what], capture_output=True, text=True, check=True)
    kept, left = done.stdout.split()
    return kept, int(left)


@pytest.mark.skipif(not keep_freed_memory(), reason="not glibc")
def test_what_was_freed_is_kept() -> None:
    kept, left = _left("keep")
    assert kept == "True"
    assert left > 200 * 2**20
    assert _left("plain")[1] < 64 * 2**20
