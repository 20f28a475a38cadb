"""Whatever ends a run, the state after its last step is saved first, and what goes on from there ends as if nothing had been."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from pydantic import TypeAdapter

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.optimizers.adamw import AdamW
from mlx_sft.run_folder import RunFolder
from mlx_sft.training import loop
from mlx_sft.training.callbacks import Callback, Record, TrainingRun
from mlx_sft.training.callbacks.metrics_file import MetricsFile
from mlx_sft.training.checkpoint import Progress, Unfinished
from tests.chats import write_chats
from tests.faults.small import make_model
from tests.run_folders import outcome


class Counting(Callback):
    """Counts what it hears, in a checkpoint's state, and raises at one record."""

    name: ClassVar = "counting"

    def __init__(self, kind: str = "", step: int = 0, error: BaseException | None = None) -> None:
        super().__init__()
        self.heard: list[list[Any]] = []
        self._at, self._error = (kind, step), error

    def on_record(self, run: TrainingRun, record: Record) -> None:
        if self._error is not None and (record["kind"], record["step"]) == self._at:
            raise self._error
        if record["kind"] in ("train", "evaluation"):
            self.heard.append([record["kind"], record["step"]])

    def state(self) -> dict[str, Any]:
        return {"heard": self.heard}

    def load_state(self, state: dict[str, Any]) -> None:
        self.heard = state.get("heard", [])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("made")
    chats = str(write_chats(folder / "chats.jsonl", 10, seed=4))
    shape = {"rank": 2, "lr": 1e-2, "batch_size": 4, "epochs": 2, "dropout": 0.1, "quiet": True}
    rhythm = {"valid": chats, "eval_every": 2, "save_every": 4, "keep": 9}
    return {"data": chats, "model": str(make_model(folder / "model"))} | shape | rhythm


@pytest.fixture(scope="module")
def undisturbed(made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    train(TrainConfig(**made, out=str(out)), callbacks=[Counting()])
    return outcome(out)


@pytest.fixture
def options(made: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return made | {"out": str(tmp_path / "run")}


def goes_on_as(undisturbed: dict[str, Any], run: RunFolder, step: int) -> None:
    """The run, of which this step was saved, ends as the undisturbed one, but for that checkpoint."""
    train(TrainConfig(resume=str(run.path), quiet=True), callbacks=[Counting()])
    found = outcome(run.path)
    saved = run.checkpoint(step).relative_to(run.path)
    if step not in (4, 6):
        found = {name: value for name, value in found.items() if Path(name).parent != saved}
    assert found == undisturbed


class Panic(BaseException):
    """As those of libraries in Rust."""


@pytest.mark.parametrize(
    ("kind", "step", "error"),
    [("train", 3, KeyError("x")), ("evaluation", 2, Panic("x")), ("train", 6, UserError("no"))],
)
def test_an_error_of_a_callback_costs_nothing(
    kind: str, step: int, error: BaseException, options: dict[str, Any], undisturbed: dict[str, Any]
) -> None:
    run = RunFolder(options["out"])
    with pytest.raises(type(error)):
        train(TrainConfig(**options), callbacks=[Counting(kind, step, error)])
    assert run.checkpoint_steps()[-1] == step
    goes_on_as(undisturbed, run, step)


def test_nor_does_one_in_an_evaluation(
    options: dict[str, Any], undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, own = RunFolder(options["out"]), loop.evaluate_in_memory

    def failing(*arguments: Any) -> Any:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(loop, "evaluate_in_memory", failing)
    with pytest.raises(RuntimeError, match="no kernel") as raised:
        train(TrainConfig(**options), callbacks=[Counting()])
    assert [str(noted.path) for noted in RunFolder.noted_on(raised.value)] == [str(run.path)]
    assert run.checkpoint_steps() == [2]
    monkeypatch.setattr(loop, "evaluate_in_memory", own)
    goes_on_as(undisturbed, run, 2)


def test_nor_a_line_of_metrics_that_is_written_in_part(
    options: dict[str, Any], undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, own = RunFolder(options["out"]), MetricsFile.on_record

    def full(callback: MetricsFile, job: TrainingRun, record: Record) -> None:
        if record["kind"] == "train" and record["step"] == 3 and callback._lines._file is not None:
            callback._lines._file.write(json.dumps(record).encode()[:9])
            raise UserError(f"the disk is full: {errno.ENOSPC}")
        own(callback, job, record)

    monkeypatch.setattr(MetricsFile, "on_record", full)
    with pytest.raises(UserError, match="the disk is full"):
        train(TrainConfig(**options), callbacks=[Counting()])
    monkeypatch.setattr(MetricsFile, "on_record", own)
    assert run.checkpoint_steps() == [3]
    goes_on_as(undisturbed, run, 3)


def test_a_state_in_the_middle_of_an_update_is_not_saved(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, taken = AdamW.update, iter(range(9))

    def failing(*arguments: Any) -> Any:
        if next(taken) == 2:
            raise RuntimeError("in the update")
        return own(*arguments)

    monkeypatch.setattr(AdamW, "update", failing)
    with pytest.raises(RuntimeError, match="in the update"):
        train(TrainConfig(**options))
    assert RunFolder(options["out"]).checkpoint_steps() == []


def test_a_state_that_diverges_is_not_saved_over_one_that_does_not(options: dict[str, Any]) -> None:
    class Suspicious(Callback):
        name: ClassVar = "suspicious"

        def on_step(self, run: TrainingRun, record: Record) -> None:
            if record["step"] == 3:
                run.suspect(2)
                raise UserError("it diverges")

    with pytest.raises(UserError, match="it diverges"):
        train(TrainConfig(**options | {"save_every": 2, "keep": 1}), callbacks=[Suspicious()])
    assert RunFolder(options["out"]).checkpoint_steps() == [2]


def test_a_checkpoint_whose_unfinished_step_has_no_record_is_damaged() -> None:
    with pytest.raises(ValueError, match="no record of a step"):
        TypeAdapter(Progress).validate_python({"step": 2, "unfinished": {"record": {"step": 2}, "heard": []}})
    kept: dict[str, Any] = {"step": 2, "unfinished": {"record": {"kind": "train", "step": 2}, "heard": ["a"]}}
    assert TypeAdapter(Progress).validate_python(kept).unfinished == Unfinished(kept["unfinished"]["record"], ["a"])
