"""The long run: thousands of steps with evaluations and checkpoints, once left alone and once interrupted again and again.

What it takes of the machine must stay as it was after the first steps, and both must end with the same bytes. Knows nothing of how a run
is computed.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import psutil

from tests.chats import write_chats
from tests.faults.children import Child
from tests.faults.layer import Call, watched
from tests.faults.trial import NotSurvived, check_done, compare
from tests.processes import options_of
from tests.run_folders import outcome

STEPS = 3000
INTERRUPTED = 6
"""Times that the other run is ended and continued."""

_OPTIONS = {
    "model": "tiny",
    "rank": 2,
    "batch_size": 2,
    "dropout": 0.1,
    "valid_fraction": 0.1,
    "samples": 0,  # how many there is time for depends on the machine
    "eval_every": 100,
    "save_every": 50,
    "keep": 1,  # a run that is asked to stop has checkpoints that the other has not
}
_for_life = ExitStack()


@dataclass(frozen=True, slots=True)
class Sample:
    """What a process takes of the machine after a step, memory in bytes."""

    step: int
    active: int
    resident: int
    files: int
    threads: int

    def __str__(self) -> str:
        memory = f"{self.active / 2**20:7.1f} MiB of arrays, {self.resident / 2**20:7.1f} MiB resident"
        return f"step {self.step:5}  {memory}, {self.files} files, {self.threads} threads"


GROWTH = {"active": 2**20, "resident": 24 * 2**20, "files": 0, "threads": 0}
"""Most by which the last sample may exceed the first. A leak of a single float32 array of the smallest adapter matrix (1.5 kB) at every
step would add 3.6 MiB to the arrays over 2,500 steps; what is resident also depends on the C library, which keeps what was freed."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """In a child: a line of JSON in the file `to`, after every so many steps."""

    to: Path
    every: int

    def install(self, folder: Path) -> None:
        _for_life.enter_context(watched(folder, self))

    def before(self, call: Call) -> None:
        pass

    def after(self, call: Call) -> None:
        """A step's line of metrics is written when everything else of it is done."""
        if call.name != "write" or not call.path.endswith("metrics.jsonl"):
            return
        record = _last_line(Path(call.path))
        if record["kind"] == "train" and record["step"] % self.every == 0:
            process = psutil.Process()
            resident, files = process.memory_info().rss, process.num_fds()
            sample = Sample(record["step"], mx.get_active_memory(), resident, files, threading.active_count())
            with self.to.open("a") as file:
                file.write(json.dumps(asdict(sample)) + "\n")


def _last_line(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        file.seek(-min(4096, path.stat().st_size), os.SEEK_END)
        record: dict[str, Any] = json.loads(file.read().splitlines()[-1])
        return record


def soak(folder: Path, steps: int = STEPS) -> bool:
    """Both runs at once; print what they take, and whether memory is flat and the bytes are the same."""
    folder.mkdir(parents=True)
    chats = write_chats(folder / "chats.jsonl", 64, seed=1)
    options = _OPTIONS | {"data": chats, "max_steps": steps}
    every = max(1, steps // 6)
    alone, samples = folder / "alone", folder / "samples"
    first = _child(folder, ["--quiet", *options_of(options | {"out": alone})], Sampling(samples, every))
    problems = []
    try:
        _interrupted(folder, options | {"out": folder / "interrupted"}, steps)
        check_done(first.wait())
        compare(outcome(folder / "interrupted"), outcome(alone), "the interrupted run")
    except NotSurvived as error:
        problems.append(str(error))
    found = [Sample(**json.loads(line)) for line in samples.read_text().splitlines()]
    for sample in found:
        print(sample)
    problems += growth(found)
    for problem in problems:
        print(f"  {problem}")
    print(
        f"soak {'did not survive' if problems else 'survived'}: {steps} steps, interrupted {INTERRUPTED} times",
        flush=True,
    )
    return not problems


def growth(samples: list[Sample]) -> Iterator[str]:
    """What grew beyond `GROWTH`."""
    if len(samples) < 2:
        yield "there are not two samples to compare"
        return
    first, last = samples[0], samples[-1]
    for name in [field.name for field in fields(Sample) if field.name in GROWTH]:
        more = getattr(last, name) - getattr(first, name)
        if more > GROWTH[name]:
            yield f"{name} grew by {more:,} from step {first.step} to {last.step}, where {GROWTH[name]:,} is the most"


def _interrupted(folder: Path, options: dict[str, Any], steps: int) -> None:
    """A run that is ended at `INTERRUPTED` steps that are far from each other, by turns asked to and killed."""
    run: Path = options["out"]
    words = ["--quiet", *options_of(options)]
    chance = random.Random(0)
    for number in range(INTERRUPTED):
        child = _child(folder, words)
        far = int(steps * (number + chance.random()) / INTERRUPTED)
        if child.until(lambda far=far: _step(run) > far):  # type: ignore[misc]
            os.kill(child.pid, (signal.SIGTERM, signal.SIGKILL, signal.SIGINT)[number % 3])
        child.wait()
        if (run / "config.yaml").exists():
            words = ["--quiet", "--resume", str(run)]
    check_done(_child(folder, words).wait())


def _child(folder: Path, words: list[str], *faults: Sampling) -> Child:
    return Child(["train", *words], folder, folder, {"MLX_SFT_CACHE": str(folder / "cache")}, faults)


def _step(run: Path) -> int:
    """The step that it has come to."""
    try:
        return int(_last_line(run / "metrics.jsonl")["step"])
    except (OSError, ValueError, LookupError):  # nothing yet, or a line that is being written
        return 0
