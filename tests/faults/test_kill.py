"""A run that is killed at any moment and resumed ends as if it had not been: every crash point.

What a SIGKILL leaves is what is on the disk at that moment, whatever the process had in mind. So every crash point is tried
without a process: before and after each call by which the run folder changes or a file becomes durable, the folder is copied;
each copy is resumed and must end as the run that was left alone. Processes that are truly killed are `test_faults`'.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.run_folder import RunFolder
from tests.chosen import without_adapter
from tests.faults.layer import Call, watched
from tests.run_folders import outcome

pytestmark = pytest.mark.faults


class _Copies:
    """Copies of a run folder, one for each state that it was ever in."""

    def __init__(self, run: Path, folder: Path) -> None:
        self.paths: list[Path] = []
        self._run, self._folder = run, folder
        self._seen: set[tuple[tuple[str, bytes], ...]] = set()

    def before(self, call: Call) -> None:
        if call.name not in ("fsync", "rename", "unlink", "rmdir"):
            return
        files = [path for path in sorted(self._run.rglob("*")) if path.is_file()] if self._run.exists() else []
        state = tuple((str(path), path.read_bytes()) for path in files)
        if self._run.exists() and state not in self._seen:
            self._seen.add(state)
            self.paths.append(self._folder / f"killed-{len(self.paths)}")
            shutil.copytree(self._run, self.paths[-1])

    after = before


@pytest.fixture
def crash_points(tmp_path: Path) -> Callable[[dict[str, Any]], list[Path]]:
    """`crash_points(settings)` → what was on the disk before and after each call by which the run changed or became durable."""

    def trained(settings: dict[str, Any]) -> list[Path]:
        run = Path(settings["out"])
        copies = _Copies(run, tmp_path)
        with watched(run, copies):
            train(TrainConfig(**settings))
        return copies.paths

    return trained


@pytest.mark.parametrize(
    ("changes", "result"),
    [
        pytest.param({"dropout": 0.2}, "adapter/adapter_model.safetensors", id="lora with dropout"),
        pytest.param(
            {"valid_fraction": 0.2, "eval_every": 1, "lr": 3.0, "warmup": 0, "batch_size": 4, "max_steps": 3}
            | {"samples": 2, "sample_tokens": 3},
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
    crash_points: Callable[[dict[str, Any]], list[Path]],
) -> None:
    settings = without_adapter(settings) if "method" in changes else settings
    settings |= {"max_steps": 2, "save_every": 1, "keep": 1, "batch_size": 2} | changes
    run = Path(settings["out"])
    killed = crash_points(settings)
    expected = outcome(run)
    assert result in expected
    assert len(expected["metrics.jsonl"]) >= 2
    assert not any(".writing" in name or ".replaced" in name for name in expected)
    began = [path for path in killed if (path / "config.yaml").exists()]
    assert len(began) >= 12
    # How files are written is the same code for all; every third moment, begun by another for each, finds what is a setting's own.
    tried = began if "dropout" in changes else began[len(changes) % 3 :: 3]
    for path in tried:
        shutil.rmtree(run)
        path.rename(run)
        train(TrainConfig(resume=str(run), quiet=True))
        assert outcome(run) == expected, path.name


def test_a_run_killed_before_it_began_is_simply_started_again(
    settings: dict[str, Any], crash_points: Callable[[dict[str, Any]], list[Path]]
) -> None:
    run = Path(settings["out"])
    killed = crash_points(settings)
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


@pytest.mark.parametrize("cut", [100, 1, 0])
def test_metrics_that_were_cut_in_a_line_go_on_after_the_last_whole_one(settings: dict[str, Any], cut: int) -> None:
    train(TrainConfig(**settings, save_every=4))
    run = RunFolder(settings["out"])
    whole = run.metrics.read_text().splitlines()
    shutil.rmtree(run.checkpoint(6))
    os.truncate(run.metrics, len(whole[0]) + 1 + cut)
    train(TrainConfig(resume=str(run.path), quiet=True))
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [1, 5, 6]


def test_a_best_result_that_is_gone_is_missed(settings: dict[str, Any]) -> None:
    settings |= {"valid_fraction": 0.2, "eval_every": 1, "lr": 3.0, "warmup": 0, "batch_size": 4, "max_steps": 3}
    train(TrainConfig(**settings))
    run = RunFolder(settings["out"])
    assert run.last.exists()
    shutil.rmtree(run.adapter)
    with pytest.raises(UserError, match="the best result, of step 2, is gone") as caught:
        train(TrainConfig(resume=str(run.path), quiet=True))
    assert "last/" in caught.value.hint
