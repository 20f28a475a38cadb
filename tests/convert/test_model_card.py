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

from mlx_sft import TrainConfig, train
from mlx_sft.convert.base_info import Base, Data, Facts, Outcome
from mlx_sft.convert.model_card import Published, model_card

NUMBERS = {"rows": 12, "kept": 9, "truncated": 2, "dropped": 2, "bad": 1}

FACTS = Facts(
    config=TrainConfig(data="chats.jsonl", rank=8, alpha=16, seed=7),
    base=Base("Qwen/Qwen3-0.6B", True, "c" * 40, "qwen3", {"license": "apache-2.0"}),
    data=Data.model_validate(
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
    outcome=Outcome(40, 2.0, 30, 1.5, None),
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
        "4 steps of 4 examples, 2 epochs",
        f"8 examples, {report['tokens']} tokens, {report['supervised_tokens']} of them supervised",
        "10 read: 10 kept",
        "`chats.jsonl` (rows: 10)",
        f"| Training loss | {lines[-2]['loss']:.4f} |",
        f"| Validation loss | {best['loss']:.4f}, the lowest |",
        f"| Validation perplexity | {best['perplexity']:.4g} |",
        "| Taken after step | 4 of 4 |",
        "mlx-sft export --run .",
    ):
        assert part in text
    assert "| | |\n|---|---|\n" in text, "the table is no table"


def test_a_card_of_a_full_run_is_for_transformers(settings: dict[str, Any]) -> None:
    metadata, text = card_of(settings, method="full", max_steps=1)
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
    metadata, text = parts(model_card(FACTS, published))
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
    facts = replace(FACTS, base=Base("my-model", False, None, None, {}))
    metadata, text = parts(model_card(facts, ADAPTER))
    assert not metadata.keys() & {"base_model", "base_model_relation", "license"}
    assert "`my-model`" in text
    assert "path/to/the/base" in text
    assert "| Licence of the base | not known; see the base model |" in text


def test_many_sources_are_counted() -> None:
    sources = [{"name": f"{number}.jsonl", "rows": 1} for number in range(1500)]
    data = Data.model_validate(FACTS.data.model_dump() | {"sources": sources})
    _, text = parts(model_card(replace(FACTS, data=data), MERGED))
    assert "`19.jsonl` (rows: 1), and 1,480 more |" in text


def test_an_adapter_without_files_for_mlx_lm_does_not_speak_of_them() -> None:
    assert "mlx_lm" not in model_card(FACTS, replace(ADAPTER, mlx_lm=""))
    assert "mlx_lm" in model_card(FACTS, ADAPTER)


# --- names that would do something --------------------------------------------------------------------------------------------------

HOSTILE = (
    "x`` ` | <script>alert(1)</script> <img src=x> ![](http://e.vil/p.png) [a](http://e.vil)\x1b[31m\u202e\n\n# y ---"
)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    markdown_it = pytest.importorskip("markdown_it")
    facts = replace(
        FACTS,
        config=TrainConfig(data="x", target=[HOSTILE, "q_proj"]),
        base=Base(HOSTILE, False, None, HOSTILE, {}),
        data=Data.model_validate(FACTS.data.model_dump() | {"sources": [{"name": HOSTILE, "rows": 1}]}),
        versions={HOSTILE: HOSTILE},
    )
    for published in (None, MERGED, ADAPTER):
        card = model_card(facts, published)
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
