"""An objective that compares, for tests of the data that it is given and not of what it computes: `dpo`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

from mlx_sft.objectives.sft import SFT
from mlx_sft.registry import OBJECTIVES


class Comparing(SFT):
    """Compares nothing, and is given what is to be compared."""

    name: ClassVar = "dpo"
    compares: ClassVar = True


@pytest.fixture(scope="module", autouse=True)
def _dpo() -> Iterator[None]:
    """For a module of tests to import."""
    if "dpo" in OBJECTIVES:
        yield
        return
    with OBJECTIVES.registered("dpo", Comparing):
        yield
