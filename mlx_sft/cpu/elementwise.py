"""Exponentials, sums of rows and the product of a gated MLP, where MLX's CPU backend is slow at them.

`exponential` and `row_sums` are MLX's own operations on every other device, so that callers need not ask.
"""

from __future__ import annotations

import math
import platform
from typing import Any

import mlx.core as mx


def exponential(x: mx.array) -> mx.array:
    """exp(x), element by element.

    MLX's x86 CPU backend has no vector instructions: its exp takes 13 to 18 ns an element, in calls to the C library's
    `fmaf`, where the library's own `powf` takes 5. The float32 nearest to e is 3e-8 of it too small, so that the result is
    off by 3e-8 |x| of its value; MLX's own exp is further off. Where nothing is left of it (below −104) `powf` is slow, but at −∞ fast.
    """
    slow = mx.default_device() == mx.Device(mx.cpu) and platform.machine() in ("x86_64", "AMD64")
    return mx.power(math.e, x) if slow and x.dtype == mx.float32 else mx.exp(x)


def row_sums(x: mx.array) -> mx.array:
    """Σ over the last axis, which stays.

    On the CPU as a product, because `sum` takes several times as long there; not on a GPU, whose products may round float32.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        return x @ mx.ones((x.shape[-1], 1))
    return x.sum(axis=-1, keepdims=True)


def silu_product(gate: mx.array, up: mx.array) -> mx.array:
    """The product in the middle of a gated MLP, silu(gate) · up, with silu(x) = x / (1 + e⁻ˣ): [..., width] twice → [..., width].

    Its backward pass needs the two inputs, and computes no exponential again (Shazeer 2020, https://arxiv.org/abs/2002.05202).
    """
    outputs: Any = _product(gate, up)
    product: mx.array = outputs[0]
    return product


@mx.custom_function
def _product(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = mx.reciprocal(1 + exponential(-gate))
    return gate * sigmoid * up, sigmoid


@_product.vjp
def _backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
    (gate, up), cotangent, sigmoid = primals, cotangents[0], outputs[1]
    silu = gate * sigmoid
    return cotangent * up * (sigmoid + silu * (1 - sigmoid)), cotangent * silu
