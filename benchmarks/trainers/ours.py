"""mlx-sft by its public function; clipping and schedule are off, as they are in the peers."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.machine import peak_resident_bytes
from benchmarks.task import ALLOCATED, Result, Task, weighted_mean
from benchmarks.workload import needed_tokens, read_rows, weight_bytes


def unavailable() -> str | None:
    return None


class Stamped(io.StringIO):
    """Takes a run's lines of JSON and notes when each step was reported."""

    def __init__(self) -> None:
        super().__init__()
        self.stamps: list[float] = []

    def write(self, text: str) -> int:
        if '"kind": "train"' in text:
            self.stamps.append(time.perf_counter())
        return super().write(text)


def run(task: Task, began: float) -> Result:
    import mlx.core as mx

    from mlx_sft import TrainConfig, train

    stdout = Stamped()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(stdout):
        finished = train(TrainConfig(**settings(task), out=str(Path(folder) / "run"))).run_dir
        peak = mx.get_peak_memory()
        lines = (finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = TrainConfig.resolve(finished / "config.yaml")
        environment = json.loads((finished / "environment.json").read_text(encoding="utf-8"))
    steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    weights = weight_bytes(task.model, task.dtype)
    return Result(
        tokens=sum(step["tokens"] for step in steps),
        supervised_tokens=sum(step["supervised_tokens"] for step in steps),
        needed_tokens=needed_tokens(read_rows(Path(task.data))),
        padded_tokens=total(steps, "padded_tokens"),
        batches=total(steps, "micro_batches"),
        **times(stdout.stamps, steps[0]["seconds"], began),
        loss=weighted_mean([step["loss"] for step in steps], [step["supervised_tokens"] for step in steps]),
        step_losses=[step["loss"] for step in steps],
        weight_bytes=weights,
        peak_bytes=peak - weights,
        peak_resident_bytes=peak_resident_bytes(),
        memory_is=ALLOCATED,
        notes={
            "micro_batch_tokens": chosen.micro_batch_tokens,
            "grad_checkpoint": chosen.grad_checkpoint,
            "predicted_bytes": environment["memory"]["predicted_peak_bytes"] - weights,
            **{name: total(steps, name) for name in ("data_wait_seconds", "traces", "trace_seconds")},
        },
    )


def settings(task: Task) -> dict[str, Any]:
    return {
        "model": task.model,
        "data": task.data,
        "valid_fraction": 0,
        "init_adapter": task.adapter,
        "dtype": task.dtype,
        "batch_size": task.rows_per_step,
        "max_steps": task.steps,
        "lr": task.learning_rate,
        "scheduler": "constant",
        "warmup": 0.0,
        "max_grad_norm": 0.0,
        "max_length": task.max_length,
        "grad_checkpoint": "on" if task.grad_checkpoint else "off",
        "save_every": task.steps,
        "shuffle": not task.in_order,
        "seed": task.seed,
        "data_cache": False,
        "json": True,
    }


def times(stamps: list[float], first_seconds: float, began: float) -> dict[str, Any]:
    """The times of a `Result`: the first step began `first_seconds` before it was reported."""
    all_stamps = [stamps[0] - first_seconds, *stamps]
    return {
        "seconds": all_stamps[-1] - all_stamps[0],
        "step_seconds": [after - before for before, after in pairwise(all_stamps)],
        "seconds_to_start": all_stamps[0] - began,
        "seconds_to_first_step": all_stamps[1] - began,
    }


def total(steps: list[dict[str, Any]], name: str) -> Any:
    """The sum of a metric; None where the trainer does not write it."""
    return sum(step[name] for step in steps) if all(step.get(name) is not None for step in steps) else None
