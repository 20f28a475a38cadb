"""What a trainer is asked to do, and what it says it did. Knows nothing of any trainer, nor of how tasks are chosen."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Task:
    """The same for every trainer.

    Attributes:
        model: A checkpoint folder.
        data: A .jsonl file of rows with `input_ids` and `labels`; each row is trained on once.
        adapter: A folder with a PEFT adapter that training starts from.
        rows_per_step: Rows of one optimizer step.
        rows_at_once: Rows of one batch of a peer that takes a fixed number; gradient accumulation makes up the rest.
        steps: Optimizer steps.
        dtype: Of the frozen weights.
        in_order: Each step takes the next rows of the file, instead of an order of the trainer's own. mlx-lm always
            draws its own: `workload.in_mlx_lm_order` puts rows so that it is the file's.
    """

    model: str
    data: str
    adapter: str
    rows_per_step: int
    rows_at_once: int
    steps: int
    rank: int
    alpha: float
    learning_rate: float
    max_length: int
    grad_checkpoint: bool
    dtype: str = "float32"
    in_order: bool = False
    seed: int = 0

    @property
    def accumulation(self) -> int:
        """Batches a step of a peer."""
        return self.rows_per_step // self.rows_at_once


@dataclass(frozen=True)
class Result:
    """What one trainer did.

    Attributes:
        tokens: Of the rows, without padding.
        supervised_tokens: That were learnt.
        needed_tokens: Of the rows, those that go through the model: none need be that predict nothing.
        padded_tokens: What did go through the model; None where a trainer does not say.
        batches: Forward and backward passes; None where a trainer does not say.
        seconds: Of all steps, by the wall clock: from the start of the first to the end of the last.
        step_seconds: Of each.
        seconds_to_start: From the start of the process to the start of the first step: imports, weights and data.
        seconds_to_first_step: To its end: tracing and compiling too.
        loss: Mean over the supervised tokens of all steps.
        step_losses: Of each step.
        weight_bytes: Of the base model.
        peak_bytes: Above the weights.
        peak_resident_bytes: Of the whole process, as the system counts.
        memory_is: How `peak_bytes` was measured.
        notes: Whatever else a reader must know.
    """

    tokens: int
    supervised_tokens: int
    needed_tokens: int
    padded_tokens: int | None
    batches: int | None
    seconds: float
    step_seconds: list[float]
    seconds_to_start: float
    seconds_to_first_step: float
    loss: float
    step_losses: list[float]
    weight_bytes: int
    peak_bytes: int
    peak_resident_bytes: int
    memory_is: str
    notes: dict[str, Any] = field(default_factory=dict)


ALLOCATED = "MLX's allocator: its peak less the bytes of the weights"
RESIDENT = "resident memory: its peak in training less what it was once the weights were in memory"


class Stopwatch:
    """When the process began, when its first step did, and when each step ended."""

    def __init__(self, began: float) -> None:
        self.began = began
        self.stamps: list[float] = []

    def start(self) -> None:
        """The first step begins; later calls are ignored."""
        if not self.stamps:
            self.stamps.append(time.perf_counter())

    def step(self) -> None:
        """A step has ended."""
        self.stamps.append(time.perf_counter())

    def fields(self) -> dict[str, Any]:
        """The times of a `Result`."""
        stamps = self.stamps
        return {
            "seconds": stamps[-1] - stamps[0],
            "step_seconds": [after - before for before, after in pairwise(stamps)],
            "seconds_to_start": stamps[0] - self.began,
            "seconds_to_first_step": stamps[1] - self.began,
        }


def weighted_mean(values: list[float], weights: list[int]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)
