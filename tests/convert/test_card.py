from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from mlx_sft import TrainConfig, train


def card_of(settings: dict[str, Any], **further: Any) -> tuple[dict[str, Any], str]:
    """The metadata of a run's card, and its text."""
    run = train(TrainConfig(**settings | further)).run_dir
    _, metadata, text = (run / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(metadata), text


def test_a_card_says_what_it_is_made_of_and_how_it_did(settings: dict[str, Any]) -> None:
    metadata, text = card_of(settings, valid_fraction=0.2)
    assert metadata == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "sft", "lora"],
    }
    report = json.loads((Path(settings["out"]) / "data_report.json").read_text())["train"]
    for part in ("(qwen3)", "rank 2, alpha 32, on all-linear", "4 of 4 conversations", "at step 4, the best"):
        assert part in text
    assert f"8, {report['tokens']} tokens, {report['supervised_tokens']} of them supervised" in text
    assert "| | |\n|---|---|\n" in text, "the table is no table"


def test_a_card_of_a_full_run_is_for_transformers(settings: dict[str, Any]) -> None:
    metadata, text = card_of(settings, method="full", max_steps=1)
    assert metadata["library_name"] == "transformers"
    assert "| Method | every weight |" in text
    assert "| Validation | none |" in text


def test_a_card_holds_no_row_of_the_data(settings: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "private.jsonl"
    secret = "hunter2"
    data.write_text(json.dumps({"prompt": secret, "completion": secret}) + "\n")
    _, text = card_of(settings, data=str(data), max_steps=1)
    assert secret not in text
