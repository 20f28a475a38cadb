"""A run on pairs, from a file of them to what it says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, train


def test_a_run_shows_both_answers_and_counts_pairs(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"the cat {number}", "chosen": "sat", "rejected": "the mat"} for number in range(5)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = settings | {"data": str(data), "objective": "dpo", "batch_size": 2, "epochs": 1, "quiet": False}
    result = train(TrainConfig(**given))
    assert result.steps == 3, "two pairs a step"
    shown = capsys.readouterr().err
    assert f"{data}:1, answer 1, with what will be trained on" in shown
    assert f"{data}:1, answer 2, with what will be trained on" in shown
    assert shown.count("⟦") == 2
    assert "5 to train on, 0 held out" in shown
    report = json.loads((result.run_dir / "data_report.json").read_text())
    assert (report["train"]["pairs"], report["train"]["rows"], report["totals"]["kept"]) == (5, 10, 5)
