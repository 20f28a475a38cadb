"""Pairs of answers, and the same for TRL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.chats import WORDS


def preferences(rows: int, *, seed: int = 7) -> list[dict[str, str]]:
    """So many; the two answers differ in length, and the chosen one always begins with the same word."""
    random = np.random.default_rng(seed)

    def words(least: int, most: int) -> str:
        return " ".join(random.choice(WORDS, random.integers(least, most)))

    return [{"prompt": words(1, 6), "chosen": f"dog {words(1, 5)}", "rejected": words(2, 8)} for _ in range(rows)]


def write_preferences(path: Path, rows: int, *, seed: int = 7) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in preferences(rows, seed=seed)))
    return path


def labelled(rows: int, *, seed: int = 7) -> list[dict[str, Any]]:
    """So many answers; those of two rows in three are desirable, and begin with the same word."""
    return [
        {
            "prompt": pair["prompt"],
            "completion": pair["rejected" if index % 3 == 1 else "chosen"],
            "label": index % 3 != 1,
        }
        for index, pair in enumerate(preferences(rows, seed=seed))
    ]


def as_trl_texts(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same as texts for TRL, in which the chat template of the tests stands already, up to the token that ends an answer."""
    return [
        {
            "prompt": f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n",
            "chosen": f"{row['chosen']}<|im_end|>",
            "rejected": f"{row['rejected']}<|im_end|>",
        }
        for row in rows
    ]
