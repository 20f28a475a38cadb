"""A head in tiles of its vocabulary is the head, for whatever a model makes of its logits one by one; else there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.model.tiles import TiledHead, expected_tiles, tiled_head
from tests.torch_families import TORCH_FAMILIES

HIDDEN, VOCABULARY = 32, 70


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = [nn.Linear(HIDDEN, HIDDEN)]

    def __call__(self, token_ids: mx.array) -> mx.array:
        return self.layers[0](self.embed_tokens(token_ids))


class Capped(nn.Module):
    """Logits with a bias, scaled and soft-capped."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY)

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers

    def __call__(self, token_ids: mx.array) -> mx.array:
        return self.of(self.lm_head(self.model(token_ids)))

    def of(self, logits: mx.array) -> mx.array:
        return 3 * mx.tanh(2 * logits / 3)


class Tied(Capped):
    def __init__(self) -> None:
        super().__init__()
        del self.lm_head

    def __call__(self, token_ids: mx.array) -> mx.array:
        return self.of(self.model.embed_tokens.as_linear(self.model(token_ids)))


class Normalized(Capped):
    """Logits that depend on one another."""

    def of(self, logits: mx.array) -> mx.array:
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


class OfItsOwn(Capped):
    """An output matrix that no one knows by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = self.pop("lm_head")

    def __call__(self, token_ids: mx.array) -> mx.array:
        return self.readout(self.model(token_ids))


def _states(positions: int = 9) -> mx.array:
    return mx.random.normal((positions, HIDDEN), key=mx.random.key(3))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kind", [Capped, Tied])
def test_tiles_side_by_side_are_the_logits_and_so_are_their_gradients(kind: type[Capped], bits: int | None) -> None:
    model = kind()
    if bits:
        nn.quantize(model, 32, bits)
    split = SplitModel(model)
    head = tiled_head(split)
    assert head is not None
    head.columns = 16
    states, targets = _states(), mx.array([0, 15, 16, 69, 69, 1, 40, 63, 64])
    assert [tile.stop - tile.start for tile in head.tiles] == [16, 16, 16, 16, 6]

    def tiled(states: mx.array) -> mx.array:
        return mx.concatenate([head.logits(states, tile) for tile in head.tiles], axis=-1)

    def of_targets(states: mx.array) -> mx.array:
        return mx.take_along_axis(split.logits(states), targets[:, None], axis=-1)

    for ours, theirs in (
        (tiled, split.logits),
        (lambda states: head.target_logits(states, targets), of_targets),
    ):
        expected = theirs(states)
        assert mx.allclose(ours(states), expected, atol=1e-5).item()
        cotangent = mx.random.normal(expected.shape, key=mx.random.key(5))
        (found,), (wanted,) = (mx.vjp(function, [states], [cotangent])[1] for function in (ours, theirs))
        assert mx.abs(wanted).max().item() > 0.1
        assert mx.allclose(found, wanted, atol=1e-5).item()


@pytest.mark.parametrize("kind", [Normalized, OfItsOwn])
def test_a_head_that_is_no_sum_of_tiles_is_left_whole(kind: type[Capped]) -> None:
    split = SplitModel(kind())
    assert split.body_name == "model"
    assert tiled_head(split) is None


def test_a_head_under_an_adapter_is_left_whole() -> None:
    class Adapted(nn.Linear):
        pass

    model = Capped()
    model.lm_head = Adapted(HIDDEN, VOCABULARY)
    assert tiled_head(SplitModel(model)) is None


def test_the_model_is_as_it_was_after_a_tile_and_after_an_error() -> None:
    model = Capped()
    head = tiled_head(SplitModel(model))
    assert head is not None
    output = model.lm_head
    with pytest.raises(ValueError):
        mx.eval(head.logits(mx.ones((2, HIDDEN + 1)), slice(0, 5)))
    assert model.lm_head is output
    assert "lm_head" not in vars(model)
    assert output.weight.shape == (VOCABULARY, HIDDEN)


@pytest.mark.parametrize("family", TORCH_FAMILIES)
def test_every_tested_family_has_its_head_in_tiles_as_expected_without_weights(
    family: str, make_base: Callable[..., Path]
) -> None:
    split = SplitModel(load_model(str(make_base(family)), "float32").model)
    assert isinstance(tiled_head(split), TiledHead)
    assert expected_tiles(split) is not None
