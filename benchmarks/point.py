"""One point of a case, measured: rounds in which every trainer runs once, each in a process of its own, and the limit after them.

Knows processes and trainers' names; knows nothing of what a trainer does.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Point
from benchmarks.limit import HEAD_ROWS
from benchmarks.machine import fast_blas
from benchmarks.process import OUT_OF_MEMORY, run_watched
from benchmarks.rows import KINDS
from benchmarks.summary import Run, derived, went_well
from benchmarks.task import Task
from benchmarks.trainers import TRAINERS
from benchmarks.workload import in_mlx_lm_order, make_adapter, make_checkpoint, read_rows, shape, write_rows
from benchmarks.workload import supervised_tokens as count_supervised

WORK = Path(__file__).parent / "work"
TINY_TOKENIZER = Path(__file__).parents[1] / "mlx_sft" / "model" / "tiny"


@dataclass(frozen=True)
class Settings:
    """How every point is measured.

    Attributes:
        repeat: Rounds; 0 for as many as the case has.
        timeout: Seconds after which a run is given up.
        quick: Whether the limit is measured but once a point, and shortly.
    """

    repeat: int
    timeout: float
    dtype: str = "float32"
    quick: bool = False


@dataclass
class Prepared:
    """A point's files, and the peers' batches as far as they are known to fit."""

    task: Task
    config: dict[str, Any]
    rows_at_once: dict[str, int] = field(default_factory=dict)
    attempts: list[dict[str, Any]] = field(default_factory=list)


def prepare(point: Point, folder: Path, dtype: str) -> Prepared:
    """Write the checkpoint, where there is none yet, the adapter and the rows."""
    config = shape(point.layers, point.vocabulary)
    name = f"qwen3-0.6b-{point.layers}-layers-{point.vocabulary}-tokens"
    model = make_checkpoint(WORK / name, TINY_TOKENIZER, config)
    alpha = 2.0 * point.rank
    rows = KINDS[point.kind](point.rows, point.vocabulary, seed=0, **point.arguments)
    at_once = min(point.peer_batch or point.rows_per_step, point.rows_per_step)
    if point.in_order:
        rows = in_mlx_lm_order(rows, point.rows_per_step, seed=0)
    task = Task(
        model=str(model),
        data=str(write_rows(folder / "rows.jsonl", rows)),
        adapter=str(make_adapter(folder / "adapter", config, point.rank, alpha)),
        rows_per_step=point.rows_per_step,
        rows_at_once=at_once,
        steps=point.rows // point.rows_per_step,
        rank=point.rank,
        alpha=alpha,
        learning_rate=point.learning_rate,
        max_length=max(len(row["input_ids"]) for row in rows),
        grad_checkpoint=point.grad_checkpoint,
        dtype=dtype,
        in_order=point.in_order,
    )
    return Prepared(task, config)


def measure_point(
    point: Point, trainers: Sequence[str], settings: Settings, *, halve: bool, limited: bool = True
) -> dict[str, Any]:
    """All rounds of a point; a trainer that failed in the first is not asked again.

    Args:
        halve: Whether a peer's batch that does not fit is halved.
        limited: Whether the limit is measured too.

    Returns:
        What was asked (`point`, `task`), every run of every round, and what did not fit.
    """
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        prepared = prepare(point, Path(folder), settings.dtype)
        rounds: list[dict[str, Run]] = []
        left = [name for name in trainers if TRAINERS[name].unavailable() is None]
        for number in range(settings.repeat):
            one: dict[str, Run] = {}
            for name in left if number % 2 == 0 else left[::-1]:
                one[name] = run_fitting(name, prepared, settings, halve=halve)
                say(point, number, settings.repeat, name, one[name])
            left = [name for name in left if went_well(one[name])]
            if limited and went_well(one.get("ours")):
                known = rounds[0].get("limit") if rounds and settings.quick else None
                one["limit"] = known or run_limit(prepared, one["ours"], Path(folder), settings)
            rounds.append(one)
        shown = asdict(prepared.task) | {"model": Path(prepared.task.model).name}
        for name in ("data", "adapter"):
            del shown[name]
    return {
        "point": asdict(point),
        "task": shown,
        "rounds": rounds,
        "did_not_fit": prepared.attempts,
        "not_here": {name: why for name in trainers if (why := TRAINERS[name].unavailable())},
    }


def run_fitting(name: str, prepared: Prepared, settings: Settings, *, halve: bool) -> Run:
    """A trainer with the largest batch that fits: a peer's is halved, and accumulated, until it does."""
    at_once = prepared.rows_at_once.get(name, prepared.task.rows_at_once)
    while True:
        result = run_trainer(name, replace(prepared.task, rows_at_once=at_once), settings)
        if name == "ours" or not halve or at_once == 1 or result.get("failed") != OUT_OF_MEMORY:
            prepared.rows_at_once[name] = at_once
            return result
        prepared.attempts.append({"trainer": name, "rows_at_once": at_once, **result})
        at_once = largest_divisor(prepared.task.rows_per_step, at_once // 2)


def largest_divisor(number: int, most: int) -> int:
    return max(divisor for divisor in range(1, most + 1) if number % divisor == 0)


def run_trainer(name: str, task: Task, settings: Settings) -> Run:
    """One trainer in a process of its own; what it did, or why it failed."""
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        task_file, result_file = Path(folder) / "task.json", Path(folder) / "result.json"
        task_file.write_text(json.dumps(asdict(task)), encoding="utf-8")
        command = [sys.executable, "-m", "benchmarks.trainers", name, str(task_file), str(result_file)]
        load = os.getloadavg()[0]  # what others did to the machine just before
        ended = run_watched(command, environment_of(name), settings.timeout)
        if ended.failure:
            return {"failed": ended.failure, "highest_bytes": ended.highest_bytes}
        result: Run = json.loads(result_file.read_text(encoding="utf-8"))
    return derived(result) | {"load_before": round(load, 2)}


def run_limit(prepared: Prepared, ours: Run, folder: Path, settings: Settings) -> Run:
    """The limit of these rows at the sizes of our trainer's passes."""
    rows = read_rows(Path(prepared.task.data))
    spec = {
        "config": prepared.config,
        "rank": prepared.task.rank,
        "lengths": [len(row["input_ids"]) - 1 for row in rows],
        "supervised": count_supervised(rows),
        "tokens_at_once": tokens_at_once(ours),
        "dtype": prepared.task.dtype,
        "least_seconds": 0.05 if settings.quick else 0.5,
        "head_rows": HEAD_ROWS[:1] if settings.quick else HEAD_ROWS,
    }
    spec_file, result_file = folder / "limit.json", folder / "limit-result.json"
    spec_file.write_text(json.dumps(spec), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.limit", str(spec_file), str(result_file)]
    ended = run_watched(command, environment_of("limit"), settings.timeout)
    if ended.failure:
        return {"failed": ended.failure, "highest_bytes": ended.highest_bytes}
    result: Run = json.loads(result_file.read_text(encoding="utf-8"))
    return result | {"tokens_at_once": spec["tokens_at_once"]}


def tokens_at_once(ours: Run) -> int:
    """Of a pass of our trainer, on average; where it does not say, what its memory allowed."""
    if ours["padded_tokens"] and ours["batches"]:
        return round(ours["padded_tokens"] / ours["batches"])
    return int(min(ours["notes"]["micro_batch_tokens"] or 1024, ours["needed_tokens"]))


def environment_of(name: str) -> dict[str, str]:
    """PyTorch brings its own BLAS; MLX's CPU build on Linux brings the reference one."""
    blas = fast_blas()
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return offline | ({"LD_PRELOAD": blas} if blas and name != "trl" else {})


def say(point: Point, number: int, of: int, name: str, run: Run) -> None:
    if went_well(run):
        said = (
            f"{run['tokens_per_second']:,.1f} real tokens a second, {run['peak_bytes'] / 1e9:.2f} GB above the weights"
        )
    else:
        said = run["failed"]
    print(f"  {point.label}, round {number + 1} of {of}, {name}: {said}", file=sys.stderr, flush=True)
