"""A model card says what a run is made of and how it did, to anyone: no row, no path, and no name that does anything."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.convert.base_info import BaseInfo
from mlx_sft.convert.model_card import DataSummary, Published, RunResult, RunSummary, model_card, read_run_summary
from mlx_sft.files import to_json
from mlx_sft.run_folder import RunFolder
from tests.chosen import without_adapter

NUMBERS = {"rows": 12, "kept": 9, "truncated": 2, "dropped": 2, "bad": 1}

SUMMARY = RunSummary(
    config=TrainConfig(data="chats.jsonl", rank=8, alpha=16, seed=7),
    base=BaseInfo("Qwen/Qwen3-0.6B", True, "c" * 40, "qwen3", {"license": "apache-2.0"}),
    data=DataSummary.model_validate(
        {
            "totals": NUMBERS,
            "train": {"rows": 8, "tokens": 4321, "supervised_tokens": 1234},
            "valid": {"rows": 1, "tokens": 55, "supervised_tokens": 20},
            "sources": [
                {"name": "/home/jane/secret/chats.jsonl", "rows": 8},
                {"name": "hf:ours/rows:train", "rows": 4},
            ],
        }
    ),
    result=RunResult(40, 2.0, 30, 1.5, None),
    versions={"mlx-sft": "0.1.0", "mlx": "0.32.4"},
)

MERGED = Published("me/model", merged=True)
ADAPTER = Published("me/model", merged=False, mlx_lm="mlx-lm")


def parts(card: str) -> tuple[dict[str, Any], str]:
    """The metadata of a card, and its text."""
    before, metadata, text = card.split("---\n", 2)
    assert before == ""
    return yaml.safe_load(metadata), text


def card_of(settings: dict[str, Any], **further: Any) -> tuple[dict[str, Any], str]:
    """Those of a run's card."""
    return parts((train(TrainConfig(**settings | further)).run_dir / "README.md").read_text())


def base_named(base: Path, folder: Path) -> str:
    """A copy of a checkpoint with another name."""
    shutil.copytree(base, folder)
    return str(folder)


@pytest.fixture
def run(train_once: Callable[..., Path], settings: dict[str, Any]) -> RunFolder:
    """A finished run with validation."""
    return RunFolder(shutil.copytree(train_once(valid_fraction=0.2), settings["out"]))


def edit(file: Path, **changes: Any) -> None:
    file.write_text(to_json(json.loads(file.read_text()) | changes))


# --- of a run -------------------------------------------------------------------------------------------------------------------


def test_a_card_says_what_it_is_made_of_and_how_it_did(settings: dict[str, Any]) -> None:
    metadata, text = card_of(settings, valid_fraction=0.2)
    assert metadata == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["mlx-sft", "sft", "lora"],
    }
    run = Path(settings["out"])
    report = json.loads((run / "data_report.json").read_text())["train"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = [line for line in lines if line["kind"] == "evaluation"][-1]
    assert best["best"]
    for part in (
        "| Architecture | `qwen3` |",
        "| Method | LoRA, rank 2, alpha 32, on `all-linear` |",
        "| Objective | supervised fine-tuning |",
        "4 steps of 4 examples, 2 epochs",
        f"8 examples, {report['tokens']} tokens, {report['supervised_tokens']} of them supervised",
        "10 read: 10 kept",
        "`chats.jsonl` (rows: 10)",
        f"| Training loss | {lines[-2]['loss']:.4f} |",
        f"| Validation loss | {best['loss']:.4f}, of the best evaluation |",
        f"| Validation perplexity | {best['perplexity']:.4g} |",
        "| Taken after step | 4 of 4 |",
        "mlx-sft export . --out merged",
    ):
        assert part in text
    assert "| | |\n|---|---|\n" in text, "the table is no table"


def test_a_card_of_a_full_run_is_for_transformers(settings: dict[str, Any]) -> None:
    metadata, text = card_of(without_adapter(settings), method="full", max_steps=1)
    assert metadata["library_name"] == "transformers"
    assert "| Method | every weight |" in text
    assert "Validation" not in text


def test_a_card_holds_no_row_of_the_data_and_no_path(settings: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "private.jsonl"
    secret = "hunter2"
    data.write_text(json.dumps({"prompt": secret, "completion": secret}) + "\n")
    _, text = card_of(settings, data=str(data), max_steps=1)
    assert secret not in text
    assert str(tmp_path) not in text
    assert str(Path(settings["model"]).parent) not in text
    assert "`private.jsonl` (rows: 1)" in text


# --- of what is published ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("published", "relation", "library"), [(MERGED, "finetune", "transformers"), (ADAPTER, "adapter", "peft")]
)
def test_the_hub_is_told_what_it_is(published: Published, relation: str, library: str) -> None:
    metadata, text = parts(model_card(SUMMARY, published))
    assert metadata == {
        "base_model": "Qwen/Qwen3-0.6B",
        "base_model_relation": relation,
        "license": "apache-2.0",
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["mlx-sft", "sft", "lora"],
        "datasets": ["ours/rows"],
    }
    assert text.startswith("\n# me/model\n")
    assert f"`{'c' * 40}`" in text
    assert "`chats.jsonl` (rows: 8), `hf:ours/rows:train` (rows: 4)" in text
    assert "12 read: 9 kept (2 of them truncated), 2 dropped, 1 that could not be used" in text
    assert "`mlx-sft 0.1.0`, `mlx 0.32.4`" in text
    assert "jane" not in text


def test_a_base_that_is_not_on_the_hub_is_no_metadata() -> None:
    summary = replace(SUMMARY, base=BaseInfo("my-model", False, None, None, {}))
    metadata, text = parts(model_card(summary, ADAPTER))
    assert not metadata.keys() & {"base_model", "base_model_relation", "license"}
    assert "`my-model`" in text
    assert "path/to/the/base" in text
    assert "| Licence of the base | not known; see the base model |" in text


def test_many_sources_are_counted() -> None:
    sources = [{"name": f"{number}.jsonl", "rows": 1} for number in range(1500)]
    data = DataSummary.model_validate(SUMMARY.data.model_dump() | {"sources": sources})
    _, text = parts(model_card(replace(SUMMARY, data=data), MERGED))
    assert "`19.jsonl` (rows: 1), and 1,480 more |" in text


def test_an_adapter_without_files_for_mlx_lm_does_not_speak_of_them() -> None:
    assert "mlx_lm" not in model_card(SUMMARY, replace(ADAPTER, mlx_lm=""))
    assert "mlx_lm" in model_card(SUMMARY, ADAPTER)


# --- names that would do something --------------------------------------------------------------------------------------------------

HOSTILE = (
    "x`` ` | <script>alert(1)</script> <img src=x> ![](http://e.vil/p.png) [a](http://e.vil)\x1b[31m\u202e\n\n# y ---"
)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    summary = replace(
        SUMMARY,
        config=TrainConfig(data="x", target=[HOSTILE, "q_proj"]),
        base=BaseInfo(HOSTILE, False, None, HOSTILE, {}),
        data=DataSummary.model_validate(SUMMARY.data.model_dump() | {"sources": [{"name": HOSTILE, "rows": 1}]}),
        versions={HOSTILE: HOSTILE},
    )
    for published in (None, MERGED, ADAPTER):
        card = model_card(summary, published)
        assert card.replace("\n", "").isprintable()
        metadata, text = parts(card)
        assert metadata["tags"] == ["mlx-sft", "sft", "lora"]
        page = markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
        for tag in ("<script", "<img", "<a ", "<hr"):
            assert tag not in page
        assert page.count("<h1>") == 1
        assert page.count("<table>") == 4
        assert "&lt;script&gt;" in page


def test_a_run_of_hostile_names_has_a_card(
    settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    hostile = re.sub(r"[/\[\]]", "", HOSTILE)  # mlx-lm takes brackets in a folder's name for a pattern
    data = tmp_path / f"{hostile}.jsonl"
    shutil.copyfile(settings["data"], data)
    model = base_named(make_base("qwen3", tied=True), tmp_path / hostile)
    _, text = card_of(settings, data=str(data), model=model, max_steps=1)
    assert "\x1b" not in text
    assert "\\x1b31m" in text
    assert str(tmp_path) not in text


# --- what is read of the data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "public", "dataset"),
    [
        ("/home/jane/rows/chats.jsonl", "chats.jsonl", None),
        ("chats.jsonl", "chats.jsonl", None),
        ("hf:owner/rows", "hf:owner/rows", "owner/rows"),
        ("hf:owner/rows/en:train", "hf:owner/rows/en:train", "owner/rows"),
        ("hf:owner", "hf:owner", None),
        ("hf:o wner/x`y", "hf:o wner/x`y", None),
        ("\udcff.jsonl", "\udcff.jsonl", None),
    ],
)
def test_a_source_is_known_by_its_name_without_its_folder(
    run: RunFolder, name: str, public: str, dataset: str | None
) -> None:
    report = json.loads(run.data_report.read_text())
    run.data_report.write_text(json.dumps(report | {"sources": [{"name": name, "rows": 3}]}))
    (source,) = read_run_summary(run).data.sources
    assert (source.public_name, source.dataset) == (public, dataset)


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"totals": {"rows": 1}}, "totals.kept"),
        ({"train": None}, "train"),
        ({"train": {"rows": "8`", "tokens": 1, "supervised_tokens": 1}}, "train.rows"),
        ({"train": {"rows": -1, "tokens": 1, "supervised_tokens": 1}}, "train.rows"),
        ({"train": {"rows": True, "tokens": 1, "supervised_tokens": 1}}, "train.rows"),
        ({"sources": [{"name": ["x"], "rows": 1}]}, "sources.0.name"),
        ({"sources": "x"}, "sources"),
    ],
)
def test_numbers_that_are_none_are_refused(run: RunFolder, changes: dict[str, Any], place: str) -> None:
    edit(run.data_report, **changes)
    with pytest.raises(UserError, match=f"^{run.data_report}: {place} is not what a run writes there") as caught:
        read_run_summary(run)
    assert caught.value.where == str(run.data_report)


def test_a_file_that_is_missing_is_named(run: RunFolder) -> None:
    run.metrics.unlink()
    with pytest.raises(UserError, match="cannot read") as caught:
        read_run_summary(run)
    assert caught.value.where == str(run.metrics)


# --- how it did -----------------------------------------------------------------------------------------------------------------


def lines(run: RunFolder, *records: dict[str, Any] | str) -> RunSummary:
    run.metrics.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return read_run_summary(run)


def trained(step: int, loss: float | None) -> dict[str, Any]:
    return {"kind": "train", "step": step, "epoch": step / 4, "loss": loss}


def evaluated(step: int, loss: float | None, *, best: bool) -> dict[str, Any]:
    return {"kind": "evaluation", "step": step, "epoch": step / 4, "loss": loss, "perplexity": 2.0, "best": best}


def test_the_result_is_of_the_best_evaluation(run: RunFolder) -> None:
    result = lines(
        run, trained(1, 3.0), evaluated(1, 2.5, best=True), trained(2, 2.0), evaluated(2, 2.6, best=False)
    ).result
    assert (result.steps, result.epochs, result.step, result.loss) == (2, 0.5, 1, 3.0)
    assert result.evaluation is not None
    assert result.evaluation.loss == 2.5


def test_without_validation_it_is_of_the_last_step(run: RunFolder) -> None:
    result = lines(run, trained(1, 3.0), trained(2, 2.0), {"kind": "rollback", "step": 1}, trained(3, None)).result
    assert (result.steps, result.step, result.loss, result.evaluation) == (3, 3, 2.0, None)


def test_lines_that_are_none_are_passed_over(run: RunFolder) -> None:
    hostile = {"kind": "train", "step": "9", "loss": "<script>"}
    result = lines(run, trained(1, 3.0), "{", "\x00", hostile, '{"kind": "train", "loss": 1e999}').result
    assert (result.steps, result.loss) == (1, 3.0)


def test_versions_are_those_with_which_the_run_began(run: RunFolder) -> None:
    edit(run.environment, packages={"mlx": "0.99", "x": 3}, identity=None)
    assert read_run_summary(run).versions == {"mlx": "0.99"}
