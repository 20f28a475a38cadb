"""What a run trained is written, read and merged by its method's form, and what could not be is refused before training."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlx_sft.config import TrainConfig
from mlx_sft.convert.merge import check_exportable
from mlx_sft.errors import UserError
from mlx_sft.methods import Method, Parameters, make_method
from mlx_sft.methods.results import attach_trained
from mlx_sft.model.load import load_model
from mlx_sft.model.quantize import WeightRow, first_rows
from mlx_sft.model.weights import Checkpoint
from mlx_sft.registry import METHODS
from mlx_sft.safetensors_file import read_rows

each_method = pytest.mark.parametrize("name", METHODS.built_in())
each_of_weights = pytest.mark.parametrize("name", [name for name in METHODS.built_in() if METHODS[name].mergeable])


def _attached(base: Path, name: str, **settings: Any) -> tuple[Method, Parameters]:
    """A method on a model, and parameters none of which is at its start."""
    method = make_method(TrainConfig(data="-", method=name, **({"rank": 2} if name == "lora" else {}), **settings))
    start = method.attach(load_model(str(base), "float32").model, seed=0)
    return method, {parameter: value + 0.1 for parameter, value in start.items()}


def test_every_method_is_made_by_its_name() -> None:
    names = METHODS.built_in()
    assert {"lora", "full"} <= set(names)
    assert all(make_method(TrainConfig(data="-", method=name)).name == name for name in names)


@pytest.mark.parametrize(
    "name", [name for name in METHODS.built_in() if name != "p-tuning"]
)  # of which the vectors come back
def test_a_result_comes_back_as_it_was_written(name: str, tmp_path: Path, make_base: Callable[..., Path]) -> None:
    base = make_base()
    method, parameters = _attached(base, name)
    folder = tmp_path / method.folder

    method.write(folder, parameters, str(base))
    again, read = METHODS[name].read(folder)

    assert again.name == name
    assert read.keys() == parameters.keys()
    assert all(mx.array_equal(read[parameter], value) for parameter, value in parameters.items())
    model = load_model(str(base), "float32").model
    assert list(attach_trained(model, again, read, folder)) == list(parameters)


@each_method
@pytest.mark.parametrize("tied", [False, True])
def test_what_a_method_changes_is_what_is_merged(
    name: str, tied: bool, tmp_path: Path, make_base: Callable[..., Path]
) -> None:
    base = make_base(tied=tied)
    method, parameters = _attached(base, name)
    method.write(tmp_path, parameters, str(base))
    checkpoint = Checkpoint.open(base)

    edits = {
        n: edit for n, edit in METHODS[name].edits(tmp_path).items() if n in checkpoint.tensors or not edit.optional
    }

    assert edits.keys() == method.changed_shapes(parameters).keys()
    weights = load_file(base / "model.safetensors")
    for tensor, edit in edits.items():
        stored = checkpoint.tensors[tensor]
        merged = edit.rows(partial(read_rows, stored), 0, stored.rows)
        computed = method.changed_weight(tensor, mx.array(weights[tensor].numpy()), parameters)
        assert np.abs(merged - weights[tensor].numpy()).max() > 1e-3
        np.testing.assert_allclose(merged, np.array(computed), rtol=1e-6, atol=1e-6)


def _rows(base: Path) -> dict[str, WeightRow]:
    return first_rows(load_model(str(base), "float32").model)


@each_method
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_what_can_be_exported_is_known_from_a_row_of_each_weight(
    name: str, family: str, make_base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(family, shard="100KB")
    method, parameters = _attached(base, name)
    read = np.fromfile
    most: list[int] = []

    def counted(*arguments: Any, count: int, **options: Any) -> Any:
        most.append(count)
        return read(*arguments, count=count, **options)

    monkeypatch.setattr(np, "fromfile", counted)
    check_exportable(base, method, parameters, _rows(base))
    assert 0 < max(most) <= 96


@each_of_weights
def test_a_weight_that_is_loaded_as_another_than_is_stored_is_refused(
    name: str, make_base: Callable[..., Path]
) -> None:
    base = make_base()
    weights = _rows(base)
    weights["model.layers.0.self_attn.k_proj.weight"] = weights["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(UserError, match=r"another model\.layers\.0\.self_attn\.k_proj\.weight than the checkpoint"):
        check_exportable(base, *_attached(base, name), weights)


@each_of_weights
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (None, "no tensor {}, which training would change"),
        (torch.zeros(3, 5), r"{} is .3, 5. here"),
        (torch.zeros(64, 64, dtype=torch.int8), "tensor {} is stored as I8"),
    ],
)
def test_what_could_not_be_exported_is_refused_before_training(
    name: str, change: torch.Tensor | None, problem: str, tmp_path: Path, make_base: Callable[..., Path]
) -> None:
    method, parameters = _attached(make_base(), name)
    base = tmp_path / "base"
    shutil.copytree(make_base(), base)
    weights = load_file(base / "model.safetensors")
    tensor = "model.layers.1.self_attn.o_proj.weight"
    del weights[tensor]
    save_file(weights | ({} if change is None else {tensor: change}), base / "model.safetensors")

    with pytest.raises(UserError, match=problem.format(tensor)) as error:
        check_exportable(base, method, parameters, _rows(make_base()))

    assert error.value.where.startswith(str(base))
    assert error.value.hint


def test_what_is_not_trained_need_not_be_exportable(tmp_path: Path, make_base: Callable[..., Path]) -> None:
    base = tmp_path / "base"
    shutil.copytree(make_base(), base)
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.self_attn.o_proj.weight"]
    save_file(weights, base / "model.safetensors")
    check_exportable(base, *_attached(make_base(), "lora", target="qv"), _rows(make_base()))
