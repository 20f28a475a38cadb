"""`--for`: as many steps as end in a time, settled before the first; fewer on a slower machine; a run that goes on takes the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
import yaml

from mlx_sft import TrainConfig, train
from mlx_sft.console import Console
from mlx_sft.data.batches import Batch
from mlx_sft.errors import UserError
from mlx_sft.run_folder import RunFolder
from mlx_sft.settings import parse_duration
from mlx_sft.training import time_plan
from mlx_sft.training.callbacks import Callback, Record, TrainingRun, time_limit
from mlx_sft.training.failures import FailedBatch, OutOfMemory
from mlx_sft.training.schedule import planned_steps
from mlx_sft.training.setup import prepare_job
from mlx_sft.training.time_plan import within_time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("45m", 2700), ("1h30m", 5400), ("90s", 90), ("2 h", 7200), ("1h 5m 3s", 3903), ("10min", 600)],
)
def test_a_time_is_read(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "45", "0m", "m", "1.5h", "-3m", "45 minutes of it", "1m1h"])
def test_another_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="45m, 1h30m or 90s"):
        TrainConfig(data="x", time_limit=text)


class Clock:
    """A clock that stands still until something takes time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Computer:
    """Takes a hundredth of a second a token, and ten seconds more for each trace."""

    def __init__(self, clock: Clock, traces: int = 0) -> None:
        self._clock = clock
        self.compiled = range(traces)
        self.trace_seconds: list[float] = []
        self.steps = 0

    def gradient(self, parameters: Any, batches: list[Batch], key: Any) -> None:
        self.steps += 1
        self._clock.now += sum(batch.needed_tokens for batch in batches) / 100
        if self.steps == 1 and self.compiled:
            self._clock.now += 10
            self.trace_seconds.append(10.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time_plan, "time", SimpleNamespace(perf_counter=clock, monotonic=clock))
    return clock


def planned(
    limit: str, clock: Clock, settings: dict[str, Any], *, traces: int = 0, saving: int = 0
) -> tuple[int, int, float]:
    """Steps that are planned within a time, of how many, and the seconds that they take."""
    job = prepare_job(TrainConfig(**settings | {"epochs": 5000}), Console(quiet=True))
    config = job.config.model_copy(update={"time_limit": limit})
    started = clock.now
    computer: Any = Computer(clock, traces)
    config, plan = within_time(
        config, job.plan, job.data, computer, job.parameters, job.settings,
        checkpoint_bytes=saving, started=started, console=Console(quiet=True),
    )  # fmt: skip
    assert plan.total_steps == planned_steps(config, job.data).total_steps
    tokens = sum(int(job.data.train.needed_lengths[list(step.rows)].sum()) for step in plan.steps())
    assert computer.steps == 2 * min(8, computer.steps // 2)
    return plan.total_steps, job.plan.total_steps, clock.now - started + tokens / 100


@pytest.mark.parametrize("limit", ["10m", "1h"])
def test_as_many_steps_are_planned_as_fit(limit: str, clock: Clock, settings: dict[str, Any]) -> None:
    steps, of, seconds = planned(limit, clock, settings)
    assert 1 < steps < of
    assert 0.85 * parse_duration(limit) < seconds < parse_duration(limit)


def test_all_are_planned_where_there_is_time(clock: Clock, settings: dict[str, Any]) -> None:
    steps, of, _ = planned("99h", clock, settings)
    assert steps == of


def test_traces_evaluations_and_checkpoints_take_their_part(
    clock: Clock, settings: dict[str, Any], tmp_path: Path
) -> None:
    plain, _, _ = planned("1h", clock, settings)
    out = {"out": str(tmp_path / "second")}
    assert planned("1h", clock, settings | out, traces=61)[0] < 0.9 * plain
    out = {"out": str(tmp_path / "third")}
    assert planned("1h", clock, settings | out | {"save_every": 1}, saving=10**10)[0] < 0.5 * plain
    out = {"out": str(tmp_path / "fourth"), "valid": settings["data"], "eval_every": 1}
    assert planned("1h", clock, settings | out)[0] < 0.7 * plain


def test_too_short_a_time_is_refused_with_what_a_step_needs(clock: Clock, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--for 3s is too short for a step.*about 0:") as error:
        planned("3s", clock, settings)
    assert "more time" in error.value.hint


def test_a_step_that_fails_says_so(clock: Clock, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OutOfMemory(FailedBatch(1, 9, 9, "no memory"))

    monkeypatch.setattr(Computer, "gradient", full)
    with pytest.raises(UserError, match="cannot tell what a step takes: no memory"):
        planned("1h", clock, settings)


# While it runs


class Slow(Callback):
    """Makes each step take some seconds, and may end the run."""

    def __init__(self, clock: Clock, seconds: float, last: int | None = None) -> None:
        super().__init__()
        self._clock, self._seconds, self._last = clock, seconds, last

    def on_step(self, run: TrainingRun, record: Record) -> None:
        self._clock.now += self._seconds
        record["seconds"] = self._seconds
        if run.step == self._last:
            raise RuntimeError("killed")


@pytest.fixture
def limited(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of 120 steps; its clock is the test's."""
    monkeypatch.setattr("mlx_sft.training.setup.within_time", lambda config, plan, *_, **__: (config, plan))
    return settings | {"epochs": 40, "lr": 1e-3, "save_every": 15, "valid": settings["data"], "time_limit": "1000s"}


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time_limit, "time", SimpleNamespace(monotonic=clock))
    return clock


def kinds(run: RunFolder) -> list[tuple[str, int]]:
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [(record["kind"], record["step"]) for record in records]


def test_a_run_that_is_too_slow_ends_in_time_evaluated_and_saved_and_can_go_on(
    limited: dict[str, Any], watch: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    limited |= {"save_every": 1000, "eval_every": 1000}
    run = RunFolder(train(TrainConfig(**limited), callbacks=[Slow(watch, 100)]).run_dir)
    steps = run.checkpoint_steps()[-1]
    assert 5 <= steps <= 10
    assert watch.now - 1000 <= 1000
    assert kinds(run)[-2:] == [("train", steps), ("evaluation", steps)]
    adapter = (run.adapter / "adapter_model.safetensors").read_bytes()

    again = train(TrainConfig(resume=str(run.path), quiet=True), callbacks=[Slow(watch, 100)])
    assert again.steps == steps
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == adapter

    with pytest.raises(UserError, match="the 100s of --for are used up") as error:
        train(TrainConfig(resume=str(run.path), time_limit="100s", quiet=True), callbacks=[Slow(watch, 100)])
    assert "longer --for" in error.value.hint

    more = train(TrainConfig(resume=str(run.path), time_limit="2000s", quiet=True), callbacks=[Slow(watch, 100)])
    assert steps < more.steps <= 20
    assert yaml.safe_load(run.config.read_text())["for"] == "2000s"


def test_a_run_whose_time_is_up_keeps_the_steps_that_were_planned(limited: dict[str, Any], watch: Clock) -> None:
    limited |= {"save_every": 1000, "eval_every": 1000}
    stopped = train(TrainConfig(**limited), callbacks=[Slow(watch, 40)])
    assert 10 < stopped.steps < 26
    run = RunFolder(stopped.run_dir)
    assert yaml.safe_load(run.config.read_text())["max_steps"] is None
    more = train(TrainConfig(resume=str(run.path), time_limit="99h", quiet=True), callbacks=[Slow(watch, 40)])
    assert more.steps == 120


def test_a_slower_machine_is_given_fewer_steps_and_a_run_that_goes_on_takes_the_same(
    limited: dict[str, Any], watch: Clock, tmp_path: Path
) -> None:
    whole = train(TrainConfig(**limited), callbacks=[Slow(watch, 20)])
    assert 40 < whole.steps < 50
    run = RunFolder(whole.run_dir)
    assert yaml.safe_load(run.config.read_text())["max_steps"] == whole.steps
    rates = [json.loads(line).get("learning_rate") for line in run.metrics.read_text().splitlines()]
    assert rates[-1] < 0.01 * max(rates)

    watch.now = 1000.0
    limited |= {"out": str(tmp_path / "killed")}
    with pytest.raises(RuntimeError, match="killed"):
        train(TrainConfig(**limited), callbacks=[Slow(watch, 20, last=20)])
    killed = RunFolder(limited["out"])
    assert killed.checkpoint_steps() == [15, 20]  # an error saves on its way out
    train(TrainConfig(resume=str(killed.path), quiet=True))
    adapters = [(folder.adapter / "adapter_model.safetensors").read_bytes() for folder in (run, killed)]
    assert adapters[0] == adapters[1]


def test_a_run_without_a_limit_knows_no_time(settings: dict[str, Any], watch: Clock) -> None:
    assert train(TrainConfig(**settings), callbacks=[Slow(watch, 10**6)]).steps == 6


def test_what_was_used_before_a_kill_counts(limited: dict[str, Any], watch: Clock) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        train(TrainConfig(**limited), callbacks=[Slow(watch, 40, last=16)])
    used = watch.now - 1000
    watch.now = 50_000.0  # another process's clock
    result = train(TrainConfig(resume=limited["out"], quiet=True), callbacks=[Slow(watch, 40)])
    assert used - 50 + watch.now - 50_000 <= 1000
    assert result.steps < 26


def test_the_start_of_a_run_lays_it_out(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """With the real clock: an hour is enough for a few steps, and a thousand days of them are not planned in it."""
    mx.eval(mx.zeros(1))
    train(TrainConfig(**settings | {"time_limit": "1h", "quiet": False}))
    assert "--for 1h: 6 of 6 steps end in it" in capsys.readouterr().err
    assert yaml.safe_load((Path(settings["out"]) / "config.yaml").read_text())["max_steps"] is None
    job = prepare_job(
        TrainConfig(**settings | {"time_limit": "10m", "epochs": 10**7, "out": settings["out"] + "-2"}),
        Console(quiet=True),
    )
    assert job.config.max_steps == job.plan.total_steps < 10**7
