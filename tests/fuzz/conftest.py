from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.trial import ENVIRONMENT, make_lab
from tests.fuzz.parser import Materials


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Materials]:
    """The good inputs that broken ones are made of."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield Materials(make_lab(tmp_path_factory.mktemp("fuzz").resolve() / "lab", ["lora"]).folder)
