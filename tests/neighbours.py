"""What may lie beside the project and is no part of it: real rows, and a real tokenizer.

They are looked for in $MLX_SFT_SHARED, else in `shared` beside the checkout. A clone has neither, and the tests that want
them are skipped there. Nothing else in the repository knows of that folder (`tests/test_repository.py` sees to it): a test
takes the fixture `neighbour`, which also gives it the marker `neighbours`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "MLX_SFT_SHARED"


def find_neighbour(name: str) -> Path:
    """The file or folder `name` beside the project; skips the test where there is none."""
    named = os.environ.get(VARIABLE)
    folder = Path(named) if named else Path(__file__).parents[1].with_name("shared")
    path = folder / name
    if not path.exists():
        pytest.skip(f"{name} is not in {folder} ({VARIABLE} names another folder)")
    return path
