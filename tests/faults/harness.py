"""Trials of every kind, two at a time, and what came of them.

Knows nothing of what a trial does.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.faults.injected import Fault
from tests.faults.kinds import KINDS
from tests.faults.trial import ENVIRONMENT, Lab, NotSurvived, Trial


@dataclass(frozen=True, slots=True)
class Result:
    """Of one trial.

    Attributes:
        problem: What should not have come of it; empty where it survived.
        folder: What is left of it, where it did not.
    """

    kind: str
    number: int
    problem: str
    folder: Path

    @property
    def survived(self) -> bool:
        return not self.problem


def set_environment() -> None:
    """For this process and those that it starts."""
    os.environ.update(ENVIRONMENT)


def folder_of(lab: Lab, kind: str, number: int, seed: int) -> Path:
    return lab.folder / "trials" / f"{kind}-{number}-of-{seed}"


def try_once(
    lab: Lab, kind: str, number: int, seed: int, *, always: Sequence[Fault] = (), timed: bool = True
) -> Result:
    """Trial `number` of a kind; the seed decides over all that is chosen in it. `always` and `timed` are the trial's."""
    folder = folder_of(lab, kind, number, seed)
    shutil.rmtree(folder, ignore_errors=True)  # of the same trial before
    trial = Trial(lab, folder, random.Random(f"{seed}/{kind}/{number}"), tuple(always), timed)
    problem = ""
    try:
        KINDS[kind].try_once(trial)
    except (NotSurvived, TimeoutError) as error:
        problem = str(error)
    if not problem:
        shutil.rmtree(folder)
    return Result(kind, number, problem, folder)


@contextmanager
def workers(number: int) -> Iterator[Executor]:
    """Processes that trials run in, so many at a time; none is forked from this one."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(number, mp_context=context) as pool:
        yield pool


def try_all(lab: Lab, kind: str, numbers: Iterable[int], seed: int, pool: Executor) -> Iterator[Result]:
    """Trials of a kind, as they end; one that breaks the harness itself has not survived."""
    started = {pool.submit(try_once, lab, kind, number, seed): number for number in numbers}
    for future in as_completed(started):
        number = started[future]
        if error := future.exception():
            problem = "the harness fails: " + "".join(traceback.format_exception(error))
            yield Result(kind, number, problem, folder_of(lab, kind, number, seed))
        else:
            yield future.result()


def report(lab: Lab, kind: str, numbers: Sequence[int], seed: int, pool: Executor) -> bool:
    """Try, and print how many survived, and of those that did not how to repeat them; whether all survived."""
    started = time.monotonic()
    results = list(try_all(lab, kind, numbers, seed, pool))
    failed = sorted((result for result in results if not result.survived), key=lambda result: result.number)
    seconds = time.monotonic() - started
    print(f"{kind} {len(results) - len(failed)}/{len(results)} survived  ({seconds:.0f} s)", flush=True)
    for result in failed:
        print(f"  {kind} {result.number} of seed {seed}: {result.problem.strip()}")
        print(f"    it is kept in {result.folder}")
        print(f'    once more: make faults ARGS="--seed {seed} --only {kind}:{result.number}"', flush=True)
    return not failed
