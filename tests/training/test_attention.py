"""Attention composed of plain operations is MLX's own; and it is used where the device has no gradient, which is asked beforehand."""

from __future__ import annotations

from typing import Any, get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.base import scaled_dot_product_attention

from mlx_sft import TrainConfig, load_model
from mlx_sft.methods import Parameters, make_method
from mlx_sft.model.blocks import attention_names, calls_attention, with_names
from mlx_sft.model.head import SplitModel
from mlx_sft.training.attention import composed_attention
from mlx_sft.training.recompute import Mode
from mlx_sft.training.step import GradientComputer
from tests.training.test_gpu import assert_same, batch

pytestmark = pytest.mark.fast

ROWS, QUERIES, KEYS, WIDTH = 2, 5, 7, 8


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


MASKS: dict[str, Any] = {
    "none": None,
    "causal": "causal",
    "which count": random(QUERIES, KEYS, seed=5) < 1,
    "which count in each row": mx.concatenate(
        [random(ROWS, 1, QUERIES, KEYS - 1) < 1, mx.ones((ROWS, 1, QUERIES, 1), mx.bool_)], -1
    ),
    "what is added": random(QUERIES, KEYS, seed=6),
    "what is added in each head": random(ROWS, 6, QUERIES, KEYS, seed=7),
}


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_it_is_mlxs_own_in_value_and_gradient(mask: Any, sinks: bool, kv_heads: int) -> None:
    arrays = [
        random(ROWS, 6, QUERIES, WIDTH),
        random(ROWS, kv_heads, KEYS, WIDTH, seed=1),
        random(ROWS, kv_heads, KEYS, WIDTH, seed=2),
    ]
    further = {"scale": 0.3, "mask": mask, "sinks": random(6, seed=3) if sinks else None}
    weights = random(ROWS, 6, QUERIES, WIDTH, seed=4)

    def results(attention: Any) -> list[np.ndarray]:
        def value(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            return (weights * attention(q, k, v, **further)).sum()

        _, gradients = mx.value_and_grad(value, argnums=(0, 1, 2))(*arrays)
        return [np.array(array) for array in (attention(*arrays, **further), *gradients)]

    for ours, theirs in zip(results(composed_attention), results(mx.fast.scaled_dot_product_attention), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_it_sums_up_in_float32(dtype: mx.Dtype) -> None:
    q, k, v = (random(1, 2, 9, WIDTH, seed=seed).astype(dtype) for seed in range(3))
    ours = composed_attention(q, k, v, scale=0.3, mask="causal")
    theirs = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask="causal")
    assert ours.dtype == dtype
    np.testing.assert_allclose(*(np.array(a.astype(mx.float32)) for a in (ours, theirs)), rtol=2e-2, atol=2e-2)


def subject() -> tuple[GradientComputer, Parameters]:
    base = load_model("tiny")
    method = make_method(TrainConfig(data="-", model="tiny"))
    parameters = method.attach(base.model, 0)
    return GradientComputer(SplitModel(base.model), method, base.config["vocab_size"]), parameters


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_step_is_the_same_with_composed_attention(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def counted(*arrays: mx.array, **named: Any) -> mx.array:
        called.append(1)
        return composed_attention(*arrays, **named)

    monkeypatch.setattr("mlx_sft.training.recompute.fast_core", lambda block: None)
    monkeypatch.setattr("mlx_sft.training.recompute.composed_attention", counted)
    computer, parameters = subject()
    plain = computer.gradient(parameters, [batch()])
    computer.configure(mode)
    assert not called
    computer.compose_attention()
    called.clear()
    found = computer.gradient(parameters, [batch()])
    assert called
    assert_same((found.loss.item(), found.gradients), (plain.loss.item(), plain.gradients), 1e-5)


class OfMlx(nn.Module):
    """Attention that calls MLX's itself, as some families' does, with what it has of its own besides."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 0.5

    def __call__(self, x: mx.array, mask: Any = "causal", *, turned: bool = False) -> mx.array:
        turn = mx.negative if turned else (lambda array: array)
        return turn(mx.fast.scaled_dot_product_attention(x, x, x, scale=self.scale, mask=mask))


class OfMlxLm(nn.Module):
    """Attention that calls mlx-lm's helper, as most families' does."""

    def __call__(self, x: mx.array) -> mx.array:
        return scaled_dot_product_attention(x, x, x, cache=None, scale=0.5, mask="causal", sinks=mx.ones(2))


class NoAttention(nn.Module):
    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, None, 1e-6)


def test_a_modules_own_code_runs_with_another_attention() -> None:
    x = random(1, 2, 5, WIDTH)
    for module, arguments in ((OfMlx(), {}), (OfMlx(), {"mask": None, "turned": True}), (OfMlxLm(), {})):
        expected = module(x, **arguments)
        assert calls_attention(module)
        np.testing.assert_allclose(
            with_names(module, attention_names(composed_attention))(x, **arguments), expected, atol=1e-5
        )
        marked = with_names(module, attention_names(lambda q, k, v, **_: mx.full(q.shape, 7.0)))(x, **arguments)
        assert set(np.abs(np.array(marked)).ravel().tolist()) == {7.0}
        np.testing.assert_array_equal(module(x, **arguments), expected)  # the module and its class are as they were
    assert not calls_attention(NoAttention())
