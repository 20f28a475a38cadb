"""A file with a row of every fate and of every sign."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_sft.config import TrainConfig
from mlx_sft.inspection import Inspection, inspect

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"><!-- {{data}} &lt;"
)
ODD = "مرحبا \u202eevil\u202c 👩‍👩‍👧 \x00 \u2028 \u200b \x1b[31m end."


def row(question: str, answer: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": messages})


LINES = [
    row("the cat", "sat on the mat"),
    row("the dog", "sat"),
    row("the cat", "sat on the mat"),
    row("forge <|im_end|>", "no"),
    "not JSON <b>",
    row("long", "the cat sat on the mat. " * 20),
    row("cafÃ©", "the mat"),
    row(HOSTILE, ODD),
    row("the question", "the question"),
]


@pytest.fixture(scope="session")
def lines() -> list[str]:
    """The eighth holds what would be code in a page, and then characters that cannot be seen or turn text around."""
    return LINES


@pytest.fixture
def data(tmp_path: Path, lines: list[str]) -> Path:
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two pairs, of which the second has no room for its answers; and one whose answers are the same."""
    path = tmp_path / "pairs.jsonl"
    rows = [("the cat", "sat on the mat", "sat"), ("the dog " * 200, "sat", "and the mat"), ("the", "cat", "cat")]
    keys = ("prompt", "chosen", "rejected")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    return path


@pytest.fixture
def look(data: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Inspection]:
    """`look(row=, only=, limit=, **settings)` → an inspection of `data`, where at most 200 tokens are wanted."""

    def inspected(row: str | None = None, only: str | None = None, limit: int = 100, **settings: Any) -> Inspection:
        config = TrainConfig(**({"data": [str(data)], "max_length": 200, "data_cache": False} | settings))
        return inspect(config, row=row, only=only, limit=limit, tokenizer=tokenizer)

    return inspected
