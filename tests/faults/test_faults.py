"""Each kind of fault in a few trials, all of them at calls and none at a time; `make faults` has hundreds.

The numbers are of a seed that stays, and one trial more is of a seed that nobody knows, which a failure names.
"""

from __future__ import annotations

import time

import pytest

from tests.faults.harness import try_once
from tests.faults.trial import Lab

pytestmark = pytest.mark.faults

QUICK = {
    "kill": 5,
    "power": 4,
    "disk": 4,
    "export": 4,
    "damage": 3,
    "moved": 2,
    "links": 1,
    "read-only": 2,
    "clock": 2,
    "two": 1,
    "stop": 1,
    "streams": 4,
    "unread": 3,
}


@pytest.mark.parametrize("kind", QUICK)
def test_a_run_survives(kind: str, lab: Lab) -> None:
    another = time.time_ns() % 10**6
    for seed, number in [*((0, number) for number in range(1, QUICK[kind] + 1)), (another, 1)]:
        result = try_once(lab, kind, number, seed, timed=False)
        assert not result.problem, f'make faults ARGS="--seed {seed} --only {kind}:{number}" in {result.folder}'
