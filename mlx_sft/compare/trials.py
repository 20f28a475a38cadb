"""A trial: one run of one candidate at one learning rate, in a folder of its own, and what it showed."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from pydantic import BaseModel, ConfigDict

from mlx_sft.compare.candidates import Candidate
from mlx_sft.errors import UserError
from mlx_sft.files import disk_errors
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.callbacks import Callback, Record, TrainingRun
from mlx_sft.training.loop import train
from mlx_sft.writing import remove

_EVALUATIONS, _APART = 4, 5
"""In a run, so many steps apart at the least: its result is the best of them, so that too many steps do not count against a method."""
STOPPED = 128
"""Exit codes above it say that a person or the system ended the run."""


class Trial(BaseModel):
    """What a run showed.

    Attributes:
        candidate: The label.
        rate: Peak learning rate.
        steps: As many as were planned.
        loss: The lowest validation loss; None where the run failed, or had no finite one.
        curve: Step and validation loss of every evaluation.
        parameters: Numbers that are trained.
        seconds: That its steps took.
        step_seconds: The median of them.
        evaluation_seconds: What an evaluation took.
        wall: That all of it took, in this process: of a run that was resumed, since then.
        tokens: Of its rows, each as often as it was trained on.
        peak_memory_bytes: Of MLX's arrays.
        failed: Why it failed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    candidate: str
    rate: float
    steps: int
    loss: float | None = None
    curve: tuple[tuple[int, float | None], ...] = ()
    parameters: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    wall: float = 0.0
    tokens: int = 0
    peak_memory_bytes: int = 0
    failed: str | None = None

    @property
    def key(self) -> tuple[str, float, int]:
        """What no other trial of a comparison has."""
        return self.candidate, self.rate, self.steps


class _Counted(Callback):
    """Hears how much is trained."""

    name = "compare"

    def __init__(self) -> None:
        super().__init__()
        self.parameters = 0

    def on_start(self, run: TrainingRun, record: Record) -> None:
        self.parameters = sum(value.size for value in run.parameters.values())


def _apart(steps: int) -> int:
    """How many steps apart a run is evaluated."""
    return max(_APART, math.ceil(steps / _EVALUATIONS))


def evaluations_of(steps: int) -> int:
    """How often a run of so many steps is evaluated."""
    return math.ceil(steps / _apart(steps))


def folder_of(runs: Path, candidate: Candidate, rate: float, steps: int) -> Path:
    """Where the run of a trial lies."""
    return runs / f"{candidate.folder}-lr{rate:g}-{steps}"


def run_trial(
    runs: Path, candidate: Candidate, rate: float, steps: int, common: Mapping[str, Any], *, wall: Callable[[], float]
) -> Trial:
    """Train, or go on with a run that was cut short.

    Args:
        common: The settings that all candidates have.
        wall: A clock in seconds.

    Raises:
        UserError: If the run was told to stop; what else ends it is what the trial says.
    """
    folder = folder_of(runs, candidate, rate, steps)
    begun, counted = wall(), _Counted()
    trial = Trial(candidate=candidate.label, rate=rate, steps=steps)
    config = candidate.config(
        common,
        lr=rate,
        max_steps=steps,
        eval_every=_apart(steps),
        out=str(folder),
        keep=1,
        quiet=True,
        samples=0,
        forgetting=False,
    )
    try:
        if (folder / "config.yaml").is_file():
            config = type(config).resolve(resume=str(folder), quiet=True)
        elif folder.exists():
            with disk_errors(folder):
                remove(folder)
        train(config, callbacks=[counted])
    except UserError as error:
        if error.exit_code > STOPPED:
            raise
        return trial.model_copy(update={"failed": str(error), "wall": round(wall() - begun, 3)})
    finally:
        gc.collect()
        mx.clear_cache()
    records = list(_records(RunFolder.open(folder)))
    steps_taken = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    curve = [(record["step"], record["loss"]) for record in evaluations]
    found = {
        "loss": min((loss for _, loss in curve if loss is not None), default=None),
        "curve": tuple(curve),
        "parameters": counted.parameters,
        "seconds": round(sum(record["seconds"] for record in steps_taken), 3),
        "step_seconds": median(record["seconds"] for record in steps_taken),
        "evaluation_seconds": median(record["seconds"] for record in evaluations),
        "wall": round(wall() - begun, 3),
        "tokens": sum(record["tokens"] for record in steps_taken),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in steps_taken),
    }
    return trial.model_copy(update=found)


def _records(run: RunFolder) -> Iterator[Record]:
    return map(json.loads, run.metric_lines())
