from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import UserError, evaluate_run, train
from mlx_sft import measure as measured
from mlx_sft.config import TrainConfig
from mlx_sft.errors import USAGE
from mlx_sft.evaluate import evaluate_model
from mlx_sft.measure import difference, each_named, measure, table
from mlx_sft.model.load import LoadedModel, load_model
from tests.chats import write_chats


@pytest.fixture
def run(train_once: Callable[..., Path]) -> Path:
    return train_once()


@pytest.fixture
def model(settings: dict[str, Any]) -> str:
    return str(settings["model"])


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of another source."""
    return write_chats(tmp_path_factory.mktemp("further") / "further.jsonl", 6, seed=9)


def test_several_models_are_measured_on_the_same_rows_one_in_memory_at_a_time(
    run: Path, model: str, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Any]] = []
    load = measured.load_named

    def watched(**named: Any) -> LoadedModel:
        assert [one() for one in alive] == [None] * len(alive)
        loaded = load(**named)
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(measured, "load_named", watched)
    named = each_named([str(run)], [model], [str(run / "adapter")])
    found = list(measure(named, [str(chats)]))
    assert len(alive) == 3
    assert [one.label for one in found] == [str(run), model, str(run / "adapter")]
    tuned, plain = evaluate_run(run, str(chats)).record(), evaluate_model(load_model(model), str(chats)).record()
    assert [one.whole.record() for one in found] == [tuned, plain, tuned]
    lines = table(found).splitlines()
    assert lines[0].split()[-1] == "rows"
    assert [line.split()[:2] for line in lines[1:]] == [[one.label, f"{one.whole.loss:.4f}"] for one in found]
    assert len({len(line) for line in lines}) == 1, "the columns are aligned"


def test_several_sources_are_measured_each_and_together(
    run: Path, model: str, chats: Path, further: Path, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    asked = ["eval", "--run", run, "--data", chats, "--data", further]
    record, other = map(json.loads, cli(*asked, "--model", model, "--json").stdout.splitlines())
    assert (record["name"], other["name"]) == (str(run), model)
    assert list(record["sources"]) == [str(chats), str(further)]
    for name, found in record["sources"].items():
        assert found == evaluate_run(run, name).record()
    both = tmp_path / "both.jsonl"
    both.write_text(chats.read_text() + further.read_text())
    for name, value in evaluate_run(run, str(both)).record().items():
        assert record[name] == pytest.approx(value, rel=1e-6), name
    lines = cli(*asked).stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [str(run), str(chats), str(further)]
    assert lines[-1].endswith("6 rows")


def test_losses_of_different_tokens_are_told_apart(
    run: Path, settings: dict[str, Any], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    rows = write_chats(tmp_path / "two.jsonl", 3, seed=1, turns=2)
    assert "warning" not in cli("eval", "--run", run, "--model", settings["model"], "--data", rows).stderr
    last = train(TrainConfig(**settings | {"train_on": "last", "max_steps": 1})).run_dir
    result = cli("eval", "--run", run, "--run", last, "--data", rows)
    assert "warning: the models have different supervised tokens in these rows" in result.stderr
    found = list(measure(each_named([str(run)], [], []), [str(rows)]))
    assert difference([*found, dataclasses.replace(found[0], objective="dpo")]) == (
        "their losses are not of the same objective: sft and dpo"
    )


def test_an_adapter_is_on_the_one_model_that_is_given() -> None:
    def named(*given: list[str], **more: Any) -> list[dict[str, Any]]:
        return [one.named for one in each_named(*given, **more)]

    assert named([], ["m"], ["a"]) == [{"adapter": "a", "model": "m"}]
    assert named([], ["m"], ["a", "b"]) == [
        {"model": "m"},
        {"adapter": "a", "model": "m"},
        {"adapter": "b", "model": "m"},
    ]
    assert named([], ["m", "n"], ["a"]) == [{"model": "m"}, {"model": "n"}, {"adapter": "a"}]
    assert named(["r", "s"], [], [], step="3", base_model=None) == [
        {"run": "r", "base": False, "step": "3"},
        {"run": "s", "base": False, "step": "3"},
    ]
    assert [one.label for one in each_named(["r"], [], [], step="3")] == ["r (step 3)"]
    assert [one.label for one in each_named(["r"], [], [], base=True)] == ["r (base)"]
    for wrong in ({"step": "best"}, {"base": True}):
        with pytest.raises(UserError, match="goes with --run") as caught:
            each_named([], ["m"], [], **wrong)
        assert caught.value.exit_code == USAGE


def test_what_is_not_there_is_said_before_anything_is_measured(
    run: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(**named: Any) -> LoadedModel:
        raise AssertionError(named)

    monkeypatch.setattr(measured, "load_named", loaded)
    none = str(tmp_path / "none")
    for names in (([str(run), none], [], []), ([str(run)], [], [none])):
        with pytest.raises(UserError, match="none"):
            list(measure(each_named(*names), [str(chats)]))
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        list(measure(each_named([str(run)], [], []), [str(chats), f"{none}.jsonl"]))
