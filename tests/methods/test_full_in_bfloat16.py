"""`--master-dtype bfloat16`: the trained weights are the model's own, from the step to the checkpoint, the resumed run and the export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mlx_sft import TrainConfig, UserError, export, load_run, train
from mlx_sft.data.batches import MicroBatch, collate
from mlx_sft.data.dataset import Examples
from mlx_sft.methods import Parameters
from mlx_sft.methods.full import Full, FullSettings
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.run_folder import RunFolder
from mlx_sft.safetensors_file import open_safetensors
from mlx_sft.training.step import GradientComputer

LIGHT = {"method": "full", "master_dtype": "bfloat16", "optimizer": "adamw8bit", "dtype": "bfloat16", "lr": 1e-3}
SHAPE = {"hidden_size": 64, "num_hidden_layers": 3}


@pytest.fixture
def base(make_base: Callable[..., Path]) -> Path:
    return make_base("qwen3", tied=True, dtype=torch.bfloat16, **SHAPE)


@pytest.fixture
def light(settings: dict[str, Any], base: Path) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "rank"} | LIGHT | {"model": str(base)}


def attached(base: Path, dtype: str = "bfloat16", **settings: Any) -> tuple[SplitModel, Full, Parameters]:
    split = SplitModel(load_model(str(base), dtype).model)
    method = Full(FullSettings(**settings))
    return split, method, method.attach(split.model, seed=0)


def test_the_models_own_weights_are_trained(base: Path) -> None:
    split, method, parameters = attached(base, master_dtype="bfloat16")
    assert {value.dtype for value in parameters.values()} == {mx.bfloat16}
    before = mx.get_active_memory()
    method.bind(split.model, parameters)
    mx.eval(split.model.parameters(), parameters)
    assert mx.get_active_memory() <= before, "there is one copy"


def test_weights_that_a_model_has_in_float32_stay_so(base: Path) -> None:
    model = load_model(str(base), "bfloat16").model
    model.model.norm.weight = model.model.norm.weight.astype(mx.float32)
    parameters = Full(FullSettings(master_dtype="bfloat16")).attach(model, seed=0)
    assert {name for name, value in parameters.items() if value.dtype == mx.float32} == {"model.norm.weight"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_model_of_another_precision_is_refused(light: dict[str, Any], dtype: str) -> None:
    with pytest.raises(UserError, match=r"a model that computes in bfloat16") as error:
        train(TrainConfig(**light | {"dtype": dtype}))
    assert error.value.hint == "give --dtype bfloat16"
    assert not Path(light["out"]).exists()


def test_the_gradient_of_a_step_is_the_same_however_it_is_cut(base: Path, examples: Examples) -> None:
    """That of a lone micro-batch is rounded to bfloat16 as every gradient of one is; a sum of several is float32."""
    split, method, parameters = attached(base, master_dtype="bfloat16")
    width = int(max(examples.needed_lengths))
    found = []
    for rows in ([range(len(examples))], [[row] for row in range(len(examples))]):
        batches = [collate(examples, MicroBatch(tuple(part), width)) for part in rows]
        step = GradientComputer(split, method, 264).gradient(parameters, batches)
        found.append({name: np.array(value.astype(mx.float32)) for name, value in step.gradients.items()})
        assert {value.dtype for value in step.gradients.values()} == {mx.bfloat16 if len(batches) == 1 else mx.float32}
    for name, whole in found[0].items():
        assert np.linalg.norm(whole - found[1][name]) < 0.02 * np.linalg.norm(whole), name


@pytest.mark.parametrize("optimizer", ["adamw8bit", "muon"])
def test_a_run_goes_on_to_the_same_bytes(light: dict[str, Any], optimizer: str, tmp_path: Path) -> None:
    given = light | {"optimizer": optimizer, "scheduler": "constant", "warmup": 0, "save_every": 2}
    whole = train(TrainConfig(**given | {"max_steps": 4, "out": str(tmp_path / "whole")})).run_dir
    part = train(TrainConfig(**given | {"max_steps": 2})).run_dir
    train(TrainConfig(resume=str(part), max_steps=4, quiet=True))
    dtypes = {}
    for name in ("parameters", "optimizer"):
        one, two = (RunFolder(run).checkpoint(4) / f"{name}.safetensors" for run in (whole, part))
        assert one.read_bytes() == two.read_bytes()
        dtypes[name] = {tensor.dtype for tensor in open_safetensors(one).tensors}
    assert dtypes["parameters"] == {"BF16"}
    assert "BF16" not in dtypes["optimizer"]


def test_the_seed_decides_how_a_step_is_rounded(light: dict[str, Any], tmp_path: Path) -> None:
    given = light | {"max_steps": 1, "warmup": 0, "shuffle": False, "save_every": 1}
    runs = [train(TrainConfig(**given | {"seed": seed, "out": str(tmp_path / str(seed))})).run_dir for seed in (0, 1)]
    one, two = (load_file(run / "weights" / "model.safetensors") for run in runs)
    apart = {name for name, value in one.items() if not torch.equal(value, two[name])}
    assert {name for name, value in one.items() if value.ndim > 1} <= apart


@pytest.mark.parametrize("layers", [None, "last:1"])
def test_what_was_trained_is_exported_as_it_is(
    layers: str | None, light: dict[str, Any], base: Path, tmp_path: Path, token_ids: list[list[int]]
) -> None:
    run = train(TrainConfig(**light | {"layers": layers, "max_steps": 4})).run_dir
    kept = load_file(RunFolder(run).checkpoint(4) / "parameters.safetensors")
    weights = load_file(run / "weights" / "model.safetensors")
    before = load_file(base / "model.safetensors")
    assert all(value.dtype == torch.bfloat16 for value in weights.values())
    assert all(torch.equal(value, weights[name]) for name, value in kept.items())
    for step in (None, "last", "4"):
        after = load_file(export(run, tmp_path / str(step), step=step).path / "model.safetensors")
        assert all(torch.equal(value, after[name]) for name, value in kept.items())
        assert all(torch.equal(value, after[name]) for name, value in before.items() if name not in kept)
    moved = {name for name, value in weights.items() if not torch.equal(value, before[name])}
    assert moved, "it has been trained"
    if layers:
        assert all(name.startswith("model.layers.2.") for name in weights)
    asked = mx.array(token_ids[:1])
    ours, theirs = load_run(run).model(asked), load_model(str(tmp_path / "last"), "bfloat16").model(asked)
    assert mx.array_equal(ours, theirs).item()
    for step in (None, "4"):
        assert load_run(run, dtype="float32", step=step).model(asked).dtype == mx.float32


def test_precision_is_fixed_when_a_run_goes_on(light: dict[str, Any]) -> None:
    run = train(TrainConfig(**light | {"max_steps": 1})).run_dir
    with pytest.raises(UserError, match=r"--master-dtype float32 differs from the run's bfloat16"):
        train(TrainConfig(resume=str(run), max_steps=2, method="full", master_dtype="float32"))
