"""`train` from Python: rows, a model and a tokenizer that are in memory already, and callbacks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

from mlx_sft import TrainConfig, UserError, evaluate_run, export, load_model, load_run, train
from mlx_sft.common_settings import IN_MEMORY
from mlx_sft.errors import USAGE
from mlx_sft.run_folder import RunFolder


@pytest.fixture
def rows(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the settings' file."""
    return [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()]


@pytest.fixture
def without_data(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name != "data"} | {"out": str(tmp_path / "in-memory")}


def adapter(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


class Rows(Sequence[dict[str, Any]]):
    """A sequence that is no list."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]


@pytest.mark.parametrize("kind", ["list", "tuple", "sequence", "datasets"])
def test_rows_in_memory_train_as_those_of_a_file(
    kind: str, settings: dict[str, Any], without_data: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    if kind == "datasets":
        given: Any = pytest.importorskip("datasets").Dataset.from_list(rows)
    else:
        given = {"list": list, "tuple": tuple, "sequence": Rows}[kind](rows)
    from_file = train(TrainConfig(**settings)).run_dir
    in_memory = train(TrainConfig(**without_data), data=given).run_dir
    assert adapter(in_memory) == adapter(from_file)
    assert TrainConfig.resolve(RunFolder(in_memory).config).data == [IN_MEMORY]


def test_a_run_on_rows_in_memory_goes_on_with_the_same_rows_and_no_others(
    without_data: dict[str, Any], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    whole = train(TrainConfig(**without_data), data=rows).run_dir
    cut = train(TrainConfig(**without_data | {"out": str(tmp_path / "cut"), "max_steps": 3}), data=rows).run_dir
    with pytest.raises(UserError, match="given in memory, and are not here now") as caught:
        train(TrainConfig(resume=str(cut)))
    assert "train(config, data=rows)" in caught.value.hint
    with pytest.raises(UserError, match="the data changed since the run began"):
        train(TrainConfig(resume=str(cut)), data=[*rows[1:], rows[0]])
    assert train(TrainConfig(resume=str(cut), max_steps=3), data=rows).steps == 3
    assert adapter(whole) != adapter(cut)
    result = export(cut, tmp_path / "merged")
    assert result.verification is not None
    assert "random tokens" in result.verification.rows


def test_validation_rows_in_memory_are_evaluated(without_data: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    result = train(TrainConfig(**without_data, eval_every=2), data=rows[4:], valid=rows[:4])
    assert result.best_loss is not None
    report = json.loads(RunFolder(result.run_dir).data_report.read_text())
    assert [source["name"] for source in report["sources"]] == ["data", "valid"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there are no rows"),
        ("chats.jsonl", "a sequence of mappings, not a str"),
        ({"messages": []}, "a sequence of mappings, not a dict"),
        (iter([]), "a sequence of mappings, not a list_iterator"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "data[0]"),
        ([["messages"]], "the row is a list, not a mapping"),
    ],
)
def test_rows_that_are_none_are_refused_by_their_index(without_data: dict[str, Any], given: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        train(TrainConfig(**without_data), data=given)
    assert message in str(caught.value)
    assert not Path(without_data["out"]).exists()


def test_many_bad_rows_are_ten_lines_and_no_more(without_data: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        train(TrainConfig(**without_data), data=[{"foo": number} for number in range(1800)])
    assert str(caught.value).count("data[") == 10


def test_rows_are_not_given_twice(settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    with pytest.raises(UserError, match="data is given twice") as caught:
        train(TrainConfig(**settings), data=rows)
    assert caught.value.exit_code == USAGE
    with pytest.raises(UserError, match="nothing to train on"):
        train(TrainConfig())


@pytest.mark.parametrize("of", ["load_model", "mlx_lm"])
def test_a_model_in_memory_trains_as_one_that_is_loaded(of: str, settings: dict[str, Any], tmp_path: Path) -> None:
    loaded = train(TrainConfig(**settings)).run_dir
    if of == "load_model":
        given = {"model": load_model(settings["model"], "float32")}
    else:
        model, tokenizer = mlx_lm.load(settings["model"])
        given = {"model": model, "tokenizer": tokenizer}
    run = train(TrainConfig(**settings | {"out": str(tmp_path / "given")}), **given).run_dir
    assert adapter(run) == adapter(loaded)


def test_a_model_of_another_checkpoint_is_noticed(settings: dict[str, Any], make_base: Callable[..., Path]) -> None:
    other = load_model(str(make_base("qwen3", tied=True, initializer_range=0.3)), "float32")
    with pytest.raises(UserError, match="mlx-lm computes with another"):
        train(TrainConfig(**settings), model=other)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "a name"}, "the model is a str"),
        ({"tokenizer": "a name"}, "the tokenizer is a str"),
    ],
)
def test_what_is_no_model_or_tokenizer_is_refused(settings: dict[str, Any], given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train(TrainConfig(**settings), **given)


def test_what_a_notebook_shows_is_a_line(settings: dict[str, Any]) -> None:
    run = train(TrainConfig(**settings)).run_dir
    for shown in (load_model(settings["model"]), load_run(run), evaluate_run(run, settings["data"]), export):
        assert len(repr(shown)) < 300
        assert "\n" not in repr(shown)


def test_an_evaluation_has_its_loss_where_one_looks_for_it(settings: dict[str, Any]) -> None:
    result = evaluate_run(train(TrainConfig(**settings)).run_dir, settings["data"])
    assert result.loss == result.evaluation.loss > 0
    assert result.perplexity > 1


@pytest.mark.parametrize(("given", "held"), [(None, "0"), ("1", "1")])
def test_float32_is_not_rounded_to_tf32_unless_that_is_asked_for(
    given: str | None, held: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLX_ENABLE_TF32", raising=False)
    if given is not None:
        monkeypatch.setenv("MLX_ENABLE_TF32", given)
    code = "import mlx_sft, os; print(os.environ['MLX_ENABLE_TF32'])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == held
    )


def test_that_pytorch_is_missing_is_no_news_to_people_who_need_none() -> None:
    code = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "torch" else found(name, *rest)
import mlx_sft, transformers
print(transformers.utils.is_torch_available())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("False", "")
