"""`--report-to`: what other programs are told of a run, read back as they keep it, where they are installed."""

from __future__ import annotations

import json
import sqlite3
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.callbacks import Callback, Record, TrainingRun
from mlx_sft.training.callbacks.loggers import LOGGERS, Logger
from mlx_sft.training.callbacks.report_to import values
from tests.going_back import GoingBack

NAMES = {
    *("train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_sec", "train/peak_gb", "train/epoch"),
    *("eval/loss", "eval/perplexity", "eval/token_accuracy", "eval/exact_match", "eval/forgetting"),
}


class Told(Logger):
    """Keeps what it is told, by the run's own text, as a server would."""

    package: ClassVar = "json"
    fails_at: ClassVar[int] = 0
    server: ClassVar[dict[str, list[tuple[int, dict[str, float]]]]] = {}
    heard: ClassVar[list[str]] = []

    def begin(self, folder: Path, kept: str, config: Mapping[str, Any], step: int, *, resumed: bool) -> None:
        json.dumps(config)
        self._lines = self.server.setdefault(kept, [])
        self.heard.append(f"begin {step} {resumed} {config['lr']}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step == self.fails_at:
            raise OSError("the network is down")
        self._lines.append((step, dict(values)))

    def go_back(self, step: int) -> None:
        self.heard.append(f"back {step}")

    def end(self, *, finished: bool) -> None:
        self.heard.append(f"end {finished}")


class TakingBack(Told):
    takes_back: ClassVar = True


class Failing(Callback):
    """Ends a run after a step, behind which there is no checkpoint: as if it had been killed."""

    name = "failing"

    def __init__(self, step: int) -> None:
        super().__init__()
        self._step = step

    def on_step(self, run: TrainingRun, record: Record) -> None:
        if record["step"] == self._step:
            raise UserError("told to fail")


class TellingOfIt(GoingBack):
    def on_step(self, run: TrainingRun, record: Record) -> None:
        before = self.went
        super().on_step(run, record)
        if self.went and not before:
            run.emit({"kind": "rollback", "step": 2, "diverged_at": 4})


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Told, "server", {})
    monkeypatch.setattr(Told, "heard", [])


def interrupted(settings: dict[str, Any], **given: Any) -> Path:
    """A run that was cut short after step 5 and went on from the checkpoint of step 2, to its end at 6."""
    with pytest.raises(UserError, match="told to fail"):
        train(TrainConfig(**settings | given), callbacks=[Failing(5)])
    run = RunFolder(settings["out"])
    for step in run.checkpoint_steps():
        if step > 2:
            for file in run.checkpoint(step).iterdir():
                file.unlink()
            run.checkpoint(step).rmdir()
    train(TrainConfig.resolve(resume=settings["out"], quiet=True))
    return run.path


WITH_EVALUATIONS = {"valid_fraction": 0.2, "eval_every": 2, "save_every": 2, "max_steps": 6}


def test_what_is_told_has_the_names_of_others_and_is_what_the_metrics_say(settings: dict[str, Any]) -> None:
    with LOGGERS.registered("told", Told):
        run = train(TrainConfig(**settings | WITH_EVALUATIONS, report_to="told")).run_dir
    (lines,) = Told.server.values()
    assert {name for _, found in lines for name in found} == NAMES
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], values(record)) for record in records] == lines
    first = records[0]
    assert lines[0][1]["train/tokens_per_sec"] == first["tokens_per_second"]
    assert lines[0][1]["train/peak_gb"] == first["peak_memory_bytes"] / 1e9
    assert Told.heard[0].startswith("begin 0 False")
    assert Told.heard[-1] == "end True"


def test_an_objectives_own_metrics_are_told_and_what_is_no_number_is_not() -> None:
    record = {
        "kind": "train",
        "step": 3,
        "loss": None,
        "rewards/margins": 0.5,
        "time": "2026",
        "peak_memory_bytes": 1,
        "skipped_rows": ["x"],
    }
    assert values(record) == {"train/rewards/margins": 0.5, "train/peak_gb": 1e-9}


def test_a_run_that_goes_on_tells_no_step_twice(settings: dict[str, Any]) -> None:
    with LOGGERS.registered("told", Told):
        interrupted(settings | WITH_EVALUATIONS, report_to=["told"])
    (lines,) = Told.server.values()
    kinds = [(step, "eval/loss" in found) for step, found in lines]
    assert sorted(set(kinds)) == sorted(kinds)
    assert [step for step, is_evaluation in kinds if not is_evaluation] == [1, 2, 3, 4, 5, 6]
    assert [word.split()[:3] for word in Told.heard if word.startswith("begin")] == [
        ["begin", "0", "False"],
        ["begin", "2", "True"],
    ]


@pytest.mark.parametrize(("kind", "steps"), [(Told, [1, 2, 3, 4, 5, 6]), (TakingBack, [1, 2, 3, 4, 3, 4, 5, 6])])
def test_a_run_that_goes_back_says_so_to_those_who_take_back(
    settings: dict[str, Any], kind: type[Told], steps: list[int]
) -> None:
    with LOGGERS.registered("told", kind):
        train(TrainConfig(**settings, save_every=2, report_to="told"), callbacks=[TellingOfIt()])
    (lines,) = Told.server.values()
    assert [step for step, _ in lines] == steps
    assert "back 2" in Told.heard


def test_a_logger_that_fails_is_told_no_more_and_ends_nothing(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Told, "fails_at", 3)
    with LOGGERS.registered("told", Told):
        assert train(TrainConfig(**settings, report_to="told")).steps == 6
    (lines,) = Told.server.values()
    assert [step for step, _ in lines] == [1, 2]
    assert capsys.readouterr().err.count("told is told no more of this run: OSError: the network is down") == 1


def test_one_that_cannot_begin_ends_a_run_before_its_first_step(settings: dict[str, Any]) -> None:
    class Broken(Told):
        def begin(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("no key")

    with LOGGERS.registered("told", Broken), pytest.raises(UserError, match="cannot begin: RuntimeError: no key"):
        train(TrainConfig(**settings, report_to="told"))


def test_a_package_that_is_missing_and_a_name_that_there_is_not(settings: dict[str, Any]) -> None:
    class Missing(Told):
        package = "no_such_package_at_all"

    with LOGGERS.registered("missing", Missing), pytest.raises(UserError, match="needs the package") as caught:
        train(TrainConfig(**settings, report_to="missing"))
    assert "pip install 'mlx-sft[missing]'" in caught.value.hint
    assert not Path(settings["out"]).exists()
    with pytest.raises(UserError, match=r"no logger is named wanbd; did you mean \"wandb\""):
        TrainConfig(**settings, report_to="wanbd")


# The real packages


@pytest.fixture
def quiet_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """None of them sends anything anywhere, nor writes outside of the test's folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path))


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What the metrics of a run say, by the names that are told."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in values(record).items():
            found.setdefault(name, []).append((record["step"], value))
    return found


def records_of(file: Path) -> Iterator[bytes]:
    """The records of a `.wandb` file: behind 7 bytes LevelDB's log format, in blocks of 32 KiB, each part with checksum, size, kind."""
    data, at, found = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<4xHB", data[at : at + 7])
        found += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield found
            found = b""


def ended_records_of(file: Path) -> list[bytes]:
    """Those of a run that has ended, once its last one is there: wandb writes in a process of its own, a little longer."""
    from wandb.proto import wandb_internal_pb2

    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = list(records_of(file))
        if found and wandb_internal_pb2.Record.FromString(found[-1]).WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError("wandb has not written the end of the run")


Settings = dict[str, Any]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("quiet_packages")
def test_tensorboards_own_reader_finds_each_step_once(settings: Settings) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = interrupted(settings | WITH_EVALUATIONS, report_to=["tensorboard"])
    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    expected = points(run)
    assert set(read.Tags()["scalars"]) == NAMES == set(expected)
    for name, told in expected.items():
        assert [event.step for event in read.Scalars(name)] == [step for step, _ in told], name
        assert [event.value for event in read.Scalars(name)] == pytest.approx([value for _, value in told], rel=1e-6), (
            name
        )
    assert '"rank": 2' in read.Tensors("config")[-1].tensor_proto.string_val[0].decode()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("quiet_packages")
def test_wandbs_offline_files_have_each_step_once_and_the_run_folder_no_key(settings: Settings, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    run = interrupted(settings | WITH_EVALUATIONS, report_to=["wandb"])
    rows: dict[int, dict[str, float]] = {}
    ids, configs, steps = set(), "", []
    for file in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")):
        for data in ended_records_of(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                configs += str(record.run.config)
            if record.WhichOneof("record_type") == "history":
                items = {
                    (item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item
                }
                step = int(items.get("_step", record.history.step.num))
                steps.append(step)
                rows.setdefault(step, {}).update({name: value for name, value in items.items() if name in NAMES})
    expected = points(run)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert len(ids) == 1
    assert "rank" in configs
    for name in NAMES - {
        "train/tokens_per_sec",
        "train/peak_gb",
    }:  # the times of steps that were taken again are others
        assert [(step, row[name]) for step, row in sorted(rows.items()) if name in row] == expected[name], name
    assert not [file for file in run.rglob("*") if file.is_file() and b"k" * 40 in file.read_bytes()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("quiet_packages")
def test_trackios_database_has_each_step_once(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    run = interrupted(settings | WITH_EVALUATIONS, report_to=["trackio"])
    assert capsys.readouterr().out == ""
    (file,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        lines = database.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        configs = database.execute("SELECT config FROM configs").fetchall()
    database.close()
    assert len({(run_id, name) for run_id, name, _, _ in lines}) == 1
    found: dict[str, list[tuple[int, float]]] = {}
    for _, _, step, metrics in lines:
        for name, value in json.loads(metrics).items():
            found.setdefault(name, []).append((step, value))
    expected = points(run)
    for name in NAMES - {"train/tokens_per_sec", "train/peak_gb"}:
        assert sorted(found[name]) == expected[name], name
    assert any(json.loads(config)["rank"] == 2 for (config,) in configs)
