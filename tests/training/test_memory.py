"""What a step is predicted to take is near what MLX measures, for every mode, and grows with what makes it grow."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_sft.config import TrainConfig
from mlx_sft.data.batches import Batch
from mlx_sft.methods import Method, Parameters, make_method
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.training import layer_counts
from mlx_sft.training.layer_counts import LayerCounts, count_layers
from mlx_sft.training.memory import MODES, Footprint, Prediction
from mlx_sft.training.recompute import Mode
from mlx_sft.training.step import GradientComputer

SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "head_dim": 32}
VOCABULARY = 264

_LINEAR_ATTENTION = {
    "layer_types": [*(4 * ["linear_attention"]), "full_attention", "linear_attention"],
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}

_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 192}

Trained = tuple[SplitModel, GradientComputer, Parameters, Footprint]


@pytest.fixture
def trained(make_base: Callable[..., Path]) -> Callable[..., Trained]:
    """`trained(family, mode, shape of the model, settings of the run)`: a model with a method attached."""

    def make(
        family: str = "qwen3", mode: Mode = "off", shape: dict[str, Any] | None = None, **settings: Any
    ) -> Trained:
        shape = SHAPE | (shape or {})
        dtype = settings.get("master_dtype", "float32")
        split = SplitModel(load_model(str(make_base(family, **shape)), dtype).model)
        config = TrainConfig(data="-", **settings)
        method = make_method(config)
        parameters = method.attach(split.model, seed=0)
        vocabulary = shape.get("vocab_size", VOCABULARY)
        footprint = Footprint.of(config, split, method, parameters, vocabulary, head="tiles", fused=False)
        return split, GradientComputer(split, method, vocabulary, recompute=mode), parameters, footprint

    return make


def batch(rows: int, width: int, supervised: int) -> Batch:
    positions = np.arange(supervised, dtype=np.int32)
    return Batch(
        token_ids=np.ones((rows, width), np.int32),
        positions=positions,
        targets=np.ones(supervised, np.int32),
        weights=np.ones(supervised, np.float32),
        tokens=rows * width,
        needed_tokens=rows * width,
    )


def measured(gradient_computer: GradientComputer, parameters: Parameters, batch: Batch, predicted: Prediction) -> int:
    """What a gradient takes above what is there before it, with MLX held to what was predicted."""
    mx.eval(parameters)
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.set_memory_limit(before + predicted.limit - predicted.weights - predicted.trained)
    gradient_computer.gradient(parameters, [batch])
    return mx.get_peak_memory() - before


_SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("qwen3", {}, {"rank": 4}),
    "vocabulary": ("qwen3", {"hidden_size": 64, "vocab_size": 16384}, {"rank": 2}),
    "full": ("qwen3", {"num_hidden_layers": 2}, {"method": "full"}),
    "tied embeddings": (
        "qwen3",
        {"vocab_size": 4096, "tie_word_embeddings": True},
        {"rank": 4, "also_train": ["embed_tokens", "lm_head"]},
    ),
    "linear attention": ("qwen3_5_text", _LINEAR_ATTENTION, {"rank": 4}),
    "convolutions": ("lfm2", {"layer_types": 3 * ["conv", "full_attention"]}, {"rank": 4}),
}
_MORE_SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"num_key_value_heads": 4}, {"rank": 16}),
    "top layers": ("qwen3", {}, {"rank": 4, "layers": "last:4"}),
    "head": ("qwen3", {"vocab_size": 4096}, {"rank": 4, "also_train": ["lm_head"]}),
    "embeddings": ("qwen3", {"vocab_size": 4096}, {"rank": 4, "also_train": ["embed_tokens"]}),
    "full of some": ("qwen3", {}, {"method": "full", "layers": "2-4"}),
    "experts": ("qwen3_moe", _EXPERTS, {"rank": 8}),
    "experts' norms": ("qwen3_moe", _EXPERTS, {"rank": 8, "dora": True}),
    "full in bfloat16": ("qwen3", {"num_hidden_layers": 2}, {"method": "full", "master_dtype": "bfloat16"}),
    "virtual tokens": ("qwen3", {}, {"method": "p-tuning", "encoder": "lstm", "virtual_tokens": 64}),
    "bottlenecks": ("qwen3", {}, {"method": "bottleneck", "reduction_factor": 4}),
}
"""The same code as the shapes above with others of its settings: the two modes at the ends are enough."""


@pytest.mark.parametrize(
    ("family", "shape", "settings", "mode"),
    [pytest.param(*shape, mode, id=f"{name}-{mode}") for name, shape in _SHAPES.items() for mode in MODES]
    + [
        pytest.param(*shape, mode, id=f"{name}-{mode}")
        for name, shape in _MORE_SHAPES.items()
        for mode in ("off", "blocks")
    ],
)
def test_a_prediction_is_near_what_is_measured(
    trained: Callable[..., Trained], family: str, shape: dict[str, Any], settings: dict[str, Any], mode: Mode
) -> None:
    _, gradient_computer, parameters, footprint = trained(family, mode, shape, **settings)
    rows, width, supervised = 2, 128, 100
    predicted = footprint.predict(mode, rows * width, width=width, supervised=supervised)
    above = measured(gradient_computer, parameters, batch(rows, width, supervised), predicted)
    # Were it too little, MLX would take more than it is held to; were it too much, less.
    assert 0.75 * above < predicted.kept + predicted.passing < 1.4 * above
    assert 0.85 < predicted.peak / (predicted.weights + predicted.trained + above) < 1.25


def test_on_a_gpu_a_state_of_each_position_is_kept_only_where_the_loop_stays(
    make_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = SplitModel(load_model(str(make_base("qwen3_5_text", **SHAPE | _LINEAR_ATTENTION)), "bfloat16").model)
    chunked = count_layers(split, fused=True)
    monkeypatch.setattr(layer_counts, "chunked_holds", lambda _: False)
    looped = count_layers(split, fused=True)
    assert [layer.recurrent for layer in chunked] == 6 * [0]
    assert {layer.states for layer in chunked} == {
        SHAPE["hidden_size"]
    }  # a convolution, which comes first, is no product
    assert [layer.recurrent for layer in looped] == [*(4 * [4 * 32 * 32]), 0, 4 * 32 * 32]
    assert [replace(layer, recurrent=0) for layer in looped] == chunked


def test_without_being_held_back_more_is_taken(trained: Callable[..., Trained]) -> None:
    """As on a GPU, where what MLX makes room for ahead of its computation is counted in."""
    footprint = trained()[-1]
    ahead = replace(footprint, held=False)
    for mode in MODES:
        assert ahead.predict(mode, 512).passing > footprint.predict(mode, 512).passing
        assert ahead.predict(mode, 512).kept == footprint.predict(mode, 512).kept


def test_each_mode_keeps_less_than_the_one_before(trained: Callable[..., Trained]) -> None:
    footprint = trained()[-1]
    kept = [footprint.predict(mode, 4096).kept for mode in MODES]
    assert kept == sorted(kept, reverse=True)
    assert len(set(kept)) == len(kept)


@pytest.mark.parametrize("mode", MODES)
def test_more_tokens_and_more_supervised_ones_take_more(trained: Callable[..., Trained], mode: Mode) -> None:
    footprint = trained()[-1]
    peaks = [footprint.predict(mode, tokens).peak for tokens in (1, 64, 512, 513, 4096)]
    assert peaks == sorted(peaks)
    few, many = (footprint.predict(mode, 4096, supervised=n).peak for n in (10, 4000))
    assert few <= many


def test_what_is_trained_is_counted_with_its_optimizer(trained: Callable[..., Trained]) -> None:
    _, _, parameters, footprint = trained(rank=4)
    adapters = sum(value.size for value in parameters.values())
    assert footprint.trainable == adapters
    assert footprint.predict("off", 1).trained == 16 * adapters
    alone = replace(footprint, accumulates=False)
    assert alone.predict("off", 1).trained == 12 * adapters, "one micro-batch has nothing to be added to"


def test_weights_that_are_trained_as_they_are_are_counted_once(trained: Callable[..., Trained]) -> None:
    split, _, parameters, footprint = trained(method="full")
    assert footprint.weights == 0
    assert footprint.predict("off", 1).trained == 16 * sum(value.size for value in parameters.values())
    frozen = trained(rank=1)[-1]
    assert frozen.weights == pytest.approx(sum(v.nbytes for v in parameters.values()))
    assert split.model is not None


def test_masters_in_bfloat16_are_the_weights_and_their_gradients_are_as_long(trained: Callable[..., Trained]) -> None:
    _, _, parameters, footprint = trained(method="full", master_dtype="bfloat16", optimizer="adamw8bit")
    numbers = sum(value.size for value in parameters.values())
    state = footprint.optimizer_state_bytes
    assert footprint.weights == 0
    assert footprint.predict("off", 1).trained == (2 + 4) * numbers + state, "a sum of gradients is float32"
    alone = replace(footprint, accumulates=False)
    assert alone.predict("off", 1).trained == 2 * numbers + state
    assert alone.predict("blocks", 1).kept == 2 * numbers
    assert footprint.checkpoint_bytes == 2 * numbers + state


def test_layers_below_the_lowest_adapter_keep_nothing(trained: Callable[..., Trained]) -> None:
    every = trained(target="q_proj")[-1]
    top = trained(target="model.layers.4.self_attn.q_proj,model.layers.5.self_attn.q_proj")[-1]
    assert trained(target="q_proj", layers="last:2")[-1] == top
    assert (len(every.layers), len(top.layers), len(top.below)) == (6, 2, 4)
    assert top.predict("off", 4096).kept == pytest.approx(every.predict("off", 4096).kept / 3)


# On a GPU


@pytest.mark.parametrize(
    ("heads", "rows", "width", "bytes_taken"),
    [(16, 4, 512, 176_160_768), (32, 2, 1024, 536_870_912)],
    ids=["0.6B, four rows of 512", "4B, two rows of 1,024"],
)
def test_the_tiles_of_attentions_backward_pass_are_counted(heads: int, rows: int, width: int, bytes_taken: int) -> None:
    """Three arrays of scores a row and head in bfloat16, and float32 of what is added up."""
    plain = LayerCounts(8, 8, 8, 8, 8, 0, 8, attended=128 * heads, trained=True)
    fused = replace(plain, heads=heads, keys=1024)
    with_tiles, without = (
        Footprint((layer,), (), 0, 0, 0, 0, 2, 1, 1, 1, head="fused", held=False).predict(
            "off", rows * width, width=width, supervised=1
        )
        for layer in (fused, plain)
    )
    ahead = min(10 * 50 * 2**20, with_tiles.passing - without.passing)
    assert bytes_taken <= with_tiles.passing - without.passing <= bytes_taken + ahead


@pytest.mark.parametrize(("family", "scores"), [("gemma2", True), ("qwen3", False)])
def test_attention_that_no_gpu_computes_in_one_piece_keeps_its_scores(
    family: str, scores: bool, make_base: Callable[..., Path]
) -> None:
    split = SplitModel(load_model(str(make_base(family, head_dim=64)), "float32").model)
    counted = count_layers(split, fused=True)
    assert all((layer.scores > 0, layer.heads == 0) == (scores, scores) for layer in counted)
    composed = count_layers(split, fused=True, composes_attention=True)
    assert all(layer.scores > 0 and layer.heads == 0 for layer in composed)


def test_a_size_of_heads_that_metal_has_no_kernel_for_keeps_its_scores(make_base: Callable[..., Path]) -> None:
    split = SplitModel(load_model(str(make_base("qwen3", head_dim=40)), "float32").model)
    assert all(layer.scores for layer in count_layers(split, fused=True))


class VirtualTokens(Method):
    """Trains states that stand before those of the tokens, and no module of the model."""

    def attach(self, model: nn.Module, seed: int) -> Parameters:
        return {"prompt": mx.zeros((4, SHAPE["hidden_size"]))}


def test_what_is_trained_before_the_layers_is_reached_through_all_of_them(
    trained: Callable[..., Trained], make_base: Callable[..., Path]
) -> None:
    split = SplitModel(load_model(str(make_base("qwen3", **SHAPE)), "float32").model)
    method = VirtualTokens()
    parameters = method.attach(split.model, seed=0)
    alone = TrainConfig(data="-", optimizer="sgd", batch_size=1)  # nothing beside the parameters
    found = Footprint.of(alone, split, method, parameters, VOCABULARY, head="tiles", fused=False)
    assert (len(found.layers), len(found.below)) == (SHAPE["num_hidden_layers"], 0)
    assert not found.trains_weights
    assert found.predict("off", 1).trained == 4 * parameters["prompt"].size
    head = trained(shape={"tie_word_embeddings": False}, target="lm_head")[-1]
    assert (len(head.layers), len(head.below)) == (0, SHAPE["num_hidden_layers"])


@pytest.mark.parametrize("mode", MODES)
def test_the_most_tokens_fit_and_one_more_does_not(trained: Callable[..., Trained], mode: Mode) -> None:
    footprint = trained()[-1]
    limit = footprint.predict(mode, 700).peak + 10
    most = footprint.most_tokens(mode, limit, 100_000)
    assert footprint.predict(mode, most).peak <= limit < footprint.predict(mode, most + 1).peak
    assert footprint.most_tokens(mode, limit, 300) == 300
    assert footprint.most_tokens(mode, footprint.weights, 300) == 0


def test_a_correction_changes_what_grows_with_the_tokens_alone(trained: Callable[..., Trained]) -> None:
    footprint = trained()[-1]
    plain, corrected = footprint.predict("off", 1000), replace(footprint, correction=1.5).predict("off", 1000)
    assert (corrected.weights, corrected.trained) == (plain.weights, plain.trained)
    assert corrected.kept + corrected.passing == pytest.approx(1.5 * (plain.kept + plain.passing), rel=1e-6)
