"""A whole run as on a GPU, forced on the CPU: compiled, with MLX's own loss, held to its memory, and asked what it can differentiate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_sft import TrainConfig, train
from mlx_sft.run_folder import RunFolder
from mlx_sft.training import setup
from mlx_sft.training.machine import Machine
from mlx_sft.training.step import GradientComputer
from tests.chats import write_chats


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, which is the CPU."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(setup, "this_machine", lambda: Machine("a GPU", "cuda", 2**34, "as much as there is"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_whole_run_is_the_same_on_a_gpu(method: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    rows = [{"prompt": f"the {animal}", "completion": "sat on the mat"} for animal in ("cat", "dog")] * 3
    data = tmp_path / "alike.jsonl"  # so that a shape is met often enough to be compiled
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "data": str(data),
        "model": "tiny",
        "dtype": "float32",
        "method": method,
        "batch_size": 2,
    }
    settings |= {"valid": str(data), "epochs": 1, "data_workers": 1, "lr": 1e-3, "quiet": True}
    runs = []
    for device in ("cpu", "gpu"):
        if device == "gpu":
            request.getfixturevalue("gpu")
        run = RunFolder(train(TrainConfig(**settings, out=str(tmp_path / device))).run_dir)
        runs.append([json.loads(line) for line in run.metrics.read_text().splitlines()])
    plain, ours = runs
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in plain], rel=1e-4)
    assert [record["traces"] for record in ours if record["kind"] == "train"][:2] == [1, 0]
    assert "traces" not in plain[0]


def test_attention_without_a_gradient_is_composed_and_that_is_said(
    gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own, training = mx.fast.scaled_dot_product_attention, [False]
    gradient = GradientComputer.gradient

    def attention(q: mx.array, *further: Any, **named: Any) -> mx.array:
        if training[0]:
            raise ValueError("[ScaledDotProductAttentionVJP] NYI: attention sinks")
        return own(q, *further, **named)

    def watched(*arguments: Any, **named: Any) -> Any:
        training[0] = True
        try:
            return gradient(*arguments, **named)
        finally:
            training[0] = False

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(GradientComputer, "gradient", watched)
    data = str(write_chats(tmp_path / "chats.jsonl", 4, seed=1))
    train(TrainConfig(data=data, model="tiny", dtype="float32", out=str(tmp_path / "run"), max_steps=1, data_workers=1))
    assert capsys.readouterr().err.count("attention is composed of plain operations") == 1
