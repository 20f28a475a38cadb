"""Signals: a run that is asked to stop saves and says how to go on; asked twice it ends at once; what is resumed ends the same."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.stopping import Stopped, stop_request
from tests.processes import options_of, wait_for_lines

pytestmark = pytest.mark.faults

Start = Callable[..., "subprocess.Popen[bytes]"]

_ENDLESS_MICRO_STEP = """
import sys, time
from mlx_sft.training.step import GradientComputer
own = GradientComputer.micro_step
def endless(gradient_computer, *arguments):
    print("computing", flush=True)
    time.sleep(600)
GradientComputer.micro_step = endless
from mlx_sft.cli import main
main()
"""


def adapter(run: Path) -> bytes:
    return (RunFolder(run).adapter / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def long(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"epochs": 40, "dropout": 0.1, "lr": 1e-3, "save_every": 1000, "keep": 1}


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_a_run_with_a_checkpoint_that_goes_on_the_same(
    name: str, long: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    train(TrainConfig(**long | {"out": str(tmp_path / "undisturbed")}))
    run = RunFolder(long["out"])
    number = signal.Signals[name]
    process = start("-m", "mlx_sft", "train", *options_of(long))
    wait_for_lines(process, run.metrics, 3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    steps = run.metrics.read_bytes().count(b"\n")
    assert run.checkpoint_steps() == [steps]
    last = err.decode().splitlines()[-2:]
    assert last[0] == f"error: stopped by {name} after step {steps}, which is saved"
    assert last[1] == f"hint: continue with: mlx-sft train --resume {run.path}"
    assert "once more ends it at once" in err.decode()
    assert b"Traceback" not in err
    train(TrainConfig(resume=str(run.path), quiet=True))
    assert adapter(run.path) == adapter(tmp_path / "undisturbed")
    assert len(run.metrics.read_bytes().splitlines()) == 120


def test_a_second_signal_ends_the_process_at_once(settings: dict[str, Any], start: Start) -> None:
    process = start("-c", _ENDLESS_MICRO_STEP, "train", *options_of(settings))
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"computing\n"
    process.send_signal(signal.SIGTERM)
    while b"once more ends it at once" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM
    assert RunFolder(settings["out"]).checkpoint_steps() == []
    assert train(TrainConfig(resume=settings["out"], quiet=True)).steps == 6


def test_a_signal_that_the_process_ignores_stays_ignored(long: dict[str, Any], start: Start) -> None:
    """As under nohup."""
    ignoring: Any = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    process = start("-m", "mlx_sft", "train", *options_of(long), preexec_fn=ignoring)
    wait_for_lines(process, RunFolder(long["out"]).metrics, 3)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_two_processes_on_one_run_the_second_is_refused(long: dict[str, Any], start: Start) -> None:
    first = start("-c", _ENDLESS_MICRO_STEP, "train", *options_of(long))
    assert first.stdout is not None
    assert first.stdout.readline() == b"computing\n"
    with pytest.raises(UserError, match="another process is training this run"):
        train(TrainConfig(resume=long["out"], quiet=True))
    first.kill()
    first.wait()
    assert train(TrainConfig(resume=long["out"], quiet=True)).steps == 120


def test_handlers_are_again_what_they_were() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with stop_request() as request:
        request.check()
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 10
        while request.number is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        with pytest.raises(Stopped, match="SIGTERM"):
            request.check()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    train(TrainConfig(**settings | {"save_every": 2, "keep": 3}))
    run = RunFolder(settings["out"])
    expected = adapter(run.path)
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoint(6))
    weights = run.checkpoint(4) / "parameters.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(content)
    capsys.readouterr()
    train(TrainConfig(resume=str(run.path), quiet=True))
    warning = " ".join(capsys.readouterr().err.split())
    assert "parameters.safetensors changed since it was written" in warning
    assert "goes on from step 2" in warning
    assert adapter(run.path) == expected


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_run_goes_on_when_no_one_reads_what_it_says(
    stream: str, long: dict[str, Any], start: Start, tmp_path: Path
) -> None:
    train(TrainConfig(**long | {"out": str(tmp_path / "undisturbed")}))
    process = start("-m", "mlx_sft", "train", *options_of(long), *(["--json"] if stream == "stdout" else []))
    wait_for_lines(process, RunFolder(long["out"]).metrics, 3)
    pipe = getattr(process, stream)
    pipe.close()
    setattr(process, stream, None)
    _, err = process.communicate(timeout=60)
    assert b"Traceback" not in (err or b"")
    assert RunFolder(long["out"]).checkpoint_steps() == [120]
    assert adapter(Path(long["out"])) == adapter(tmp_path / "undisturbed")
