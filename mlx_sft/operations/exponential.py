"""e to the x, as fast as the backend allows. Knows nothing of what it is for."""

from __future__ import annotations

import math
import platform

import mlx.core as mx


def exponential(x: mx.array) -> mx.array:
    """exp(x), element by element.

    MLX's x86 CPU backend has no vector instructions: its exp takes 13 to 18 ns an element, in calls to the C library's
    `fmaf`, where the library's own `powf` takes 5. The float32 nearest to e is 3e-8 of it too small, so that the result is
    off by 3e-8 |x| of its value; MLX's own exp is further off. Where nothing is left of it (below −104) `powf` is slow, but at −∞ fast.
    """
    slow = mx.default_device() == mx.Device(mx.cpu) and platform.machine() in ("x86_64", "AMD64")
    return mx.power(math.e, x) if slow and x.dtype == mx.float32 else mx.exp(x)
