"""Recomputed layers give the same gradients from less memory, and are the model's own again afterwards."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_sft.training.recompute import recomputed


class Layer(nn.Module):
    """A layer of two ways, one of them by keyword, that keeps much for its gradient."""

    kind = "full"

    def __init__(self) -> None:
        super().__init__()
        self.linears = [nn.Linear(16, 16) for _ in range(8)]
        self.frozen = mx.ones(16)
        self.calls = 0
        self.freeze(keys="frozen")

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        self.calls += 1
        for linear in self.linears:
            x = mx.tanh(linear(x) * self.frozen) + x
        return x if mask is None else x * mask


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = [Layer() for _ in range(layers)]

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        for layer in self.layers:
            assert layer.kind == "full"
            x = layer(x, mask=mask)
        return x


def _gradients(
    model: Model, x: mx.array, *, recompute: bool, mask: mx.array | None = None, argnums: object = (0, 1)
) -> tuple[mx.array, dict]:
    def loss(parameters: dict, x: mx.array) -> mx.array:
        model.update(parameters)
        if not recompute:
            return model(x, mask).square().mean()
        with recomputed(model.layers):
            return model(x, mask).square().mean()

    parameters = model.trainable_parameters()
    result = mx.value_and_grad(loss, argnums=argnums)(parameters, x)
    mx.eval(result)
    model.update(parameters)
    return result


def _flat(gradients: object) -> list[mx.array]:
    return [array for _, array in nn.utils.tree_flatten(gradients)]


@pytest.mark.parametrize("mask", [None, 0.5])
def test_gradients_reach_parameters_and_inputs_alike(mask: float | None) -> None:
    mx.random.seed(0)
    model, x = Model(3), mx.random.normal((5, 16))
    array = None if mask is None else mx.full((16,), mask)
    value, gradients = _gradients(model, x, recompute=False, mask=array)
    value_again, again = _gradients(model, x, recompute=True, mask=array)

    assert value_again.item() == value.item()
    expected = _flat(gradients)
    assert len(expected) == 3 * 8 * 2 + 1
    for ours, theirs in zip(_flat(again), expected, strict=True):
        assert mx.abs(theirs).max().item() > 0
        assert mx.allclose(ours, theirs, rtol=1e-5, atol=1e-7).item()
    # Forward, and once more for the gradient.
    assert [layer.calls for layer in model.layers] == [3, 3, 3]


def test_the_layers_are_the_models_own_again_even_after_an_error() -> None:
    model = Model(2)
    before = list(model.layers)

    def fail() -> None:
        with recomputed(model.layers):
            assert all(layer is not own for layer, own in zip(model.layers, before, strict=True))
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert all(layer is own for layer, own in zip(model.layers, before, strict=True))
    assert all(type(layer) is Layer for layer in model.layers)


def test_less_is_kept() -> None:
    model, x = Model(8), mx.random.normal((2048, 16))
    mx.eval(model.parameters(), x)

    def peak(*, recompute: bool) -> int:
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        _gradients(model, x, recompute=recompute, argnums=0)
        return mx.get_peak_memory() - before

    assert peak(recompute=True) < peak(recompute=False) / 2
