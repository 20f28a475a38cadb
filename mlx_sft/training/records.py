"""What a line of `metrics.jsonl` says, and with it what callbacks hear."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import mlx.core as mx

from mlx_sft.data.batches import Batch, Step
from mlx_sft.data.dataset import Examples
from mlx_sft.training.callbacks import Record
from mlx_sft.training.step import Evaluation


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
    own: Mapping[str, float],
) -> Record:
    """A line for an optimizer step.

    Args:
        loss: None, as `grad_norm` is, where it was skipped; the rows are named then.
        seconds: In all, waiting for data included.
        trace_seconds: What each trace made in this step took; None where nothing is compiled.
        own: What the objective says of itself.
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
        **own,
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
        **result.own,
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
