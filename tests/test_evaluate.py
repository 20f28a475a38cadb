from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.errors import USAGE
from mlx_sft.evaluate import evaluate_run
from mlx_sft.run_folder import RunFolder
from tests.chosen import without_adapter


@pytest.fixture
def run(train_once: Callable[..., Path], settings: dict[str, Any], chats: Path) -> RunFolder:
    """A run that was validated on what it was trained on."""
    return RunFolder(shutil.copytree(train_once(valid=str(chats)), settings["out"]))


def last_evaluation(run: RunFolder) -> dict[str, Any]:
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "evaluation"][-1]


def test_it_finds_what_training_found(run: RunFolder, chats: Path) -> None:
    result = evaluate_run(run.path, str(chats))
    expected = last_evaluation(run)
    assert expected["best"]
    assert result.loss == pytest.approx(expected["loss"], rel=1e-6)
    assert result.token_accuracy == expected["token_accuracy"]
    assert (result.tokens, result.supervised_tokens) == (expected["tokens"], expected["supervised_tokens"])


def test_a_full_run_is_found_the_same(settings: dict[str, Any], chats: Path) -> None:
    run = RunFolder(
        train(TrainConfig(**without_adapter(settings) | {"method": "full", "lr": 1e-3}, valid=str(chats))).run_dir
    )
    assert evaluate_run(run.path, str(chats)).loss == pytest.approx(last_evaluation(run)["loss"], rel=1e-6)


def test_the_base_is_the_model_before_training(
    run: RunFolder, settings: dict[str, Any], chats: Path, tmp_path: Path
) -> None:
    untrained = train(TrainConfig(**settings | {"lr": 0.0, "out": str(tmp_path / "untrained")})).run_dir
    before = evaluate_run(run.path, str(chats), base=True).evaluation
    assert before == evaluate_run(untrained, str(chats)).evaluation
    assert before.loss > evaluate_run(run.path, str(chats)).loss


def test_a_result_is_a_line_for_a_person_or_of_json(run: RunFolder, chats: Path) -> None:
    result = evaluate_run(run.path, str(chats))
    record = json.loads(result.describe(as_json=True))
    fates = {"rows", "truncated", "dropped", "bad"}
    assert set(record) == {"loss", "perplexity", "token_accuracy", "exact_match", "tokens", "supervised_tokens"} | fates
    assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
    assert {name: getattr(result, name) for name in set(record) - fates} == {n: record[n] for n in set(record) - fates}
    assert repr(result) == f"EvaluationResult({result.describe()})"
    assert "\n" not in result.describe()
    assert f"{record['token_accuracy']:.1%}" in result.describe()
    with_answers = dataclasses.replace(result, f1=[1.0, 0.5])
    assert "F1 75.0% of 2 short answers" in with_answers.describe()
    assert json.loads(with_answers.describe(as_json=True)) == record | {"f1": 0.75, "short_answers": 2}


def test_data_that_cannot_be_read_is_named(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        evaluate_run(run.path, str(tmp_path / "none.jsonl"))


def test_a_run_that_has_not_finished_says_how_to(run: RunFolder, chats: Path) -> None:
    (run.adapter).rename(run.path / "elsewhere")
    with pytest.raises(UserError, match=f"--resume {run.path}"):
        evaluate_run(run.path, str(chats))


def test_an_adapter_is_evaluated_as_its_run_is(run: RunFolder, chats: Path, cli: Callable[..., Any]) -> None:
    expected = evaluate_run(run.path, str(chats))
    result = cli("eval", "--adapter", run.adapter, "--data", chats, "--json")
    assert json.loads(result.stdout)["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert cli("eval", "--data", chats).exit_code == USAGE
