"""The product in the middle of a gated MLP: silu(gate) · up, with silu(x) = x / (1 + e⁻ˣ) (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_sft.operations.exponential import exponential


def silu_product(gate: mx.array, up: mx.array) -> mx.array:
    """[..., width] twice → [..., width]. Its backward pass needs the two inputs, and computes no exponential again."""
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
