"""A run is fitted to the memory that it may take: chosen beforehand, measured where it is close, told, and refused with a way out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import yaml

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.console import Console
from mlx_sft.errors import USAGE
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.batch_settings import configured
from mlx_sft.training.job import Job
from mlx_sft.training.memory import MODES, Footprint
from mlx_sft.training.recompute import Mode
from mlx_sft.training.setup import prepare_job
from mlx_sft.training.step import GradientComputer

LONG = 300
"""Words of the longest row, about as many tokens."""


@pytest.fixture
def long_settings(settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of which one row is much longer than the others."""
    data = tmp_path / "long.jsonl"
    rows = [["cat", "dog " * 3], ["mat", "the cat " * (LONG // 2)], ["dog", "the mat " * 2]]
    data.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}) + "\n"
            for q, a in rows
        )
    )
    model = make_base("qwen3", num_hidden_layers=9, max_position_embeddings=4096)
    return settings | {"data": str(data), "model": str(model), "max_length": 4096, "epochs": 1}


def job_of(settings: dict[str, Any]) -> Job:
    return prepare_job(TrainConfig(**settings), Console(quiet=True))


def memory_of(settings: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RunFolder(settings["out"]).environment.read_text())["memory"]
    return found


def limit_for(footprint: Footprint, mode: Mode, tokens: int) -> str:
    return f"{footprint.predict(mode, tokens).peak / 0.95 / 1e6 + 0.01:.3f}MB"


def test_with_memory_to_spare_nothing_is_measured_and_the_prediction_holds(settings: dict[str, Any]) -> None:
    train(TrainConfig(**settings))
    memory = memory_of(settings)
    assert memory["probe"] is None
    assert "spare" in memory["no_probe_because"]
    assert memory["predicted_peak_bytes"] == sum(memory["predicted"].values())
    decided = yaml.safe_load(RunFolder(settings["out"]).config.read_text())
    assert (decided["micro_batch_tokens"], decided["grad_checkpoint"]) == (512, "off")


def test_where_it_is_close_a_small_step_is_measured_and_nothing_of_the_run_changes(
    long_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    footprint = job_of(long_settings | {"out": str(tmp_path / "first")}).memory.footprint
    limit = limit_for(footprint, "layers", 700)
    mx.random.seed(7)
    job_of(long_settings | {"out": str(tmp_path / "second")})
    state = [mx.array(part) for part in mx.random.state]
    mx.random.seed(7)
    # A measurement that finds what was counted, so that the choice is that of the count.
    monkeypatch.setattr("mlx_sft.training.batch_settings.TRUSTED", (1.0, 1.0))
    job = job_of(long_settings | {"memory_limit": limit})
    assert job.memory.probe is not None
    assert job.memory.probe.seconds > 0
    assert job.gradient_computer.mode == job.settings.mode
    assert job.gradient_computer.mode in ("light", "layers")
    assert job.predicted.peak <= job.memory.machine.memory
    assert job.memory.machine.basis == "--memory-limit"
    assert all(bool((before == now).all()) for before, now in zip(state, mx.random.state, strict=True))
    other = job_of(long_settings | {"out": str(tmp_path / "other"), "memory_limit": "1GB"})
    assert all(bool((job.parameters[name] == value).all()) for name, value in other.parameters.items())
    memory = memory_of(long_settings)
    assert memory["probe"]["correction"] == 1.0
    assert memory["no_probe_because"] is None


def test_a_run_within_a_limit_takes_no_more_and_goes_on_with_its_settings(long_settings: dict[str, Any]) -> None:
    footprint = job_of(long_settings | {"out": long_settings["out"] + "-first"}).memory.footprint
    before = mx.get_active_memory()
    long_settings["memory_limit"] = limit_for(footprint, "light", 640)
    train(TrainConfig(**long_settings))
    records = [json.loads(line) for line in RunFolder(long_settings["out"]).metrics.read_text().splitlines()]
    peak = max(record["peak_memory_bytes"] for record in records) - before
    assert peak <= 1.1 * memory_of(long_settings)["limit_bytes"]
    decided = yaml.safe_load(RunFolder(long_settings["out"]).config.read_text())
    job = prepare_job(TrainConfig(resume=long_settings["out"], data=long_settings["data"]), Console(quiet=True))
    assert job.settings.micro_batch_tokens == decided["micro_batch_tokens"]
    assert configured(job.gradient_computer.mode) == decided["grad_checkpoint"]
    assert "given" in job.memory.why_no_probe


@pytest.mark.parametrize("mode", ["off", "light", "on", "blocks"])
def test_every_recomputation_can_be_asked_for(settings: dict[str, Any], mode: str) -> None:
    job = job_of(settings | {"grad_checkpoint": mode})
    assert configured(job.gradient_computer.mode) == mode
    assert job.config.grad_checkpoint == mode
    assert job.gradient_computer.mode in MODES


def test_a_row_that_does_not_fit_is_named_before_anything_is_written(long_settings: dict[str, Any]) -> None:
    job = job_of(long_settings | {"out": long_settings["out"] + "-first"})
    limit = limit_for(job.memory.footprint, "blocks", 60)
    with pytest.raises(UserError) as caught:
        job_of(long_settings | {"memory_limit": limit})
    assert caught.value.where.endswith("long.jsonl:2")
    assert re.match(r"give --max-length \d+ \(takes [\d.]+ MB\), ", caught.value.hint)
    assert "--memory-limit" in caught.value.hint
    assert not Path(long_settings["out"]).exists()


def test_weights_that_do_not_fit_are_refused_before_they_are_read(
    settings: dict[str, Any], tmp_path: Path, make_base: Callable[..., Path]
) -> None:
    model = tmp_path / "unreadable"
    model.mkdir()
    for file in make_base("qwen3", tied=True).iterdir():
        (model / file.name).write_bytes(b"" if file.suffix == ".safetensors" else file.read_bytes())
    with pytest.raises(UserError, match="weights alone take") as caught:
        job_of(settings | {"model": str(model), "memory_limit": "100kB"})
    assert "a smaller model" in caught.value.hint


@pytest.mark.parametrize("limit", ["lots", "0GB", "-3GB"])
def test_a_limit_that_is_no_amount_is_an_error(limit: str) -> None:
    with pytest.raises(UserError) as caught:
        TrainConfig.resolve(None, data="x", memory_limit=limit)
    assert caught.value.exit_code == USAGE
    assert "12GB" in str(caught.value)


def test_the_start_tells_what_is_predicted_and_of_how_much(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    train(TrainConfig(**settings | {"quiet": False, "memory_limit": "2GB"}))
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("memory"))
    assert "predicted" in line
    assert "of 2.00 GB (--memory-limit)" in line


def test_a_measurement_that_runs_out_of_memory_says_so(
    long_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    footprint = job_of(long_settings | {"out": str(tmp_path / "first")}).memory.footprint

    def fail(*_: Any) -> None:
        raise RuntimeError("[metal::malloc] unable to allocate")

    monkeypatch.setattr(GradientComputer, "micro_step", fail)
    with pytest.raises(UserError, match="out of memory at a row of 256 tokens") as caught:
        job_of(long_settings | {"memory_limit": limit_for(footprint, "layers", 700)})
    assert "--dtype bfloat16" in str(caught.value.hint)


def test_the_limit_ends_with_the_run(settings: dict[str, Any]) -> None:
    before = mx.get_memory_limit()
    train(TrainConfig(**settings | {"memory_limit": "1GB"}))
    assert mx.get_memory_limit() == before


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="a GPU may take what the machine gives")
def test_on_the_cpu_mlx_runs_ahead_no_further_than_predicted(settings: dict[str, Any]) -> None:
    job = job_of(settings)
    assert mx.get_memory_limit() == job.predicted.limit < job.memory.machine.memory
