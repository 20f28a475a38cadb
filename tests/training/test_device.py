"""What a GPU is asked at the start: its gradients, what a call costs, attention's block; and a run that goes on keeps what was measured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_sft import TrainConfig, train
from mlx_sft.console import Console
from mlx_sft.data.batches import CALL_COST, Layout
from mlx_sft.errors import UserError
from mlx_sft.methods import Parameters, make_method
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.run_folder import RunFolder
from mlx_sft.training import device, setup
from mlx_sft.training.device import Measured, attention_block, attention_in_blocks, call_cost, what_it_refuses
from mlx_sft.training.failures import FailedBatch, OutOfMemory
from mlx_sft.training.layer_counts import LayerCounts
from mlx_sft.training.machine import Machine
from mlx_sft.training.step import GradientComputer
from tests.chats import write_chats

LAYER = LayerCounts(
    states=64, light=0, off=0, features=0, norms=0, scores=0, weights=0, attended=256, trained=True, heads=4, keys=128
)


class Rows:
    """As many of `Examples` as is asked for."""

    def __init__(self, lengths: list[int]) -> None:
        self.needed_lengths = lengths


def subject() -> tuple[GradientComputer, SplitModel, Parameters]:
    base = load_model("tiny")
    method = make_method(TrainConfig(data="-", model="tiny"))
    parameters = method.attach(base.model, 0)
    split = SplitModel(base.model)
    return GradientComputer(split, method, base.config["vocab_size"]), split, parameters


@pytest.fixture
def no_gradient(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device whose attention has no gradient for fewer than nine queries; what it says."""
    said = "[scaled_dot_product_attention] the vector kernels do not produce a logsumexp"
    own, gradient, taken = mx.fast.scaled_dot_product_attention, GradientComputer.gradient, []

    def attention(q: mx.array, *further: Any, **named: Any) -> mx.array:
        if taken and q.shape[2] < 9:
            raise ValueError(said)
        return own(q, *further, **named)

    def noted(*arguments: Any, **named: Any) -> Any:
        taken.append(1)
        try:
            return gradient(*arguments, **named)
        finally:
            taken.clear()

    monkeypatch.setattr("mlx_sft.training.recompute.fast_core", lambda block: None)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(GradientComputer, "gradient", noted)
    return said


def test_the_device_is_asked_for_each_width(no_gradient: str) -> None:
    computer, _, parameters = subject()
    assert what_it_refuses(computer, parameters, [16, 32]) == ""
    assert what_it_refuses(computer, parameters, [8, 32]) == no_gradient
    computer.compose_attention()
    assert what_it_refuses(computer, parameters, [8, 32]) == ""


def test_what_does_not_fit_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    computer, _, parameters = subject()

    def full(*_: Any, **__: Any) -> None:
        raise OutOfMemory(FailedBatch(1, 9, 9, "no memory"))

    monkeypatch.setattr(computer, "gradient", full)
    assert what_it_refuses(computer, parameters, [16]) == ""


def _taking(seconds: Callable[[int], float], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A device on which a row of each width takes so long; the widths that are tried."""
    tried: list[int] = []

    def measured(make: Callable[[], Any]) -> float:
        make()
        return seconds(tried[-1])

    row_of = device._row_of
    monkeypatch.setattr(device, "_row_of", lambda width: tried.append(width) or row_of(width))
    monkeypatch.setattr(device, "seconds_of", measured)
    return tried


@pytest.mark.parametrize(
    ("fixed", "a_token", "expected"), [(0.032, 0.001, 32), (0.016, 0.001, 16), (0.3, 0.001, 256), (1.0, 0.0, 2048)]
)
def test_a_call_costs_what_the_smallest_micro_batch_takes_beyond_its_tokens(
    fixed: float, a_token: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    computer, split, parameters = subject()
    _taking(lambda width: fixed + a_token * width, monkeypatch)
    assert call_cost(computer, split, parameters, 2048) == expected


def test_no_row_is_tried_that_is_wider_than_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    computer, split, parameters = subject()
    tried = _taking(lambda width: 1.0, monkeypatch)
    call_cost(computer, split, parameters, 100)
    assert tried == [16, 32, 64, 128]
    tried.clear()
    assert call_cost(computer, split, parameters, 16) == CALL_COST
    assert tried == [16]


def test_a_measured_cost_is_a_power_of_two_and_nothing_stays_changed() -> None:
    computer, split, parameters = subject()
    found = call_cost(computer, split, parameters, 256)
    assert found == 1 << (found.bit_length() - 1)
    assert not split.model.training


@pytest.mark.parametrize(("small", "expected"), [(0.9, 256), (0.97, None), (1.2, None)])
def test_attention_takes_the_smaller_block_where_it_is_faster(
    small: float, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def seconds(layer: LayerCounts, width: int, dtype: mx.Dtype) -> float:
        asked.append((os.environ["MLX_SDPA_VJP_BLOCK"], width))
        return width * (small if asked[-1][0] == "256" else 1.0)

    monkeypatch.setattr(device, "attention_seconds", seconds)
    lengths = [100, 300, 300, 900]
    layout = Layout.of_few_shapes(lengths)
    assert attention_block([LAYER], Rows(lengths), layout, mx.float32) == expected  # type: ignore[arg-type]
    assert [block for block, _ in asked] == ["1024", "1024", "256", "256"]
    assert min(width for _, width in asked) >= 300
    assert "MLX_SDPA_VJP_BLOCK" not in os.environ


def test_short_rows_and_models_without_such_attention_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "attention_seconds", lambda *_: pytest.fail("timed"))
    short, long = Rows([20, 200]), Rows([20, 900])
    assert attention_block([LAYER], short, Layout.of_few_shapes([20, 200]), mx.float32) is None  # type: ignore[arg-type]
    assert attention_block([], long, Layout.of_few_shapes([20, 900]), mx.float32) is None  # type: ignore[arg-type]


def test_attention_is_timed_in_the_shape_that_it_has() -> None:
    assert 0 < device.attention_seconds(LAYER, 300, mx.float32) < 10


def test_a_block_holds_as_long_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_SDPA_VJP_BLOCK", "512")
    with attention_in_blocks(256):
        assert os.environ["MLX_SDPA_VJP_BLOCK"] == "256"
    with attention_in_blocks(None):
        assert os.environ["MLX_SDPA_VJP_BLOCK"] == "512"
    assert os.environ["MLX_SDPA_VJP_BLOCK"] == "512"


def test_a_run_that_goes_on_keeps_what_was_measured_when_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(setup, "this_machine", lambda: Machine("a Mac", "metal", 2**34, "as much as there is"))
    monkeypatch.setattr("mlx_sft.training.setup.hold_to", lambda *_: None)
    measured = [Measured(64, 256), Measured(512)]
    monkeypatch.setattr(device, "call_cost", lambda *_: measured[0].call_cost)
    monkeypatch.setattr(device, "attention_block", lambda *_: measured[0].attention_block)
    data = str(write_chats(tmp_path / "chats.jsonl", 6, seed=1))
    settings: dict[str, Any] = {"data": data, "model": "tiny", "dtype": "float32", "data_workers": 1, "quiet": True}
    run = RunFolder(train(TrainConfig(**settings, max_steps=1, out=str(tmp_path / "run"))).run_dir)
    assert json.loads(run.environment.read_text())["measured"] == {"call_cost": 64, "attention_block": 256}
    measured.pop(0)
    job = setup.prepare_job(TrainConfig(resume=str(run.path), max_steps=2, quiet=True), Console(quiet=True))
    assert job.settings.layout.call_cost == 64
    assert Measured.of_run(run) == Measured(64, 256)
    assert "MLX_SDPA_VJP_BLOCK" not in os.environ

    run.environment.write_text(json.dumps(json.loads(run.environment.read_text()) | {"measured": {"call_cost": "x"}}))
    with pytest.raises(UserError, match="what was measured cannot be read"):
        Measured.of_run(run)


def test_on_a_cpu_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    computer, split, parameters = subject()
    monkeypatch.setattr(computer, "gradient", lambda *_: pytest.fail("asked"))
    machine = Machine("a PC", "cpu", 2**34, "")
    rows: Any = Rows([9])
    device.ask(computer, parameters, Layout(), "off", machine, Console(quiet=True))
    assert device.measure(computer, split, parameters, rows, Layout(), machine) == Measured(CALL_COST, None)
