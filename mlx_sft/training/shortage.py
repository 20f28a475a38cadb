"""A device that has no memory for a micro-batch: how it is noticed, and what is tried next.

MLX says so with an error on Metal and CUDA. On the CPU the system ends the process instead, and its run goes on with `--resume`.
Knows nothing of jobs or losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx

from mlx_sft.data.batches import Batch
from mlx_sft.training.recompute import Mode

_WORDS = ("allocate", "insufficient memory", "out of memory", "bad_alloc")

_STRONGER: dict[Mode, Mode] = {"off": "light", "light": "layers", "layers": "blocks"}
"""Which recomputation keeps less."""


@dataclass(frozen=True)
class Shortage:
    """A micro-batch of `rows`, the longest of `width` tokens, did not fit, `tokens` in all; what was said about it."""

    rows: int
    width: int
    tokens: int
    message: str


class OutOfMemory(Exception):
    """There is a shortage. To keep the error would keep the arrays of the frames that it went through, so keep its `shortage`."""

    def __init__(self, shortage: Shortage) -> None:
        super().__init__(shortage.message)
        self.shortage = shortage


def is_out_of_memory(error: BaseException) -> bool:
    """Whether MLX or Python ended for want of memory."""
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in _WORDS)


@contextmanager
def shortage_noticed(batch: Batch) -> Iterator[None]:
    """Raise `OutOfMemory` where the block, which computes this micro-batch, has no memory for it."""
    try:
        yield
        mx.synchronize()  # Metal may tell only then that a command failed, and its results are worth nothing
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(Shortage(batch.rows, batch.longest, batch.token_ids.size, str(error))) from error


def smaller_budget(shortage: Shortage) -> int | None:
    """Half of the micro-batch that did not fit; None where that was a single row."""
    return shortage.tokens // 2 if shortage.rows > 1 else None


def next_try(shortage: Shortage, token_budget: int, mode: Mode) -> tuple[int, Mode] | None:
    """The budget and the recomputation to try after a shortage, smaller micro-batches first; None after the last."""
    smaller = smaller_budget(shortage)
    if smaller is not None:
        return smaller, mode
    if mode in _STRONGER:
        return token_budget, _STRONGER[mode]
    return None
