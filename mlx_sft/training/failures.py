"""What a device may answer instead of a result: it has no memory, or the system took it away.

Told by what MLX's errors say, which are all of one kind to Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from mlx_sft.data.batches import Batch
from mlx_sft.training.stopping import Stopped

_OUT_OF_MEMORY = ("allocate", "insufficient memory", "out of memory", "bad_alloc")
"""What MLX's errors say where there is no memory, on Metal and CUDA. On the CPU the system ends the process instead."""

_INTERRUPTED = ("command buffer execution failed", "resource limit (")
"""What else Metal's errors say: a command took too long for the display (`Impacting Interactivity`) or at all (`Timeout`), another's failed
(`Innocent Victim`, `SubmissionsIgnored`), or there were too many arrays at once."""

_KIND_OUT_OF_MEMORY, _KIND_INTERRUPTED, _KIND_STOPPED = 1, 2, 3

GPU_HINT = "close what else draws on the display or let it sleep, or give a smaller --micro-batch-tokens"


@dataclass(frozen=True)
class FailedBatch:
    """A micro-batch of `rows`, the longest of `width` tokens, `tokens` in all, that was not computed; and what was said about it."""

    rows: int
    width: int
    tokens: int
    message: str


class BatchFailed(Exception):
    """A micro-batch was not computed. To keep the error would keep the arrays of the frames that it went through: keep its `batch`."""

    def __init__(self, batch: FailedBatch) -> None:
        super().__init__(batch.message)
        self.batch = batch


class OutOfMemory(BatchFailed):
    """It did not fit."""


class Interrupted(BatchFailed):
    """The system took the GPU away from it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX or Python ended for want of memory."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def is_interrupted(error: BaseException) -> bool:
    """Whether the system took the GPU away, so that the same may succeed a little later."""
    return not is_out_of_memory(error) and any(words in str(error).lower() for words in _INTERRUPTED)


def reason(error: BaseException) -> str:
    """What an error says; Python's own for want of memory says nothing."""
    return str(error) or "the system gives this process no more"


@contextmanager
def failures_noticed(batch: Batch) -> Iterator[None]:
    """Raise `OutOfMemory` or `Interrupted` where the block, which computes this micro-batch, fails for it."""
    try:
        yield
        mx.synchronize()  # Metal may tell only then that a command failed, and its results are worth nothing
    except (RuntimeError, MemoryError) as error:
        failed = FailedBatch(batch.rows, batch.longest, batch.token_ids.size, reason(error))
        if is_out_of_memory(error):
            raise OutOfMemory(failed) from error
        if is_interrupted(error):
            raise Interrupted(failed) from error
        raise


def as_numbers(failed: Sequence[BaseException]) -> tuple[int, int, int, int]:
    """What stopped a process, if anything did, as it is told to others: its kind, and three numbers of it."""
    for failure in failed:
        if isinstance(failure, Stopped):
            return (_KIND_STOPPED, failure.number, 0, 0)
        if isinstance(failure, BatchFailed):
            kind = _KIND_INTERRUPTED if isinstance(failure, Interrupted) else _KIND_OUT_OF_MEMORY
            return (kind, failure.batch.rows, failure.batch.width, failure.batch.tokens)
    return (0, 0, 0, 0)


def from_numbers(rank: int, kind: int, rows: int, width: int, tokens: int) -> list[BaseException]:
    """The inverse of `as_numbers`, of what stopped the process of this number; empty where nothing did."""
    if not kind:
        return []
    if kind == _KIND_STOPPED:
        return [Stopped(rows)]
    failed: type[BatchFailed] = Interrupted if kind == _KIND_INTERRUPTED else OutOfMemory
    return [failed(FailedBatch(rows, width, tokens, f"in process {rank}"))]
