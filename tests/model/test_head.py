"""A split model is the whole model, or it is not split."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_sft.model.head import SplitModel, floating_weights
from mlx_sft.model.load import load_model

TOKEN_IDS = mx.array([[5, 3, 8, 1, 0, 0], [9, 9, 2, 7, 4, 6]])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_head_of_body_is_the_model(family: str, tied: bool, dtype: str, make_base: Callable[..., Path]) -> None:
    model = load_model(str(make_base(family, tied=tied)), dtype).model
    split = SplitModel(model)
    assert (split.body_name, split.layers_prefix) == ("model", "model.layers.")
    assert split.layers is model.model.layers

    hidden_states = split.hidden_states(TOKEN_IDS)
    logits = split.logits(hidden_states.reshape(-1, 64))

    assert hidden_states.shape == (2, 6, 64)
    whole = model(TOKEN_IDS).reshape(-1, logits.shape[-1]).astype(mx.float32)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    assert mx.abs(logits.astype(mx.float32) - whole).max().item() <= tolerance * mx.abs(whole).max().item()
    assert split.model_dtype() == getattr(mx, dtype)


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(12, 4)
        self.layers = [nn.Linear(4, 4)]

    def __call__(self, token_ids: mx.array) -> mx.array:
        return self.layers[0](self.embed_tokens(token_ids))


class Model(nn.Module):
    """Logits that are scaled and soft-capped."""

    body = "model"

    def __init__(self) -> None:
        super().__init__()
        self[self.body] = Body()
        self.lm_head = nn.Linear(4, 12)

    def hidden(self, token_ids: mx.array) -> mx.array:
        states: mx.array = self[self.body](token_ids) if self.body != "model" else self.model(token_ids)
        return states

    @property
    def layers(self) -> list[nn.Module]:
        return self[self.body].layers

    def __call__(self, token_ids: mx.array) -> mx.array:
        return 3 * mx.tanh(self.lm_head(self.hidden(token_ids)) / 3)


class OwnName(Model):
    """A body that no one has heard of."""

    body = "decoder"


class LooksAtInputs(Model):
    def __call__(self, token_ids: mx.array) -> mx.array:
        return super().__call__(token_ids) + mx.sin(token_ids.astype(mx.float32))[..., None]


class TwoStates(Model):
    """A body that returns two things."""

    def __init__(self) -> None:
        super().__init__()
        body = self.model

        class Two(Body):
            def __call__(self, token_ids: mx.array) -> tuple[mx.array, int]:
                return body(token_ids), 1

        self.model = Two()

    def hidden(self, token_ids: mx.array) -> mx.array:
        return self.model(token_ids)[0]


def test_the_head_is_whatever_the_model_makes_of_it() -> None:
    model = Model()
    split = SplitModel(model)
    assert split.body_name == "model"
    logits = split.logits(10 * mx.ones((3, 4)))
    assert mx.allclose(logits, 3 * mx.tanh(model.lm_head(10 * mx.ones((3, 4))) / 3)).item()


@pytest.mark.parametrize("kind", [OwnName, LooksAtInputs, TwoStates])
def test_where_the_split_does_not_hold_the_model_stays_whole(kind: type[Model]) -> None:
    model = kind()
    split = SplitModel(model)
    assert split.body_name is None
    assert split.layers_prefix == ""
    states = split.hidden_states(TOKEN_IDS)
    assert mx.array_equal(states, model(TOKEN_IDS)).item()
    assert split.logits(states[0]) is states[0] or mx.array_equal(split.logits(states[0]), states[0]).item()
    assert split.layers is model.layers


@pytest.mark.parametrize("kind", [Model, LooksAtInputs, TwoStates])
def test_the_model_is_as_it_was_after_the_probe(kind: type[Model]) -> None:
    model = kind()
    before, body, names = model(TOKEN_IDS), model.model, set(floating_weights(model))
    split = SplitModel(model)
    split.logits(split.hidden_states(TOKEN_IDS)[0])
    assert model.model is body
    assert "model" not in vars(model)
    assert set(floating_weights(model)) == names
    assert mx.array_equal(model(TOKEN_IDS), before).item()


def test_the_model_is_as_it_was_after_an_error() -> None:
    model = Model()
    split, body = SplitModel(model), model.model
    with pytest.raises(ValueError):
        mx.eval(split.logits(mx.ones((3, 5))))
    assert model.model is body


def test_only_floating_weights_are_weights() -> None:
    model = Model()
    model.table = mx.array([1, 2])
    assert "table" not in floating_weights(model)
    assert floating_weights(model)["lm_head.weight"].shape == (12, 4)
