"""A run that is killed at any moment and resumed ends as if it had not been: every crash point, and real SIGKILLs.

What a SIGKILL leaves is what is on the disk at that moment, whatever the process had in mind. So every crash point is tried
without a process: before and after each call by which the run folder changes or a file becomes durable, the folder is copied;
each copy is resumed and must end as the run that was left alone. Processes that are truly killed are few, for each takes
seconds to start.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.runs import RunFolder
from tests import run_folders
from tests.processes import options_of, wait_for_lines

_SYSTEM_CALLS = ("fsync", "replace", "rename", "unlink", "rmdir")


def outcome(run: Path) -> dict[str, Any]:
    """Everything in a run folder that does not tell the time, or what was free when the run began."""
    found = run_folders.outcome(run)
    if "environment.json" in found:
        found["environment.json"] = json.loads(found["environment.json"])
        del found["environment.json"]["memory"]
    return found


@pytest.fixture
def crash_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[Path]]:
    """`crash_points(run)` → a list that fills with copies of the run folder, one for each state it was ever in."""
    copies: list[Path] = []
    seen: set[tuple[tuple[str, bytes], ...]] = set()

    def look(run: Path) -> None:
        files = [path for path in sorted(run.rglob("*")) if path.is_file()] if run.exists() else []
        state = tuple((str(path), path.read_bytes()) for path in files)
        if run.exists() and state not in seen:
            seen.add(state)
            copies.append(tmp_path / f"killed-{len(copies)}")
            shutil.copytree(run, copies[-1])

    def watch(run: Path) -> list[Path]:
        def watched(call: Callable[..., Any]) -> Callable[..., Any]:
            def watching(*arguments: Any, **options: Any) -> Any:
                look(run)
                try:
                    return call(*arguments, **options)
                finally:
                    look(run)

            return watching

        for name in _SYSTEM_CALLS:
            monkeypatch.setattr(os, name, watched(getattr(os, name)))
        return copies

    return watch


@pytest.mark.parametrize(
    ("changes", "result"),
    [
        pytest.param({"dropout": 0.2}, "adapter/adapter_model.safetensors", id="lora with dropout"),
        pytest.param(
            {"valid_fraction": 0.2, "eval_every": 1, "lr": 3.0, "warmup": 0, "batch_size": 4, "max_steps": 3},
            "last/adapter_model.safetensors",
            id="the best is not the last",
        ),
        pytest.param(
            {"valid_fraction": 0.2, "eval_every": 1, "lr": 0, "early_stop": 1, "max_steps": 6},
            "last/adapter_model.safetensors",
            id="stopped early",
        ),
        pytest.param({"method": "full", "lr": 1e-3}, "weights/model.safetensors", id="full"),
    ],
)
def test_a_kill_at_every_point_of_writing_changes_nothing(
    changes: dict[str, Any],
    result: str,
    settings: dict[str, Any],
    crash_points: Callable[[Path], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings |= {"max_steps": 2, "save_every": 1, "keep": 1, "batch_size": 2} | changes
    run = Path(settings["out"])
    killed = crash_points(run)
    train(TrainConfig(**settings))
    monkeypatch.undo()
    expected = outcome(run)
    assert result in expected
    assert len(expected["metrics.jsonl"]) >= 2
    assert not any(".writing" in name or ".replaced" in name for name in expected)
    began = [path for path in killed if (path / "config.yaml").exists()]
    assert len(began) >= 12
    for path in began:
        shutil.rmtree(run)
        path.rename(run)
        train(TrainConfig(resume=str(run), quiet=True))
        assert outcome(run) == expected, path.name


def test_a_run_killed_before_it_began_is_simply_started_again(
    settings: dict[str, Any], crash_points: Callable[[Path], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(settings["out"])
    killed = crash_points(run)
    train(TrainConfig(**settings))
    monkeypatch.undo()
    expected = outcome(run)
    unborn = [path for path in killed if not (path / "config.yaml").exists()]
    assert unborn
    for path in unborn:
        shutil.rmtree(run)
        path.rename(run)
        with pytest.raises(UserError, match="not a run folder"):
            train(TrainConfig(resume=str(run)))
        train(TrainConfig(**settings))
        assert outcome(run) == expected, path.name


def test_a_line_of_metrics_that_was_torn_is_written_again(settings: dict[str, Any]) -> None:
    train(TrainConfig(**settings, save_every=2))
    run = RunFolder(settings["out"])
    expected = outcome(run.path)
    for step in (6, 4):
        shutil.rmtree(run.checkpoint(step))
    shutil.rmtree(run.adapter)
    run.metrics.write_bytes(run.metrics.read_bytes()[:-17])
    train(TrainConfig(resume=str(run.path), quiet=True))
    assert outcome(run.path) == expected


def test_resuming_a_finished_run_changes_nothing_and_prints_its_folder(
    settings: dict[str, Any], cli: Callable[..., Any]
) -> None:
    train(TrainConfig(**settings))
    before = outcome(Path(settings["out"]))
    result = cli("train", "--resume", settings["out"])
    assert result.exit_code == 0
    assert result.stdout == settings["out"] + "\n"
    assert outcome(Path(settings["out"])) == before


def test_resuming_where_the_metrics_were_removed_goes_on(settings: dict[str, Any]) -> None:
    train(TrainConfig(**settings, save_every=4))
    run = RunFolder(settings["out"])
    shutil.rmtree(run.checkpoint(6))
    run.metrics.unlink()
    train(TrainConfig(resume=str(run.path), quiet=True))
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [5, 6]


_KILL_AT_CALL = """
import os, signal, sys
left = int(sys.argv.pop(1))
def counted(call):
    def counting(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return counting
for name in ("fsync", "replace", "rename"):
    setattr(os, name, counted(getattr(os, name)))
from mlx_sft.cli import main
main()
"""


def test_a_process_killed_again_and_again_ends_the_same(
    settings: dict[str, Any], start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    settings |= {"epochs": 20, "valid_fraction": 0.2, "eval_every": 7, "save_every": 5, "dropout": 0.1, "lr": 1e-3}
    train(TrainConfig(**settings))
    expected = outcome(Path(settings["out"]))
    settings["out"] = str(tmp_path / "killed")
    metrics = tmp_path / "killed" / "metrics.jsonl"
    command = ["train", "--quiet", *options_of(settings)]
    moments = random.Random(time.time_ns())
    for lines in (1, 20):
        process = start("-m", "mlx_sft", *command)
        wait_for_lines(process, metrics, lines)
        time.sleep(moments.random() * 0.2)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        command = ["train", "--quiet", "--resume", settings["out"]]
    train(TrainConfig(resume=settings["out"], quiet=True))
    assert outcome(tmp_path / "killed") == expected


def test_a_process_killed_while_it_writes_a_checkpoint_ends_the_same(
    settings: dict[str, Any], start: Callable[..., subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    settings |= {"save_every": 2}
    train(TrainConfig(**settings))
    expected = outcome(Path(settings["out"]))
    settings["out"] = str(tmp_path / "killed")
    process = start("-c", _KILL_AT_CALL, "13", "train", "--quiet", *options_of(settings))
    assert process.wait() == -signal.SIGKILL
    assert list((tmp_path / "killed" / "checkpoints").glob(".writing-*"))
    train(TrainConfig(resume=settings["out"], quiet=True))
    assert outcome(tmp_path / "killed") == expected
