from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_sft import short_answers
from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Example
from mlx_sft.generate import generate_text
from mlx_sft.model.load import load_model
from mlx_sft.short_answers import f1
from tests.chats import write_chats


@pytest.mark.parametrize(
    ("said", "expected", "found"),
    [
        ("The Eiffel Tower, in Paris!", "eiffel tower", 2 / 3),
        ("Paris", "paris.", 1.0),
        ("another theory", "a theory", 2 / 3),
        ("no no", "no", 2 / 3),
        ("Rome", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("the", "a.", 1.0),
    ],
)
def test_f1_is_squads(said: str, expected: str, found: float) -> None:
    assert f1(said, expected) == pytest.approx(found)


def test_the_model_writes_the_answers_that_are_measured(tmp_path: Path, cli: Callable[..., Any]) -> None:
    """Of one row the answer is what the model begins with, of one it is another, and two are not short answers."""
    said = generate_text(load_model("tiny"), "the cat", max_tokens=short_answers.MOST_TOKENS)
    own = " ".join(said.split()[:4])
    answers = [own, "quite otherwise", "the cat " * 40]
    rows = [[("user", "the cat"), ("assistant", text)] for text in answers]
    rows.append([("user", "the"), ("assistant", "cat"), ("user", "the"), ("assistant", "dog")])
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(
            json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}) + "\n" for row in rows
        )
    )
    asked = ["eval", "--model", "tiny", "--data", file, "--generate"]
    record = json.loads(cli(*asked, "--json").stdout)
    expected = [f1(said, own), f1(said, "quite otherwise")]
    assert expected[0] > expected[1]
    assert (record["f1"], record["short_answers"]) == (pytest.approx(np.mean(expected)), 2)
    further = write_chats(tmp_path / "two.jsonl", 2, seed=1, turns=2)
    table = cli(*asked, "--data", further).stdout.splitlines()
    assert f"{np.mean(expected):.1%} of 2" in table[1]
    assert "  -  " in table[3]
    nothing = cli("eval", "--model", "tiny", "--data", further, "--generate")
    assert "F1" not in nothing.stdout
    assert "no row has one answer of at most 32 tokens" in nothing.stderr


def test_at_most_so_many_rows_are_spread_over_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.array([0, 0, 1], np.float32)
    examples = Examples.of([Example(f"{n}", np.array([n, 1, 2], np.int32), weights) for n in range(9)])
    monkeypatch.setattr(short_answers, "MOST_ROWS", 3)
    monkeypatch.setattr(short_answers, "_answered", lambda loaded, example: float(example.token_ids[0]))
    assert short_answers.answered(None, examples) == [0, 4, 8]
