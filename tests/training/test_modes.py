"""A model is in training mode while gradients are taken, and in evaluation mode everywhere else: mlx-lm chooses kernels by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_sft import TrainConfig, export, load_model, load_run, train
from mlx_sft.data.batches import MicroBatch, collate
from mlx_sft.data.example import Example
from mlx_sft.evaluate import evaluate_run
from mlx_sft.generate import generate_text
from mlx_sft.methods import make_method
from mlx_sft.model.head import SplitModel
from mlx_sft.training.recompute import Mode
from mlx_sft.training.step import GradientComputer
from tests.chats import write_chats

ROW = Example("row", np.arange(9, dtype=np.int32), np.ones(9, np.float32))


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Grows with every call of a norm in any model: whether it is in training mode."""
    seen: list[bool] = []
    call = nn.RMSNorm.__call__

    def noting(norm: nn.RMSNorm, x: mx.array) -> mx.array:
        seen.append(norm.training)
        return call(norm, x)

    monkeypatch.setattr(nn.RMSNorm, "__call__", noting)
    return seen


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    data = write_chats(folder / "chats.jsonl", 6, seed=1)
    config = TrainConfig(data=str(data), model="tiny", out=str(folder / "run"), max_steps=1, quiet=True, data_workers=1)
    return train(config).run_dir


def computer(mode: Mode = "off", **options: Any) -> tuple[GradientComputer, dict[str, mx.array], nn.Module]:
    config = TrainConfig(data="-", model="tiny")
    base = load_model("tiny")
    method = make_method(config)
    parameters = method.attach(base.model, 0)
    made = GradientComputer(SplitModel(base.model), method, base.config["vocab_size"], recompute=mode, **options)
    return made, parameters, base.model


@pytest.mark.parametrize("mode", get_args(Mode))
def test_gradients_are_taken_in_training_mode(mode: Mode, modes: list[bool]) -> None:
    gradients, parameters, model = computer(mode)
    modes.clear()
    gradients.gradient(parameters, [collate([ROW], MicroBatch((0,), 9))] * 2)
    assert modes
    assert all(modes)
    assert not model.training


def test_a_step_that_fails_leaves_evaluation_mode() -> None:
    gradients, parameters, model = computer()

    def stopped() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gradients.gradient(parameters, [collate([ROW], MicroBatch((0,), 9))], before_each=stopped)
    assert not any(module.training for module in model.modules())


def test_evaluation_is_in_evaluation_mode(modes: list[bool]) -> None:
    gradients, parameters, _ = computer()
    gradients.gradient(parameters, [collate([ROW], MicroBatch((0,), 9))])
    modes.clear()
    gradients.evaluate(parameters, [collate([ROW], MicroBatch((0,), 9))])
    assert modes
    assert not any(modes)


USES: dict[str, Callable[[Path, Path], object]] = {
    "generate": lambda run, _: generate_text(load_run(run), "the cat", max_tokens=2),
    "eval": lambda run, folder: evaluate_run(run, str(write_chats(folder / "chats.jsonl", 2, seed=3))),
    "export, verified": lambda run, folder: export(run, folder / "merged"),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_whatever_takes_no_gradient_is_in_evaluation_mode(
    use: Callable[[Path, Path], object], run: Path, tmp_path: Path, modes: list[bool]
) -> None:
    use(run, tmp_path)
    assert modes
    assert not any(modes)


def test_no_module_of_a_loaded_run_is_in_training_mode(run: Path) -> None:
    assert not any(module.training for module in load_run(run).model.modules())


def test_a_model_that_was_given_in_training_mode_is_evaluated_in_the_other(modes: list[bool], tmp_path: Path) -> None:
    loaded = load_model("tiny")
    loaded.model.train()
    data = str(write_chats(tmp_path / "chats.jsonl", 6, seed=1))
    settings: dict[str, Any] = {"max_steps": 1, "quiet": True, "data_workers": 1, "out": str(tmp_path / "run")}
    train(TrainConfig(data=data, model="tiny", valid_fraction=0.3, **settings), model=loaded)
    assert True in modes
    assert False in modes
    assert not loaded.model.training
