"""Short conversations of random words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

WORDS = ("the", "cat", "sat", "on", "the", "mat", "and", "the", "dog")


def write_chats(path: Path, rows: int, *, seed: int, turns: int = 1, words: Sequence[str] = WORDS) -> Path:
    """So many, one a line, each of so many questions and answers of one to six words."""
    random = np.random.default_rng(seed)
    with path.open("w") as file:
        for _ in range(rows):
            said = [" ".join(random.choice(words, random.integers(1, 7))) for _ in range(2 * turns)]
            roles = ["user", "assistant"] * turns
            messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path
