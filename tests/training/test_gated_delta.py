"""Qwen 3.5's and Qwen3-Next's linear attention in chunks is mlx-lm's loop, and takes its place on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.gated_delta import gated_delta_update

from mlx_sft.data.dataset import Examples
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.training import recompute
from mlx_sft.training.gated_delta import chunked_holds, chunked_update
from mlx_sft.training.recompute import Mode
from mlx_sft.training.step import GradientComputer
from tests.training.test_gpu import assert_same
from tests.training.test_step import collated, cut


@pytest.mark.parametrize("heads", [(2, 2), (1, 3)])
@pytest.mark.parametrize("further", [{}, {"lower_bound": -2.0}, {"allow_neg_eigval": True}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_loop_in_value_and_gradient(heads: tuple[int, int], further: dict[str, Any], masked: bool) -> None:
    keys = mx.random.split(mx.random.key(1), 8)
    q, k, v = (
        0.3 * mx.random.normal((2, 9, n, 32), key=key)
        for n, key in zip((heads[0], heads[0], heads[1]), keys, strict=False)
    )
    a, b = (mx.random.normal((2, 9, heads[1]), key=key) for key in keys[3:5])
    decay, bias = (mx.random.normal((heads[1],), key=key) for key in keys[5:7])
    mask = mx.arange(9)[None] < mx.array([[9], [6]]) if masked else None

    def value(update: Any, *given: mx.array) -> mx.array:
        result, final = update(*given, decay, bias, None, mask, use_kernel=False, **further)
        return mx.square(result).sum() + final.sum()

    ours, theirs = (
        mx.value_and_grad(lambda *given, update=update: value(update, *given), argnums=(0, 1, 2, 3, 4))(q, k, v, a, b)
        for update in (chunked_update, gated_delta_update)
    )
    for one, other in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_it_is_proved_before_it_is_used(dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chunked_holds(dtype)
    own = mx.fast.gated_delta_update
    monkeypatch.setattr(mx.fast, "gated_delta_update", lambda *given: [1.2 * array for array in own(*given)])
    assert not chunked_holds(dtype)

    def none(*_: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(mx.fast, "gated_delta_update", none)
    assert not chunked_holds(dtype)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_on_a_gpu_it_takes_the_place_of_the_loop(
    mode: Mode, make_base: Callable[..., Path], examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base("qwen3_5_text")

    def gradient() -> tuple[float, Any]:
        split = SplitModel(load_model(str(base), "float32").model)
        method = Lora(LoraSettings(rank=4, target="all-linear"))
        start = method.attach(split.model, seed=0)
        random = np.random.default_rng(1)
        parameters = {n: v + mx.array(random.normal(0, 0.05, v.shape).astype(np.float32)) for n, v in start.items()}
        computer = GradientComputer(split, method, vocabulary=264, recompute=mode)
        batches = collated(examples, cut(range(5), examples.needed_lengths, 1000))
        found = computer.gradient(parameters, batches)
        return float(found.loss.item()), found.gradients

    calls, own = [], mx.fast.gated_delta_update

    def counted(*given: Any) -> Any:
        calls.append(1)
        return own(*given)

    monkeypatch.setattr(mx.fast, "gated_delta_update", counted)
    gradient()
    assert not calls  # on a CPU the loop stays
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    chunked = gradient()
    assert len(calls) > 2  # more than the proof
    with monkeypatch.context() as without:
        without.setattr(recompute, "chunked_holds", lambda _: False)
        loop = gradient()
    assert_same(chunked, loop, 1e-5)
