"""Operations on each number by itself: the same values and gradients as the plain formula."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_sft.cpu.elementwise import exponential, silu_product

pytestmark = pytest.mark.fast


def test_the_exponential_is_as_exact_as_mlxs_own() -> None:
    x = np.linspace(-80, 80, 20_001, dtype=np.float32)
    truth = np.exp(x.astype(np.float64))

    def error(values: mx.array) -> float:
        return float((np.abs(np.array(values) / truth - 1) / np.maximum(1, np.abs(x))).max())

    assert error(exponential(mx.array(x))) <= max(1e-7, error(mx.exp(mx.array(x))))


def test_the_exponential_of_what_is_not_finite() -> None:
    values = np.array(exponential(mx.array([float("-inf"), 0.0, float("inf"), float("nan")])))
    assert values[:3].tolist() == [0.0, 1.0, float("inf")]
    assert np.isnan(values[3])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_gated_product_and_its_gradients_are_those_of_the_formula(dtype: mx.Dtype) -> None:
    keys = mx.random.split(mx.random.key(0), 3)
    gate, up, cotangent = (3 * mx.random.normal((7, 11), key=key).astype(dtype) for key in keys)

    def formula(gate: mx.array, up: mx.array) -> mx.array:
        gate, up = gate.astype(mx.float32), up.astype(mx.float32)
        return gate * mx.sigmoid(gate) * up

    own, own_gradients = mx.vjp(silu_product, [gate, up], [cotangent])
    plain, gradients = mx.vjp(formula, [gate, up], [cotangent.astype(mx.float32)])
    tolerance = 1e-5 if dtype == mx.float32 else 3e-2
    for ours, theirs in zip([*own, *own_gradients], [*plain, *gradients], strict=True):
        assert ours.dtype == dtype
        assert mx.allclose(ours.astype(mx.float32), theirs.astype(mx.float32), rtol=tolerance, atol=tolerance).item()


def test_a_gate_far_from_zero_gives_no_nan() -> None:
    gate, up = mx.array([-200.0, -90.0, 90.0, 200.0]), mx.ones(4)
    values, gradients = mx.vjp(silu_product, [gate, up], [mx.ones(4)])
    assert np.allclose(values[0], [0, 0, 90, 200])
    assert np.allclose(gradients[0], [0, 0, 1, 1])
