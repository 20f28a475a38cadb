"""The processes of one run, started together by `mlx.launch`: each computes a share of a step's micro-batches, and all get the sum.

    rank 0      trains as one machine does, and says what is to be computed     tell ─► gradient of these micro-batches ─► update ─► ...
    the others  have the same model and data, and do what they are told         (`worker.py`)

What is exchanged is a sum of gradients that are weighted already, never a mean: so a step is that of one machine, whatever is where.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_sft.console import print_error
from mlx_sft.data.batches import Batch
from mlx_sft.errors import UserError
from mlx_sft.methods import Parameters
from mlx_sft.training.failures import BatchFailed, FailedBatch, Interrupted, OutOfMemory, is_out_of_memory, reason
from mlx_sft.training.stopping import Stopped

PATIENCE = 600.0
"""Seconds that a process waits for the others in one exchange."""
_AT_ONCE = 64 * 2**20
"""Bytes of gradients that are exchanged at once."""
_NUMBERS = 4
"""Of a failure: its kind, and what it tells."""
_OUT_OF_MEMORY, _INTERRUPTED, _STOPPED = 1, 2, 3


class Ranks:
    """The processes of a run; one alone where it has no group.

    Attributes:
        rank: The number of this one; 0 leads.
        size: How many there are.
        exact: Whether the gradients of micro-batches are exchanged each by itself and added in their order, so that any number of
            processes gives the bits of one.
        sharded: Whether each has a part of the base, so that all of them compute every micro-batch together.
    """

    exact = False
    sharded = False

    def __init__(self, group: Any = None, patience: float = PATIENCE) -> None:
        self._group, self._patience = group, patience
        self.rank: int = 0 if group is None else group.rank()
        self.size: int = 1 if group is None else group.size()

    @classmethod
    def started(cls) -> Ranks:
        """Those that `mlx.launch` started this process among."""
        if not {"MLX_RANK", "OMPI_COMM_WORLD_RANK"} & os.environ.keys():
            return cls()
        return cls(mx.distributed.init(strict=True))

    @property
    def group(self) -> Any:
        """The processes, of `mx.distributed`, where each has a part of the base; else None."""
        return self._group if self.sharded else None

    @property
    def leads(self) -> bool:
        """Whether there are others, and this one says what they compute."""
        return self.size > 1 and self.rank == 0

    def tell(self, message: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Rank 0's message, in all processes."""
        text = np.frombuffer(json.dumps(message).encode(), np.uint8) if self.rank == 0 else np.zeros(0, np.uint8)
        length = int(np.array(self._summed(mx.array([len(text)], mx.int32)))[0])
        found = self._summed(mx.array(np.resize(text, length) if len(text) else np.zeros(length, np.uint8)))
        told: dict[str, Any] = json.loads(np.array(found).tobytes())
        return told

    def end(self) -> None:
        """The others hear that the run is over, where they still can."""
        if self.leads and self._group is not None:
            self.tell({"do": "end"})

    def told_of(self, batches: Sequence[Batch], what: str, key: mx.array | None = None) -> None:
        """The others hear which micro-batches are computed now, and for what; nothing where this process does not lead."""
        if self.leads:
            cut = [[batch.examples, batch.token_ids.shape[1], bool(batch.spans), _shared(batch)] for batch in batches]
            self.tell({"do": what, "batches": cut, "key": None if key is None else key.tolist()})

    def bytes_of_the_first(self, array: NDArray[Any]) -> NDArray[Any]:
        """An array of this shape and type with the numbers that it has in rank 0."""
        own = np.frombuffer(array.tobytes(), np.uint8) if self.rank == 0 else np.zeros(array.nbytes, np.uint8)
        found = np.array(self._summed(mx.array(own))).tobytes()
        return np.frombuffer(found, array.dtype).reshape(array.shape).copy()

    def as_in_the_first(self, arrays: Parameters) -> Parameters:
        """Arrays of these names, shapes and types with the values that they have in rank 0."""
        found = {}
        for name, value in arrays.items():
            own = value if self.rank == 0 else mx.zeros_like(value)
            found[name] = self._summed(own)
        return found

    def share(self, costs: Sequence[int]) -> list[bool]:
        """Which of a step's micro-batches this process computes: the largest first, each goes to who has least so far."""
        if self.sharded:
            return [True] * len(costs)
        owners, done = [0] * len(costs), [0] * self.size
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            owners[index] = done.index(min(done))
            done[owners[index]] += costs[index]
        return [owner == self.rank for owner in owners]

    def joined(
        self, found: Sequence[NDArray[Any] | None], lengths: Sequence[int], failure: BaseException | None = None
    ) -> list[NDArray[np.float32]]:
        """What each process found of its micro-batches, in all of them: numbers that float32 holds.

        Args:
            found: None for those of others.
            lengths: Numbers of each.

        Raises:
            BatchFailed, Stopped: Where one of them failed, in all.
        """
        if self.size == 1 or self.sharded:
            _raise(failure)
            return [np.asarray(one, np.float32) for one in found if one is not None]
        parts = [np.zeros(n, np.float32) if one is None else one for one, n in zip(found, lengths, strict=True)]
        flat = np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32)
        return np.split(np.array(self._exchanged(mx.array(flat), failure)), np.cumsum(lengths)[:-1])

    def summed(
        self, loss: mx.array, gradients: Parameters, like: Parameters, failure: BaseException | None = None
    ) -> tuple[mx.array, Parameters]:
        """Loss and gradients, summed over all processes, in float32; as they are where there is one.

        Args:
            gradients: Empty where this process had no micro-batch, or failed.
            like: Arrays of the same names and shapes.

        Raises:
            BatchFailed, Stopped: Where one of them failed, in all.
        """
        if self.size == 1:
            _raise(failure)
            return loss, gradients
        counts = self.rank == 0 or not self.sharded  # the loss is the same in each that has a part of the base
        loss = self._exchanged((loss if counts else mx.zeros(())).astype(mx.float32).reshape(1), failure)[0]
        total: Parameters = {}
        for names in _parts(like):
            own = [
                gradients.pop(name).astype(mx.float32).reshape(-1) if name in gradients else mx.zeros(like[name].size)
                for name in names
            ]
            flat = self._summed(mx.concatenate(own))
            ends = np.cumsum([like[name].size for name in names])[:-1].tolist()
            for name, value in zip(names, mx.split(flat, ends), strict=True):
                total[name] = value.reshape(like[name].shape)
            mx.eval([total[name] for name in names])
        return loss, {name: total[name] for name in like}

    def said(self, problem: str) -> list[str]:
        """What each process has to say, in all; empty where nothing."""
        text = np.zeros(1024, np.uint8)
        encoded = problem.encode()[: len(text)]
        text[: len(encoded)] = np.frombuffer(encoded, np.uint8)
        every = np.zeros((self.size, len(text)), np.uint8)
        every[self.rank] = text
        found = np.array(self._summed(mx.array(every)))
        return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in found]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Where each has a part of the base: what one process cannot do, in the block or at all, ends all of them in words."""
        if not self.sharded:
            yield
            return
        problem = None
        try:
            yield
        except UserError as error:
            problem = error
        said = self.said(f"{problem.where}: {problem.what}" if problem else "")
        if problem is not None:
            raise problem
        if others := [f"process {rank}: {what}" for rank, what in enumerate(said) if what]:
            raise UserError("; ".join(others))

    @contextmanager
    def together(self) -> Iterator[None]:
        """In the block, processes that have parts of the base compute with all of them: where one fails, none can go on."""
        if not self.sharded:
            yield
            return
        with self._watched():
            try:
                yield
            except (BatchFailed, RuntimeError, MemoryError) as error:
                if not (isinstance(error, BatchFailed) or is_out_of_memory(error)):
                    raise self._lost(error) from error
                self._group = None  # the others are in the middle of it, and wait for other numbers
                what = f"process {self.rank} could not compute its part: {reason(error)}"
                hint = "give a smaller --micro-batch-tokens, or start more processes, and go on with --resume"
                raise UserError(what, hint=hint) from error

    def _lost(self, error: Exception) -> UserError:
        self._group = None  # nothing more can be exchanged
        hint = "look at what it said; go on with --resume once all of them can be reached"
        return UserError(f"another process of this run was lost: {error}", hint=hint)

    def _exchanged(self, flat: mx.array, failure: BaseException | None) -> mx.array:
        """The sum of float32 arrays, and with it word of who failed."""
        slots = np.zeros((self.size, _NUMBERS), np.float32)
        slots[self.rank] = _encoded(failure)
        own = mx.zeros_like(flat) if failure is not None else flat
        total = self._summed(mx.concatenate([own, mx.array(slots.reshape(-1))]))
        every = np.array(total[flat.size :]).reshape(self.size, _NUMBERS)
        _raise(failure)
        for rank, numbers in enumerate(every.astype(int).tolist()):
            _raise(_decoded(rank, *numbers))
        return total[: flat.size]

    def _summed(self, array: mx.array) -> mx.array:
        if self._group is None:
            return array
        found = mx.distributed.all_sum(array, group=self._group)
        with self._watched():
            try:
                mx.eval(found)
            except RuntimeError as error:
                raise self._lost(error) from error
        return found

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """An exchange that takes too long ends the process, as nothing else ends what waits in MLX's own code."""

        def give_up() -> None:
            what = f"another process of this run has not answered for {self._patience:.0f} s"
            print_error(UserError(what, hint="go on with --resume once all of them can be reached"))
            os._exit(1)

        timer = threading.Timer(self._patience, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


ALONE = Ranks()


def _shared(batch: Batch) -> list[int]:
    return [span.shared for span in batch.spans] if any(span.shared for span in batch.spans) else []


def _parts(arrays: Parameters) -> Iterator[list[str]]:
    """The names, in groups that are exchanged at once."""
    names, taken = list[str](), 0
    for name, value in arrays.items():
        if names and taken + 4 * value.size > _AT_ONCE:
            yield names
            names, taken = [], 0
        names, taken = [*names, name], taken + 4 * value.size
    if names:
        yield names


def _encoded(failure: BaseException | None) -> tuple[int, ...]:
    if failure is None:
        return (0, 0, 0, 0)
    if isinstance(failure, Stopped):
        return (_STOPPED, failure.number, 0, 0)
    if isinstance(failure, BatchFailed):
        kind = _INTERRUPTED if isinstance(failure, Interrupted) else _OUT_OF_MEMORY
        return (kind, failure.batch.rows, failure.batch.width, failure.batch.tokens)
    raise failure


def _decoded(rank: int, kind: int, rows: int, width: int, tokens: int) -> BaseException | None:
    if kind == _STOPPED:
        return Stopped(rows)
    if not kind:
        return None
    failed: Callable[[FailedBatch], BatchFailed] = Interrupted if kind == _INTERRUPTED else OutOfMemory
    return failed(FailedBatch(rows, width, tokens, f"in process {rank}"))


def _raise(failure: BaseException | None) -> None:
    if failure is not None:
        raise failure
