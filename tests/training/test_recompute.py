"""Every mode gives the plain gradients, from less memory, and leaves the model as it was."""

from __future__ import annotations

from functools import partial
from typing import Any, get_args

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_sft.config import TrainConfig
from mlx_sft.data.batches import Span, Spans
from mlx_sft.methods import Method, Parameters, make_method
from mlx_sft.model.head import SplitModel
from mlx_sft.training import recompute
from mlx_sft.training.recompute import Mode, Recomputation
from tests.families import FAMILIES, tiny_model

MODES: tuple[Mode, ...] = get_args(Mode)
TOKENS = mx.random.randint(0, 64, (3, 21), key=mx.random.key(5))


def attached(family: str, method: str, **changes: Any) -> tuple[SplitModel, Method, Parameters]:
    """A model with a method, and parameters none of which is zero."""
    split = SplitModel(tiny_model(family, **changes))
    chosen = make_method(TrainConfig(data="x", method=method, **({"rank": 4} if method == "lora" else {})))
    parameters = chosen.attach(split.model, 0)
    keys = mx.random.split(mx.random.key(3), len(parameters))
    moved = [
        value + 0.1 * mx.random.normal(value.shape, key=key)
        for value, key in zip(parameters.values(), keys, strict=True)
    ]
    return split, chosen, dict(zip(parameters, moved, strict=True))


def gradients(
    split: SplitModel,
    method: Method,
    parameters: Parameters,
    mode: Mode | None,
    tokens: mx.array = TOKENS,
    spans: Spans = (),
    first: int = 0,
) -> tuple[mx.array, Parameters]:
    """Of a loss over the positions from the first that counts."""
    recomputed = None if mode is None else Recomputation(split, mode)
    if recomputed is not None:
        recomputed.rows.spans = spans

    def loss(parameters: Parameters) -> mx.array:
        method.bind(split.model, parameters)
        if recomputed is None:
            states = split.hidden_states(tokens)
        else:
            with recomputed.active():
                states = split.hidden_states(tokens)
        return mx.sin(states[:, first:]).sum()

    result: tuple[mx.array, Parameters] = mx.value_and_grad(loss)(parameters)
    mx.eval(result)
    method.bind(split.model, parameters)
    return result


def assert_same(ours: tuple[mx.array, Parameters], theirs: tuple[mx.array, Parameters]) -> None:
    assert abs(ours[0].item() - theirs[0].item()) <= 1e-5 * abs(theirs[0].item()) + 1e-4
    assert list(ours[1]) == list(theirs[1])
    largest = max(mx.abs(gradient).max().item() for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():
        assert mx.abs(ours[1][name] - gradient).max().item() <= 2e-5 * largest, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_plain_ones(family: str, mode: Mode) -> None:
    model = attached(family, "lora")
    plain = gradients(*model, None)
    assert all(mx.abs(gradient).max().item() > 0 for gradient in plain[1].values())
    assert_same(gradients(*model, mode), plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_end_to_end_are_as_each_alone(family: str, mode: Mode) -> None:
    """With more tokens together than gemma 3's window of 8, one row that is longer than it, and one that begins as that does."""
    model = attached(family, "lora")
    spans = (Span(0, 1), Span(1, 4), Span(4, 14), Span(14, 20, head=4, shared=5), Span(20, 23))
    tokens = mx.random.randint(0, 64, (1, 23), key=mx.random.key(5))
    rows = [
        mx.concatenate([tokens[:, one.head : one.head + one.shared], tokens[:, one.start : one.end]], 1)
        for one in spans
    ]
    apart = [gradients(*model, None, row, first=one.shared) for row, one in zip(rows, spans, strict=True)]
    together = {name: sum((g[name] for _, g in apart[1:]), apart[0][1][name]) for name in apart[0][1]}
    assert Recomputation(model[0], mode).keeps_rows_apart(shared=True)
    ours = gradients(*model, mode, tokens, spans)
    assert_same(ours, (sum((loss for loss, _ in apart[1:]), apart[0][0]), together))


def test_rows_of_a_layer_that_cannot_be_taken_apart_are_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    split, *_ = attached("qwen3", "lora")
    monkeypatch.setattr(recompute, "find_blocks", lambda layers, run: [{} for _ in layers])
    assert not Recomputation(split, "off").keeps_rows_apart()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3"])
def test_so_are_those_of_every_weight(family: str, mode: Mode) -> None:
    model = attached(family, "full")
    assert_same(gradients(*model, mode), gradients(*model, None))


@pytest.mark.parametrize("mode", MODES)
def test_and_compiled(mode: Mode) -> None:
    split, method, parameters = attached("qwen3", "lora", num_hidden_layers=2)
    recomputed = Recomputation(split, mode)

    def loss(parameters: Parameters, tokens: mx.array) -> mx.array:
        method.bind(split.model, parameters)
        with recomputed.active():
            return mx.sin(split.hidden_states(tokens)).sum()

    compiled = mx.compile(mx.value_and_grad(loss))
    result = compiled(parameters, TOKENS)
    mx.eval(result)
    assert_same(result, gradients(split, method, parameters, None))


@pytest.mark.parametrize("mode", MODES)
def test_a_width_of_one_token(mode: Mode) -> None:
    model = attached("qwen3", "lora")
    tokens = TOKENS[:, :1]
    assert_same(gradients(*model, mode, tokens), gradients(*model, None, tokens))


def test_less_is_kept_from_mode_to_mode() -> None:
    model = attached("qwen3", "lora", num_hidden_layers=25, hidden_size=64, intermediate_size=128)
    tokens = mx.random.randint(0, 64, (2, 64), key=mx.random.key(5))

    def peak(mode: Mode | None) -> int:
        run = partial(gradients, *model, mode, tokens)
        run()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        run()
        return mx.get_peak_memory() - before

    plain, off, light, layers, blocks = (peak(mode) for mode in (None, *MODES))
    assert off < 0.7 * plain
    assert light < 0.95 * off
    assert layers < 0.5 * light
    assert blocks < 0.95 * layers


def test_the_layers_are_the_models_own_again_even_after_an_error() -> None:
    split, _, _ = attached("qwen3", "lora")
    before = list(split.layers)
    recomputed = Recomputation(split, "layers")

    def fail() -> None:
        with recomputed.active():
            assert all(layer is not own for layer, own in zip(split.layers, before, strict=True))
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert all(layer is own for layer, own in zip(split.layers, before, strict=True))


@pytest.mark.parametrize(("also", "computed"), [([], 1), (["embed_tokens", "lm_head"], 3)])
def test_in_blocks_no_layer_that_no_gradient_comes_to_is_computed_again(also: list[str], computed: int) -> None:
    split = SplitModel(tiny_model("qwen3"))
    also = also if "lm_head" not in split.model else also[:1]
    method = make_method(TrainConfig(data="x", rank=4, layers="last:3", also_train=also))
    parameters = method.attach(split.model, 0)
    calls = []

    class Counted(nn.Module):
        def __init__(self, norm: nn.Module, number: int) -> None:
            super().__init__()
            self.norm, self.number = norm, number

        def __call__(self, x: mx.array) -> mx.array:
            calls.append(self.number)
            return self.norm(x)

    for number, layer in enumerate(split.layers):
        layer.input_layernorm = Counted(layer.input_layernorm, number)
    recomputed = Recomputation(split, "blocks")
    calls.clear()

    def loss(parameters: Parameters) -> mx.array:
        method.bind(split.model, parameters)
        with recomputed.active():
            return split.hidden_states(TOKENS).sum()

    mx.value_and_grad(loss)(parameters)
    assert len(split.layers) == 4
    assert calls.count(0) == computed
    assert min(calls.count(number) for number in (1, 2, 3)) > 1


def test_the_backward_pass_stops_at_the_lowest_adapted_layer() -> None:
    """Below it nothing is differentiated: an operation without a backward pass may stand there, and not above."""
    split = SplitModel(tiny_model("qwen3"))
    method = make_method(TrainConfig(data="x", rank=4, target=["2.self_attn.q_proj", "3.mlp.down_proj"]))
    parameters = method.attach(split.model, 0)

    @mx.custom_function
    def forward_only(x: mx.array) -> mx.array:
        return x

    @forward_only.vjp
    def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
        raise AssertionError("differentiated")

    class OneWay(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def __call__(self, x: mx.array) -> mx.array:
            return forward_only(self.norm(x))

    layers = split.layers
    layers[2].input_layernorm = OneWay(layers[2].input_layernorm)
    for mode in MODES[:2]:
        _, found = gradients(split, method, parameters, mode)
        assert len(found) == 4
    layers[3].input_layernorm = OneWay(layers[3].input_layernorm)
    with pytest.raises(AssertionError, match="differentiated"):
        gradients(split, method, parameters, "off")
