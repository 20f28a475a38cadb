"""Full fine-tuning trains every weight, from float32 masters, and decays what transformers decays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from transformers import Trainer, TrainingArguments

from mlx_sft.config import TrainConfig
from mlx_sft.methods import make_method
from mlx_sft.methods.full import Full
from mlx_sft.model.load import load_model


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_is_trained_and_a_tied_head_once(
    tied: bool, make_base: Callable[..., Path], torch_model: Callable
) -> None:
    base = make_base("qwen3", tied=tied)
    parameters = Full().attach(load_model(str(base), "float32").model, seed=0)
    theirs = dict(torch_model(base).named_parameters())
    assert {n: p.shape for n, p in parameters.items()} == {n: tuple(p.shape) for n, p in theirs.items()}
    assert ("lm_head.weight" in parameters) is not tied


def test_masters_are_float32_and_the_model_keeps_its_precision(make_base: Callable[..., Path]) -> None:
    model = load_model(str(make_base("llama")), "bfloat16").model
    method = Full()
    parameters = method.attach(model, seed=0)
    assert {value.dtype for value in parameters.values()} == {mx.float32}

    name = "model.norm.weight"
    moved = mx.full(parameters[name].shape, 1 + 2**-12)
    method.bind(model, {name: moved})

    assert model.model.norm.weight.dtype == mx.bfloat16
    assert (model.model.norm.weight == 1).all().item()
    assert parameters[name].dtype == mx.float32
    assert model(mx.array([[1, 2]])).dtype == mx.bfloat16


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "lfm2", "qwen3_5_text"])
def test_what_is_decayed_is_what_transformers_decays(
    family: str, tmp_path: Path, make_base: Callable[..., Path], torch_model: Callable
) -> None:
    base = make_base(family)
    trainer = Trainer(torch_model(base), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    weights = dict(trainer.model.named_parameters())  # a tied head once
    decayed = weights.keys() & trainer.get_decay_parameter_names(trainer.model)
    parameters = Full().attach(load_model(str(base), "float32").model, seed=0)
    assert {name for name in parameters if Full().decayed(name)} == decayed
    assert 0 < len(decayed) < len(parameters)


def test_the_configuration_asks_for_it() -> None:
    assert isinstance(make_method(TrainConfig(data="x", method="full")), Full)


def test_what_it_changes_is_every_weight(make_base: Callable[..., Path]) -> None:
    method = Full()
    parameters = method.attach(load_model(str(make_base("qwen3")), "bfloat16").model, seed=0)
    assert method.changed_shapes(parameters) == {name: value.shape for name, value in parameters.items()}
    name = "model.norm.weight"
    assert mx.array_equal(method.changed_weight(name, mx.zeros((64,)), parameters), parameters[name]).item()
