"""Broken inputs by the thousand, in processes that are watched: one that hangs, or whose interpreter ends, is named too.

Knows nothing of what is parsed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

from mlx_sft.errors import UserError
from tests.fuzz.guard import guarded
from tests.fuzz.parser import Materials, Parser, Wrong, write

LONGEST = 5.0
"""Seconds of computing that one input may take."""
LONGEST_WAIT = 60.0
"""Seconds that it may take in all: it may wait for another program's turn."""
MOST_MEMORY = 6 << 30
"""Bytes of address space that a process may take besides what it begins with."""

_LEFT = 8
"""Inputs that are kept of each bug."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an input.

    Attributes:
        fate: `read`, `refused`, or `failed`.
        problem: Of a failed one, in a line that is the same for the same bug; `details` is all of it.
    """

    number: int
    fate: str
    problem: str = ""
    details: str = ""


def try_input(parser: Parser, number: int, seed: int, materials: Materials, work: Path) -> Outcome:
    """Make an input and have it parsed, in a folder of its own beneath `work`."""
    folder = work / f"{parser.name}-{number}-of-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    write(parser.make(random.Random(f"{seed}/{parser.name}/{number}"), materials), folder)
    os.chdir(work)
    fate, problem, details = "read", "", ""
    with guarded([folder, materials.folder / "cache"]) as outside:
        try:
            parser.attempt(folder, materials)
        except UserError as error:
            fate = "refused"
            if not error.what.strip():
                fate, problem = "failed", "an error without words"
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 (whatever it is, it is a bug: compiled code raises what is no Exception)
            fate, problem, details = "failed", _signature(error), "".join(traceback.format_exception(error))
    os.chdir(work)
    if outside:
        fate, problem, details = "failed", f"outside of its folder: {outside[0].partition(' ')[0]}", "\n".join(outside)
    return Outcome(number, fate, problem, details)


def _signature(error: BaseException) -> str:
    """The exception and its place in the product, or in the parser's check where it is that which raises."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/mlx_sft/" in frame.filename] or list(frames)
    place = own[-1]
    file = place.filename.partition("/mlx_sft/")[2] or Path(place.filename).name
    what = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
    first = (what.splitlines() or [""])[0][:160]
    return f"{first}  ({file}:{place.lineno} {place.name})"


def bug(outcome: Outcome) -> str:
    """By what bugs are told apart: the kind of exception and its place."""
    what, _, place = outcome.problem.rpartition("  (")
    return f"{what.partition(':')[0]} ({place}" if place else outcome.problem


# The processes


@dataclass(slots=True)
class _Worker:
    process: Any
    connection: Connection
    numbers: list[int]
    began: float = 0.0
    computed: float = 0.0
    current: int | None = None


@dataclass
class Fuzzing:
    """The inputs of one parser.

    Args:
        folder: Where processes work, and failed inputs are kept.
        find: A name of what has the parsers, for the processes: `tests.fuzz.parsers`.
    """

    parser: str
    seed: int
    materials: Materials
    folder: Path
    find: str = "tests.fuzz.parsers"
    longest: float = LONGEST
    _workers: list[_Worker] = field(default_factory=list)

    def run(self, numbers: Sequence[int], workers: int) -> Iterator[Outcome]:
        """The outcome of each input, as they come."""
        for share in range(workers):
            if part := list(numbers[share::workers]):
                self._start(part)
        while self._workers:
            ready = wait([worker.connection for worker in self._workers], timeout=1.0)
            for worker in list(self._workers):
                outcome = self._heard(worker) if worker.connection in ready else self._overdue(worker)
                if outcome is not None:
                    yield outcome

    def _start(self, numbers: list[int]) -> None:
        context = _context()
        here, there = context.Pipe()
        work = self.folder / "work"
        arguments = (there, self.find, self.parser, numbers, self.seed, self.materials.folder, work)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        there.close()
        self._workers.append(_Worker(process, here, numbers))

    def _heard(self, worker: _Worker) -> Outcome | None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            return self._ended(worker)
        if isinstance(message, int):
            worker.current, worker.began = message, time.monotonic()
            worker.computed = _computed(worker.process.pid)
            return None
        worker.current = None
        worker.numbers.remove(message.number)
        return message if isinstance(message, Outcome) else None

    def _ended(self, worker: _Worker) -> Outcome | None:
        """A process is at its end, or its interpreter was ended."""
        worker.process.join()
        self._workers.remove(worker)
        if worker.current is None:
            return None
        return self._lost(worker, f"the interpreter ended with {worker.process.exitcode}")

    def _overdue(self, worker: _Worker) -> Outcome | None:
        if worker.current is None:
            return None
        waited = time.monotonic() - worker.began
        if _computed(worker.process.pid) - worker.computed < self.longest and waited < LONGEST_WAIT:
            return None
        worker.process.kill()
        worker.process.join()
        self._workers.remove(worker)
        return self._lost(worker, f"it takes more than {self.longest:g} s")

    def _lost(self, worker: _Worker, problem: str) -> Outcome:
        assert worker.current is not None
        worker.numbers.remove(worker.current)
        if worker.numbers:
            self._start(worker.numbers)
        return Outcome(worker.current, "failed", problem)


def _computed(pid: int) -> float:
    with suppress(psutil.NoSuchProcess):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return 0.0


def _context() -> Any:
    if sys.platform == "darwin":  # where Metal does not survive a fork
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.fuzz.parsers", "tests.fuzz.runner"])
    return context


def _serve(
    connection: Connection, find: str, name: str, numbers: list[int], seed: int, materials: Path, work: Path
) -> None:
    """In a process: parse the inputs of these numbers, telling the number of each before and its outcome after it."""
    from importlib import import_module

    sys.dont_write_bytecode = True
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    parsers: Mapping[str, Parser] = import_module(find).PARSERS
    limit = psutil.Process().memory_info().vms + MOST_MEMORY
    with suppress(ValueError, OSError):  # not on every system
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    work.mkdir(parents=True, exist_ok=True)
    platform.platform()  # which asks a program the first time
    good = Materials(materials)
    for number in numbers:
        tempfile.tempdir = str(work / f"{name}-{number}-of-{seed}")
        connection.send(number)
        outcome = try_input(parsers[name], number, seed, good, work)
        if outcome.fate != "failed":
            shutil.rmtree(tempfile.tempdir, ignore_errors=True)
        connection.send(outcome)


# The report


def report(fuzzing: Fuzzing, workers: int, numbers: Sequence[int]) -> bool:
    """Try, and print how many were parsed as they should be, and each bug once; whether there was none."""
    started = time.monotonic()
    outcomes = list(fuzzing.run(numbers, workers))
    fates = {fate: sum(outcome.fate == fate for outcome in outcomes) for fate in ("read", "refused", "failed")}
    good, seconds = fates["read"] + fates["refused"], time.monotonic() - started
    print(
        f"{fuzzing.parser} {good}/{len(outcomes)}  ({fates['refused']} refused, {fates['read']} read; {seconds:.0f} s)",
        flush=True,
    )
    bugs: dict[str, list[Outcome]] = {}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.number):
        if outcome.fate == "failed":
            bugs.setdefault(bug(outcome), []).append(outcome)
    for failed in sorted(bugs.values(), key=len, reverse=True):
        print(f"  {len(failed)} × {failed[0].problem}")
        for outcome in failed[:_LEFT]:
            _keep(fuzzing, outcome)
        numbers_shown = ", ".join(str(outcome.number) for outcome in failed[:_LEFT])
        print(f"      number {numbers_shown} of seed {fuzzing.seed}; kept in {fuzzing.folder / 'failed'}")
        print(
            f'      once more: make fuzz ARGS="--seed {fuzzing.seed} --only {fuzzing.parser}:{failed[0].number}"',
            flush=True,
        )
    shutil.rmtree(fuzzing.folder / "work", ignore_errors=True)
    return not bugs


def _keep(fuzzing: Fuzzing, outcome: Outcome) -> None:
    """The input that failed, and what came of it."""
    name = f"{fuzzing.parser}-{outcome.number}-of-{fuzzing.seed}"
    kept = fuzzing.folder / "failed" / name
    shutil.rmtree(kept, ignore_errors=True)
    with suppress(FileNotFoundError):
        shutil.move(fuzzing.folder / "work" / name, kept)
        (kept / "failure.json").write_text(
            json.dumps({"problem": outcome.problem, "details": outcome.details}, indent=1)
        )
