"""Some hundreds of broken inputs, the same ones each time: each is refused in words, or read as a plain reader would read it.

`make fuzz` looks further.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.parser import Materials
from tests.fuzz.parsers import PARSERS
from tests.fuzz.runner import Fuzzing

QUICK = {
    "config": 60,
    "options": 30,
    "data": 80,
    "tokens": 30,
    "safetensors": 80,
    "adapter": 60,
    "model": 40,
    "folder": 25,
    "tokenizer": 20,
    "checkpoint": 40,
    "run": 6,
}


@pytest.mark.parametrize("name", PARSERS)
def test_a_broken_input_is_refused_in_words_or_read_as_what_it_is(
    name: str, materials: Materials, tmp_path: Path
) -> None:
    fuzzing = Fuzzing(name, 0, materials, tmp_path)
    failed = [outcome for outcome in fuzzing.run(range(1, QUICK[name] + 1), workers=1) if outcome.fate == "failed"]
    assert not [f'make fuzz ARGS="--seed 0 --only {name}:{one.number}": {one.problem}' for one in failed]


@pytest.mark.parametrize("name", PARSERS)
def test_a_seed_makes_the_same_input_again(name: str, materials: Materials) -> None:
    made = [PARSERS[name].make(random.Random(f"7/{name}/{number}"), materials) for number in (1, 1, 2)]
    assert made[0] == made[1] != made[2]
