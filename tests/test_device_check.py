"""The questions of `doctor --device` are asked and answered on any device; how fast it is, is for nobody to say here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_sft import device_check
from mlx_sft.cli import main


def test_every_question_is_answered_as_expected_on_a_cpu(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    result = CliRunner().invoke(main, ["doctor", "--device", "--small", "--report", str(page)])
    assert result.exit_code == 0, result.output
    answers = {record["question"]: record for record in map(json.loads, result.stdout.splitlines())}
    assert len(answers) >= 13
    fields = {"question", "expected", "found", "as_expected", "figures", "seconds"}
    assert all(set(record) == fields for record in answers.values())
    for question, record in answers.items():
        assert f"| {question} | {record['expected']} | {record['found']} |" in page.read_text()
    del answers["what does a micro-step cost"]  # a matter of speed
    assert [name for name, record in answers.items() if not record["as_expected"]] == []
    ways = answers["are gradients right"]["figures"]
    assert {name.partition(",")[0] for name in ways} == {"float32", "bfloat16"}
    assert any("8 bits" in name for name in ways)
    assert any("compiled" in name for name in ways)


def test_a_question_that_fails_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(small: bool) -> device_check.Answer:
        raise RuntimeError("[METAL] Command buffer execution failed")

    def answers(small: bool) -> device_check.Answer:
        return "well", True, {}

    monkeypatch.setattr(device_check, "QUESTIONS", (("first", "-", fails), ("second", "-", answers)))
    _, first, second = device_check.device_check()
    assert not first.as_expected
    assert "Command buffer" in first.found
    assert second.found == "well"
    page = device_check.report([first, second])
    assert "2 questions, 1 answered otherwise than expected" in page
    assert "| **no** | first |" in page
    assert "| yes | second | - | well |" in page
