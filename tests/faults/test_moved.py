"""A run folder that someone renames, replaces or removes while it is trained: the run goes on where the folder is, or ends in words."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.run_folder import RunFolder
from tests.faults.layer import Call, watched
from tests.run_folders import outcome

pytestmark = pytest.mark.faults

ANOTHER = {"notes.md": b"of something else"}


class _At:
    """Does something before the first call of this name whose path, within the run, ends so."""

    def __init__(self, name: str, end: str, do: Callable[[], object]) -> None:
        self._name, self._end, self._do = name, end, do
        self.done = False

    def before(self, call: Call) -> None:
        if not self.done and call.name == self._name and call.path.endswith(self._end):
            self.done = True
            self._do()

    def after(self, call: Call) -> None:
        pass


SETTINGS: dict[str, Any] = {
    "valid_fraction": 0.2,
    "eval_every": 1,
    "samples": 1,
    "sample_tokens": 2,
    "lr": 3.0,
    "warmup": 0,
    "max_steps": 3,
    "save_every": 1,
    "keep": 2,
    "batch_size": 4,
    "epochs": 2,
}
"""A run of which the best is not the last, so that it writes all that there is."""


@pytest.fixture(scope="module")
def undisturbed(
    chats: Path, make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What comes of the run where it is left alone."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    common = {"data": str(chats), "model": str(make_base("qwen3", tied=True)), "rank": 2, "quiet": True}
    train(TrainConfig(**common, **SETTINGS, out=str(run)))
    expected = outcome(run)
    assert "last/adapter_model.safetensors" in expected
    return expected


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("write", "metrics.jsonl"),
        ("mkdir", "checkpoints"),
        ("fsync", "optimizer.safetensors"),
        ("rename", "step-00000002"),
        ("open", "adapter_config.json"),
        ("open", "README.md"),
    ],
)
def test_a_run_goes_on_in_a_folder_that_is_renamed(
    name: str, end: str, settings: dict[str, Any], undisturbed: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(settings["out"])
    other = run.with_name("renamed")
    at = _At(name, end, lambda: run.rename(other))
    with watched(run.parent, at):
        result = train(TrainConfig(**settings | SETTINGS))
    assert at.done
    assert not run.exists()
    assert outcome(other) == undisturbed
    assert result.run_dir == other
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("warning: ") == 1
    assert f"the run folder {run} is now {other}" in said


def test_a_folder_that_is_put_in_the_place_of_a_run_stays_as_it_is(
    settings: dict[str, Any], undisturbed: dict[str, Any]
) -> None:
    run = Path(settings["out"])
    other = run.with_name("renamed")

    def replace() -> None:
        run.rename(other)
        run.mkdir()
        (run / "notes.md").write_bytes(ANOTHER["notes.md"])

    with watched(run.parent, _At("write", "metrics.jsonl", replace)):
        train(TrainConfig(**settings | SETTINGS))
    assert outcome(run) == ANOTHER
    assert outcome(other) == undisturbed


@pytest.mark.parametrize(
    ("name", "end", "another"), [("write", "metrics.jsonl", True), ("fsync", "optimizer.safetensors", False)]
)
def test_a_run_whose_folder_is_removed_ends_in_words_and_makes_it_not_anew(
    name: str, end: str, another: bool, settings: dict[str, Any]
) -> None:
    run = Path(settings["out"])

    def do() -> None:
        shutil.rmtree(run)
        if another:
            run.mkdir()

    with (
        watched(run.parent, _At(name, end, do)),
        pytest.raises(UserError, match=r"the run folder was removed") as caught,
    ):
        train(TrainConfig(**settings | SETTINGS))
    assert caught.value.where == str(run)
    assert "--resume" in caught.value.hint
    assert run.exists() is another
    assert not another or list(run.iterdir()) == []


def test_a_run_that_was_renamed_and_stopped_goes_on_from_there(
    settings: dict[str, Any], undisturbed: dict[str, Any]
) -> None:
    run = Path(settings["out"])
    other = run.with_name("renamed")

    def stop() -> None:
        raise KeyboardInterrupt

    moved = _At("write", "metrics.jsonl", lambda: run.rename(other))
    stopped = _At("fsync", "step-00000002", stop)
    with watched(run.parent, moved), watched(run.parent, stopped), pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings | SETTINGS))
    assert not run.exists()
    assert RunFolder(other).checkpoint_steps() == [1, 2]  # the way out saves what was cut off
    train(TrainConfig(resume=str(other), quiet=True))
    assert outcome(other) == undisturbed
