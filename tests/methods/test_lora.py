"""LoRA's targets, start, scale and dropout are PEFT's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import peft
import pytest
from mlx.utils import tree_flatten

from mlx_sft.config import TrainConfig
from mlx_sft.errors import UserError
from mlx_sft.methods import make_method
from mlx_sft.methods.lora import DoraLinear, Lora, LoraLinear, LoraSettings
from mlx_sft.methods.lora_targets import adapted_modules
from mlx_sft.methods.peft_files import our_name
from mlx_sft.model.load import load_model
from tests.graphs import primitives

# PEFT asks a transformers model in a way that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning")

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def _lora(**settings: Any) -> Lora:
    return Lora(TrainConfig(data="-", **settings).settings(LoraSettings))


@pytest.fixture
def model(make_base: Callable[..., Path]) -> nn.Module:
    return load_model(str(make_base("qwen3")), "float32").model


def _paths(attention: tuple[str, ...], mlp: tuple[str, ...] = ()) -> set[str]:
    inner = [f"self_attn.{name}" for name in attention] + [f"mlp.{name}" for name in mlp]
    return {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in inner}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("all-linear",), _paths(ATTENTION, MLP)),
        (("attention",), _paths(ATTENTION)),
        (("qv",), _paths(("q_proj", "v_proj"))),
        (("down_proj", "k_proj"), _paths(("k_proj",), ("down_proj",))),
        (("qv", "q_proj"), _paths(("q_proj", "v_proj"))),
        (("layers.1.mlp.up_proj",), {"model.layers.1.mlp.up_proj"}),
        (("lm_head",), {"lm_head"}),
    ],
)
def test_targets(model: nn.Module, targets: tuple[str, ...], expected: set[str]) -> None:
    found = adapted_modules(model, LoraSettings(target=list(targets)))
    assert set(found) == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["lm_head", "up_proj"]])
def test_targets_are_those_that_peft_takes(
    targets: str | list[str], make_base: Callable[..., Path], model: nn.Module, torch_model: Callable
) -> None:
    config = peft.LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(torch_model(make_base("qwen3")), config).named_parameters()
    names = {our_name(name.replace(".default", "")) for name, parameter in theirs if parameter.requires_grad}
    ours = _lora(rank=2, target=targets)
    assert ours.attach(model, seed=0).keys() == names


def test_layers_come_in_their_order() -> None:
    model = nn.Module()
    model.layers = [nn.Linear(2, 2) for _ in range(12)]
    assert adapted_modules(model, LoraSettings()) == [f"layers.{i}" for i in range(12)]


@pytest.mark.parametrize("target", ["q_prj", "proj", "embed", "model.layers"])
def test_a_target_that_is_no_linear_module_is_told_which_there_are(model: nn.Module, target: str) -> None:
    with pytest.raises(UserError, match=f"no linear module of this model is named {target}") as error:
        _lora(target=["q_proj", target]).attach(model, seed=0)
    assert all(name in error.value.hint for name in (*ATTENTION, *MLP, "lm_head"))
    assert type(model.layers[0].self_attn.q_proj) is nn.Linear  # nothing was touched


def test_a_model_is_the_same_until_b_is_no_longer_zero(model: nn.Module) -> None:
    token_ids = mx.array([[1, 2, 3, 4]])
    before = model(token_ids)
    method = _lora(rank=2)
    parameters = method.attach(model, seed=0)
    assert mx.array_equal(model(token_ids), before).item()
    assert all((not value.any().item()) == name.endswith("lora_B") for name, value in parameters.items())
    method.bind(model, {name: value + 0.1 for name, value in parameters.items()})
    assert not mx.allclose(model(token_ids), before).item()


def test_only_the_adapter_is_trainable(model: nn.Module) -> None:
    parameters = _lora(rank=2, target="qv").attach(model, seed=0)
    trainable = dict(tree_flatten(model.trainable_parameters()))
    assert trainable.keys() == parameters.keys()
    assert {value.dtype for value in parameters.values()} == {mx.float32}
    assert parameters["model.layers.0.self_attn.v_proj.lora_A"].shape == (2, 64)
    assert parameters["model.layers.0.self_attn.v_proj.lora_B"].shape == (32, 2)


def test_kaiming_is_uniform_within_pefts_bounds(model: nn.Module) -> None:
    parameters = _lora(rank=16).attach(model, seed=0)
    for name, width in (("self_attn.q_proj", 64), ("mlp.down_proj", 96)):
        values = np.array(parameters[f"model.layers.0.{name}.lora_A"])
        bound = 1 / math.sqrt(width)
        assert 0.98 * bound < np.abs(values).max() <= bound
        assert values.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_gaussian_has_the_deviation_of_pefts(model: nn.Module) -> None:
    parameters = _lora(rank=8, init="gaussian").attach(model, seed=0)
    values = np.concatenate([np.array(v).ravel() for n, v in parameters.items() if n.endswith("lora_A")])
    assert values.std() == pytest.approx(1 / 8, rel=0.03)
    assert abs(values.mean()) < 0.01


def test_a_seed_decides_the_start_and_no_two_modules_share_it(make_base: Callable[..., Path]) -> None:
    def start(seed: int) -> dict[str, np.ndarray]:
        model = load_model(str(make_base("qwen3")), "float32").model
        parameters = _lora(rank=2).attach(model, seed)
        return {name: np.array(value) for name, value in parameters.items() if name.endswith("lora_A")}

    one, again, other = start(0), start(0), start(1)
    assert all(np.array_equal(one[name], again[name]) for name in one)
    firsts = [array[0, 0] for parameters in (one, other) for array in parameters.values()]
    assert len(set(firsts)) == len(firsts) == 28


@pytest.mark.parametrize(("rslora", "scale"), [(False, 8 / 4), (True, 8 / 2)])
def test_the_update_is_scaled(rslora: bool, scale: float) -> None:
    settings = _lora(rank=4, alpha=8.0, rslora=rslora).settings
    linear = nn.Linear(6, 3)
    module = LoraLinear(linear, 4, settings.scale_of("model.x"), 0.0)
    x, lora_A, lora_B = (mx.random.normal(shape, key=mx.random.key(1)) for shape in ((2, 6), (4, 6), (3, 4)))
    module.lora_A, module.lora_B = lora_A, lora_B
    assert settings.scale_of("") == scale
    expected = linear(x) + scale * (x @ lora_A.T) @ lora_B.T
    assert mx.allclose(module(x), expected, rtol=1e-5, atol=1e-5).item()


def test_the_output_keeps_the_precision_of_the_base() -> None:
    linear = nn.Linear(6, 3)
    linear.set_dtype(mx.bfloat16)
    module = LoraLinear(linear, 2, 1.0, 0.0)
    assert module(mx.ones((1, 6), mx.bfloat16)).dtype == mx.bfloat16
    assert module.lora_A.dtype == mx.float32


def _adapted(dtype: mx.Dtype) -> tuple[Callable[..., mx.array], list[mx.array]]:
    """An adapter's result [2, 5, 3] as a function of x, A and B, and these."""
    linear = nn.Linear(6, 3, bias=False)
    linear.weight = mx.random.normal((3, 6), dtype, key=mx.random.key(1))
    module = LoraLinear(linear, 4, 1.5, 0.0)
    x, *halves = (mx.random.normal(shape, key=mx.random.key(2)) for shape in ((2, 5, 6), (4, 6), (3, 4)))

    def adapted(x: mx.array, lora_A: mx.array, lora_B: mx.array) -> mx.array:
        module.lora_A, module.lora_B = lora_A, lora_B
        result: mx.array = module(x)
        return result

    given = [x.astype(dtype), *halves]
    mx.eval(linear.parameters(), given)
    return adapted, given


def test_in_the_bases_precision_an_adapter_is_the_same_within_it() -> None:
    found = []
    for dtype in (mx.float32, mx.bfloat16):
        adapted, given = _adapted(dtype)
        cotangent = mx.random.normal((2, 5, 3), dtype, key=mx.random.key(3))
        results, gradients = mx.vjp(adapted, given, [cotangent])
        assert [array.dtype for array in (*results, *gradients)] == [dtype, dtype, mx.float32, mx.float32]
        found.append([*results, *gradients])
    for expected, rounded in zip(*found, strict=True):
        assert rounded.shape == expected.shape
        assert mx.abs(rounded.astype(mx.float32) - expected).max() <= 2e-2 * mx.abs(expected).max()


def test_an_adapters_gradients_take_four_kernels_in_bfloat16(tmp_path: Path) -> None:
    """A x, and the gradients of A x, A and B: A and B come rounded, the scale is in A, and rows lie side by side."""
    adapted, (x, *halves) = _adapted(mx.bfloat16)
    halves = [half.astype(mx.bfloat16) for half in halves]
    ones = mx.ones((2, 5, 3), mx.bfloat16)
    mx.eval(ones, halves)
    gradients = mx.compile(lambda *halves: mx.vjp(lambda *own: adapted(x, *own), halves, [ones])[1])
    assert primitives(tmp_path / "graph.dot", *gradients(*halves)) == 4


def test_rounded_halves_are_what_the_layer_makes_of_them() -> None:
    linear = nn.Linear(6, 3, bias=False)
    linear.set_dtype(mx.bfloat16)
    module = LoraLinear(linear, 4, 1.3, 0.0)
    module.lora_A, module.lora_B = (mx.random.normal(shape, key=mx.random.key(2)) for shape in ((4, 6), (3, 4)))
    x = mx.random.normal((2, 5, 6), mx.bfloat16, key=mx.random.key(3))
    expected = module(x)
    module.lora_A, module.lora_B = (module.rounded(half, module[half], mx.bfloat16) for half in ("lora_A", "lora_B"))
    assert module.lora_A.dtype == mx.bfloat16
    assert mx.array_equal(module(x), expected).item()


def test_dropout_zeroes_its_share_of_inputs_and_keeps_their_mean() -> None:
    linear = nn.Linear(1, 1, bias=False)
    linear.weight = mx.zeros((1, 1))
    root = nn.Module()
    root.layers = [linear]
    method = _lora(rank=1, alpha=1.0, dropout=0.25)
    method.attach(root, seed=0)
    ones = {"layers.0.lora_A": mx.ones((1, 1)), "layers.0.lora_B": mx.ones((1, 1))}
    x = mx.ones((20_000, 1))

    method.bind(root, ones, mx.random.key(0))
    dropped = np.array(root.layers[0](x))
    assert set(np.unique(dropped).round(6)) == {0.0, np.float32(4 / 3).round(6)}
    assert (dropped == 0).mean() == pytest.approx(0.25, abs=0.02)
    method.bind(root, ones)
    assert (np.array(root.layers[0](x)) == 1).all()


def test_every_module_drops_others(model: nn.Module) -> None:
    method = _lora(rank=2, dropout=0.5)
    parameters = method.attach(model, seed=0)
    method.bind(model, parameters, mx.random.key(0))
    keys = [tuple(module.dropout_key.tolist()) for module in method.modules.values()]
    assert len(set(keys)) == len(keys) == 14


def test_binding_some_leaves_the_others_as_they_are(make_base: Callable[..., Path]) -> None:
    model = load_model(str(make_base("qwen3")), "float32").model
    method = _lora(rank=2, dropout=0.5, target="q_proj,lm_head")
    parameters = method.attach(model, seed=0)
    method.bind(model, parameters, mx.random.key(0))
    head = {name: value + 1 for name, value in parameters.items() if name.startswith("lm_head")}
    method.bind(model, head)
    assert mx.array_equal(model.lm_head.lora_B, head["lm_head.lora_B"]).item()
    q_proj = model.layers[0].self_attn.q_proj
    assert q_proj.dropout_key is not None
    assert mx.array_equal(q_proj.lora_A, parameters["model.layers.0.self_attn.q_proj.lora_A"]).item()


def test_settings_come_from_the_configuration() -> None:
    config = TrainConfig(data="x", rank=3, alpha=5, dropout=0.1, rslora=True, target="q_proj,v_proj", init="gaussian")
    expected = LoraSettings(rank=3, alpha=5.0, dropout=0.1, rslora=True, target=["q_proj", "v_proj"], init="gaussian")
    assert config.settings(LoraSettings) == expected
    method = make_method(config)
    assert isinstance(method, Lora)
    assert method.settings == expected
    assert TrainConfig(data="x").settings(LoraSettings).targets == ("all-linear",)


def test_what_it_changes_is_what_its_model_computes_with(model: nn.Module) -> None:
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    token_ids = mx.array([[1, 2, 3, 4]])
    method = _lora(rank=2, alpha=3.0, target="qv,lm_head")
    parameters = {name: value + 0.05 for name, value in method.attach(model, seed=0).items()}
    method.bind(model, parameters)
    adapted = model(token_ids)
    shapes = method.changed_shapes(parameters)
    assert shapes == {name: weights[name].shape for name in shapes}
    assert len(shapes) == 5
    for name in shapes:
        changed = method.changed_weight(name, weights[name], parameters)
        assert changed.dtype == mx.float32
        module = method.modules[name.removesuffix(".weight")]
        module.linear.weight = changed
    method.bind(model, {name: mx.zeros_like(value) for name, value in parameters.items()})
    assert mx.allclose(model(token_ids), adapted, rtol=1e-5, atol=1e-5).item()


def test_single_modules_may_have_a_rank_and_a_scale_of_their_own(model: nn.Module) -> None:
    method = _lora(
        rank=4,
        alpha=8.0,
        target="all-linear",
        rank_pattern={"layers.1.mlp.up_proj": 2, "up_proj": 6},
        alpha_pattern={"q_proj": 1.0},
    )
    parameters = method.attach(model, seed=0)
    ranks = {name: value.shape[0] for name, value in parameters.items() if name.endswith("lora_A")}
    assert ranks["model.layers.0.mlp.up_proj.lora_A"] == 6
    assert ranks["model.layers.1.mlp.up_proj.lora_A"] == 2
    assert ranks["model.layers.1.mlp.down_proj.lora_A"] == 4
    assert method.modules["model.layers.0.self_attn.q_proj"].scale == 1 / 4
    assert method.modules["model.layers.1.mlp.up_proj"].scale == 8 / 2


def test_dora_starts_as_the_base(model: nn.Module) -> None:
    token_ids = mx.array([[3, 1, 4, 1, 5]])
    before = model(token_ids)
    parameters = _lora(rank=2, dora=True, target="all-linear").attach(model, seed=0)
    assert mx.abs(model(token_ids) - before).max() <= 1e-5 * mx.abs(before).max()
    norms = parameters["model.layers.0.self_attn.q_proj.lora_magnitude_vector"]
    weight = model.layers[0].self_attn.q_proj.linear.weight
    np.testing.assert_allclose(np.array(norms), np.linalg.norm(np.array(weight), axis=1), rtol=1e-5)


def test_what_was_taken_off_can_be_put_back(model: nn.Module) -> None:
    token_ids = mx.array([[3, 1, 4, 1, 5]])
    before = model(token_ids)
    method = _lora(rank=2, target="all-linear")
    parameters = method.attach(model, seed=0)
    method.bind(model, {name: mx.ones(value.shape) for name, value in parameters.items()})
    adapted = model(token_ids)
    assert sum(isinstance(module, LoraLinear) for module in model.modules()) == 14
    put_back = Lora.detach(model)
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    assert mx.array_equal(model(token_ids), before)
    put_back()
    assert mx.array_equal(model(token_ids), adapted)


@pytest.mark.parametrize("pattern", [{"rank_pattern": {"dwn_proj": 3}}, {"alpha_pattern": {"foo": 1.0}}])
def test_a_pattern_that_names_nothing_is_refused(model: nn.Module, pattern: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no module that is trained is named") as caught:
        _lora(rank=2, target="all-linear", **pattern).attach(model, seed=0)
    assert "down_proj" in caught.value.hint


def test_a_rank_of_one_module_is_bounded_too(model: nn.Module) -> None:
    with pytest.raises(UserError, match="more than the widest"):
        _lora(rank=2, rank_pattern={"q_proj": 10**11}).attach(model, seed=0)


def test_a_row_of_zeros_stays_one_under_dora() -> None:
    linear = nn.Linear(4, 3, bias=False)
    linear.weight = mx.array([[1.0, 2, 3, 4], [0, 0, 0, 0], [1, 0, 0, 0]])
    assert mx.allclose(DoraLinear(linear, 2, 1.0, 0.0)(mx.ones((1, 4))), linear(mx.ones((1, 4))))
