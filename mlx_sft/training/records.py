"""`metrics.jsonl`: what a line of it says, and how it is written. Knows nothing of how a step is taken.

A line is written without a buffer, which could fail when it is closed; a resumed run cuts the file back to what its checkpoint knows of.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sft.data.batches import Batch, Step
from mlx_sft.data.store import Examples
from mlx_sft.runs import disk_errors, sync
from mlx_sft.training.step import Evaluation

Record = dict[str, Any]


class Metrics:
    """The file, open for writing."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self._path = path
        self._file = file

    @classmethod
    @contextmanager
    def open(cls, path: Path, kept_bytes: int) -> Iterator[Metrics]:
        """The file, cut back to `kept_bytes`, or to the last whole line before that where someone has cut it elsewhere."""
        with disk_errors(path):
            file = FileIO(path, "a+")
        with file:
            metrics = cls(path, file)
            with disk_errors(path):
                file.seek(0)
                metrics.cut(file.read(kept_bytes).rfind(b"\n") + 1)
            yield metrics

    def write(self, record: Record) -> None:
        line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with disk_errors(self._path):
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, "no space left for a whole line")

    def cut(self, kept_bytes: int) -> None:
        """Forget what was written after so many bytes."""
        with disk_errors(self._path):
            self._file.truncate(kept_bytes)
            self._file.seek(0, os.SEEK_END)

    def synced_bytes(self) -> int:
        """The file's length, once all of it would survive a loss of power."""
        with disk_errors(self._path):
            sync(self._file.fileno())
        return self._file.tell()


def step_record(
    step: Step,
    batches: Sequence[Batch],
    examples: Examples,
    *,
    loss: float | None,
    learning_rate: float,
    grad_norm: float | None,
    seconds: float,
    data_wait_seconds: float,
    trace_seconds: Sequence[float] | None,
) -> Record:
    """A line for an optimizer step.

    Args:
        loss: None, as `grad_norm` is, where it was skipped; the rows are named then.
        seconds: In all, waiting for data included.
        trace_seconds: What each trace made in this step took; None where nothing is compiled.
    """
    rows = list(step.rows)
    tokens = int(examples.lengths[rows].sum())
    record: Record = {
        "kind": "train",
        "step": step.number,
        "epoch": round(step.epoch, 6),
        "loss": loss,
        "learning_rate": learning_rate,
        "grad_norm": grad_norm,
        "tokens": tokens,
        "supervised_tokens": int(examples.supervised_tokens[rows].sum()),
        "computed_tokens": sum(batch.needed_tokens for batch in batches),
        "padded_tokens": sum(batch.token_ids.size for batch in batches),
        "micro_batches": len(batches),
        "tokens_per_second": round(tokens / seconds, 2),
        "peak_memory_bytes": mx.get_peak_memory(),
        "seconds": round(seconds, 4),
        "data_wait_seconds": round(data_wait_seconds, 4),
    }
    if trace_seconds is not None:
        record |= {"traces": len(trace_seconds), "trace_seconds": round(sum(trace_seconds), 4)}
    if loss is None:
        record["skipped_rows"] = [examples[row].origin for row in rows]
    return record


def evaluation_record(step: Step, result: Evaluation, *, best: bool, learning_rate: float, seconds: float) -> Record:
    """A line for an evaluation."""
    finite = math.isfinite(result.loss)
    return {
        "kind": "evaluation",
        "step": step.number,
        "epoch": round(step.epoch, 6),
        "loss": result.loss if finite else None,
        "perplexity": math.exp(min(result.loss, 700)) if finite else None,
        "token_accuracy": result.token_accuracy,
        "best": best,
        "learning_rate": learning_rate,
        "grad_norm": None,
        "tokens": result.tokens,
        "supervised_tokens": result.supervised_tokens,
        "tokens_per_second": round(result.tokens / seconds, 2),
        "peak_memory_bytes": mx.get_peak_memory(),
        "seconds": round(seconds, 4),
    }


def out_of_memory_record(step: int, *, rows: int, width: int, micro_batch_tokens: int, recompute: str) -> Record:
    """A line for a micro-batch that did not fit.

    Args:
        step: The step that it was in, which is then repeated.
        rows: Of the micro-batch, `width` tokens each.
        micro_batch_tokens: From now on.
        recompute: From now on.
    """
    return {
        "kind": "out_of_memory",
        "step": step,
        "rows": rows,
        "width": width,
        "micro_batch_tokens": micro_batch_tokens,
        "recompute": recompute,
    }


def rollback_record(step: int, *, diverged_at: int, rate_factor: float) -> Record:
    """A line for a divergence that was undone.

    Args:
        step: The step after which the run goes on.
        diverged_at: The last that was taken; those in between are taken again.
        rate_factor: What the learning rate is multiplied with from now on.
    """
    return {"kind": "rollback", "step": step, "diverged_at": diverged_at, "learning_rate_factor": rate_factor}
