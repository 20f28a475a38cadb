"""The processes of one run, on one machine or several: each computes a share of a step's micro-batches, and all get the sum.

    rank 0      trains as one machine does, and says what is to be computed     tell ─► gradient of these micro-batches ─► update ─► ...
    the others  have the same model and data, and do what they are told         (`worker.py`)

What is exchanged is a sum of gradients that are weighted already, never a mean: so a step is that of one machine, whatever is where.
MLX's engine carries it (`mx.distributed`: ring, JACCL, MPI, NCCL).
"""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_sft.console import print_error
from mlx_sft.data.batches import Batch
from mlx_sft.errors import FAILURE, UserError
from mlx_sft.launch import own_rank
from mlx_sft.methods import Parameters
from mlx_sft.training.failures import BatchFailed, as_numbers, from_numbers, is_out_of_memory, reason
from mlx_sft.training.machine import Machine, this_machine
from mlx_sft.training.stopping import Stopped

LOST_HINT = "look at what it said, and go on with --resume once all of them can be reached"
_AT_ONCE = 64 * 2**20
"""Bytes of gradients that are exchanged at once."""
_SHORT = 512
"""Bytes of a message that takes one exchange."""
_LONGER = 10
"""A process waits at least so many times as long as its own share of a step takes."""

_WORDS = 6
"""Numbers that go with a step's gradient: a failure's kind and three numbers of it, then seconds and tokens of the micro-batches."""


class Ranks:
    """The processes of a run; one alone where it has no group.

    Attributes:
        rank: The number of this one; 0 leads.
        size: How many there are.
        exact: Whether the gradients of micro-batches are exchanged each by itself and added in their order, so that any number of
            processes gives the bits of one.
        steps: Gradients that were computed together so far.
        memory: Bytes that each of them can take; None where this is one alone.
        sharded: Whether each has a part of the base, so that all of them compute every micro-batch together.
        speeds: How fast each is, the fastest 1; by these the micro-batches are dealt.
        patience: Seconds that this process waits for the others in one exchange; None for as long as it takes.
    """

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank: int = 0 if group is None else group.rank()
        self.size: int = 1 if group is None else group.size()
        self.sharded = False
        self.memory: int | None = None
        self.patience: float | None
        self.speeds: tuple[float, ...]
        self.begin(exact=False)
        self._own = [0.0, 0.0]
        self._within = False  # what all compute together: then nobody is listening to rank 0

    @property
    def group(self) -> Any:
        """The processes, of `mx.distributed`, where each has a part of the base; else None."""
        return self._group if self.sharded else None

    @property
    def lost(self) -> bool:
        """Whether nothing more can be exchanged."""
        return self.size > 1 and self._group is None

    @property
    def leads(self) -> bool:
        """Whether there are others, and this one says what they compute."""
        return self.size > 1 and self.rank == 0

    def narrowed(self, machine: Machine) -> Machine:
        """A machine with no more memory than each of the processes can take."""
        if self.memory is None or self.memory >= machine.memory:
            return machine
        return replace(machine, memory=self.memory, basis=f"of {self.size} processes, what each can take")

    # What rank 0 says, and all say

    def tell(self, message: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Rank 0's message, in all processes."""
        text = json.dumps(message).encode() if self.rank == 0 else b""
        first = np.zeros(_SHORT + 8, np.uint8)
        if self.rank == 0:
            first[:8] = np.frombuffer(len(text).to_bytes(8, "little"), np.uint8)
            first[8 : 8 + len(text)] = np.frombuffer(text[:_SHORT], np.uint8)
        found = np.array(self._summed(mx.array(first)))
        length = int.from_bytes(found[:8].tobytes(), "little")
        parts = [found[8 : 8 + length]]
        if length > _SHORT:
            rest = np.frombuffer(text[_SHORT:], np.uint8) if self.rank == 0 else np.zeros(length - _SHORT, np.uint8)
            parts.append(np.array(self._summed(mx.array(rest))))
        told: dict[str, Any] = json.loads(b"".join(part.tobytes() for part in parts))
        return told

    def begin(self, *, exact: bool) -> None:
        """A run begins: nothing is known of one before."""
        self.exact, self.steps, self.patience = exact and self.size > 1, 0, None
        self.speeds, self._longest, self._took = (1.0,) * self.size, 0.0, np.zeros((self.size, 2))

    def end(self, code: int, **result: Any) -> None:
        """The others hear that the run is over, where they still can."""
        if self.leads and not self.lost and not self._within:
            with suppress(UserError):  # who is lost has ended already
                self.tell({"do": "end", "code": code} | result)

    @contextmanager
    def led(self) -> Iterator[None]:
        """What ends the block early ends the run in all processes."""
        try:
            yield
        except BaseException as error:
            self.end(getattr(error, "exit_code", FAILURE))
            raise

    def hand_out(self, *arrays: Parameters) -> None:
        """The others get what is trained, and the optimizer's state, as they are here."""
        if self.leads:
            self.tell({"do": "take_up"})
            for value in (value for some in arrays for value in some.values()):
                self._of_the_first(value)

    def told_of(self, batches: Sequence[Batch], what: str, key: mx.array | None = None) -> None:
        """The others hear which micro-batches are computed now, and for what; nothing where this process does not lead."""
        if self.leads:
            cut = [[batch.examples, batch.token_ids.shape[1], bool(batch.spans), _shared(batch)] for batch in batches]
            self.steps += what == "gradient"
            self.tell({"do": what, "batches": cut, "key": None if key is None else key.tolist()})

    def said(self, text: str) -> list[str]:
        """What each process has to say, in all; empty where nothing, and cut after 1,024 bytes."""
        own = np.zeros(1024, np.uint8)
        encoded = text.encode()[: len(own)]
        own[: len(encoded)] = np.frombuffer(encoded, np.uint8)
        every = np.zeros((self.size, len(own)), np.uint8)
        every[self.rank] = own
        found = np.array(self._summed(mx.array(every)))
        return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in found]

    def bytes_of_the_first(self, array: NDArray[Any]) -> NDArray[Any]:
        """An array of this shape and type with the numbers that it has in rank 0."""
        found = np.array(self._of_the_first(mx.array(np.frombuffer(array.tobytes(), np.uint8)))).tobytes()
        return np.frombuffer(found, array.dtype).reshape(array.shape).copy()

    def as_in_the_first(self, arrays: Parameters) -> Parameters:
        """Arrays of these names, shapes and types with the values that they have in rank 0."""
        return {name: self._of_the_first(value) for name, value in arrays.items()}

    def _of_the_first(self, array: mx.array) -> mx.array:
        return self._summed(array if self.rank == 0 else mx.zeros_like(array))

    @contextmanager
    def agreed(self, hint: str = "") -> Iterator[None]:
        """What one process cannot do in the block ends all of them in words."""
        problem = None
        try:
            yield
        except UserError as error:
            problem = error
        said = self.said(": ".join(filter(None, (problem.where, problem.what))) if problem else "")
        if problem is not None:
            raise problem
        if others := [f"process {rank}: {what}" for rank, what in enumerate(said) if what]:
            raise UserError("; ".join(others), hint=hint)

    # How micro-batches are shared out

    def share(self, costs: Sequence[int]) -> list[bool]:
        """Which of a step's micro-batches this process computes: the largest first, each goes to who would be done with it first."""
        if self.sharded:
            return [True] * len(costs)
        owners, done = [0] * len(costs), [0.0] * self.size
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            ends = [done[rank] + costs[index] / self.speeds[rank] for rank in range(self.size)]
            owners[index] = ends.index(min(ends))
            done[owners[index]] = min(ends)
        return [owner == self.rank for owner in owners]

    def measured(self) -> tuple[float, ...] | None:
        """How fast each process was since this was last asked, the fastest 1, in tenths; None where one of them has done nothing."""
        seconds, tokens = self._took.T
        self._took = np.zeros((self.size, 2))
        if self.sharded or not (seconds * tokens).all():
            return None
        speeds = tokens / seconds
        return tuple(max(0.1, round(float(speed), 1)) for speed in speeds / speeds.max())

    def took(self, seconds: float, tokens: int) -> None:
        """One of this process's micro-batches has taken so long."""
        self._own = [self._own[0] + seconds, self._own[1] + tokens]

    # What is computed together

    def joined(
        self, batches: Sequence[Batch], compute: Callable[[int], NDArray[np.float32]], parts: int
    ) -> list[NDArray[np.float32]]:
        """What `compute` finds of each micro-batch, [parts, targets] each, in all processes; each computes its share.

        Raises:
            BatchFailed, Stopped: Where one of them failed, in all.
        """
        found = [np.zeros((parts, len(batch.targets)), np.float32) for batch in batches]
        mine = self.share([batch.token_ids.size for batch in batches])
        with self.together() as failed:
            for index in np.flatnonzero(mine).tolist():
                found[index] = compute(index)
        if self.size == 1:
            return found
        if self.sharded:  # each has found the same
            self._within = False
            _raise(failed)
            return found
        flat = np.concatenate([np.zeros(0, np.float32), *(one.reshape(-1) for one in found)])
        total = np.array(self._with_words(mx.array(flat), failed))
        ends = np.cumsum([one.size for one in found])[:-1]
        return [one.reshape(parts, -1) for one in np.split(total, ends)]

    def summed(
        self, loss: mx.array, gradients: Parameters, like: Parameters, failed: Sequence[BaseException]
    ) -> tuple[mx.array, Parameters]:
        """Loss and gradients, summed over all processes, in float32.

        Args:
            gradients: Empty where this process had none, or failed.
            like: Arrays of their names and shapes.
            failed: What stopped this process in its share.

        Raises:
            BatchFailed, Stopped: Where one of them failed, in all.
        """
        total: Parameters = {}
        flat = mx.zeros(0)
        if self.sharded and self.rank:  # the loss of each is that of all
            loss = mx.zeros_like(loss)
        for number, names in enumerate(_parts(like)):
            own = [
                gradients.pop(name).astype(mx.float32).reshape(-1) if name in gradients else mx.zeros(like[name].size)
                for name in names
            ]
            if not number:
                flat = self._with_words(mx.concatenate([loss.astype(mx.float32).reshape(1), *own]), failed)
                loss, flat = flat[0], flat[1:]
            else:
                flat = self._summed(mx.concatenate(own))
            ends = np.cumsum([like[name].size for name in names])[:-1].tolist()
            for name, value in zip(names, mx.split(flat, ends), strict=True):
                total[name] = value.reshape(like[name].shape)
            mx.eval([total[name] for name in names])
        return loss, {name: total[name] for name in like}

    @contextmanager
    def together(self) -> Iterator[list[BaseException]]:
        """Yield a list that holds what stops this process in its share; the others hear of it with what is exchanged next."""
        failed: list[BaseException] = []
        if self.size == 1:
            yield failed
            return
        self._within, started = True, time.monotonic()
        try:
            yield failed
        except BatchFailed as error:
            failed.append(type(error)(error.batch))  # not the error, which keeps arrays
        except Stopped as error:
            failed.append(error)
        self._longest = max(self._longest, time.monotonic() - started)

    @contextmanager
    def of_parts(self) -> Iterator[None]:
        """In the block, processes that have parts of the base compute with all of them: where one fails, none can go on."""
        if not self.sharded:
            yield
            return
        before, self._within = self._within, True
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
        self._within = before

    def _lost(self, error: Exception) -> UserError:
        self._group = None  # nothing more can be exchanged
        return UserError(f"another process of this run was lost: {error}", hint=LOST_HINT)

    def _with_words(self, flat: mx.array, failed: Sequence[BaseException]) -> mx.array:
        """The sum of float32 arrays, and with it word of who failed and how long each took."""
        slots = np.zeros((self.size, _WORDS), np.float32)
        slots[self.rank] = (*as_numbers(failed), *self._own)
        self._own = [0.0, 0.0]
        own = mx.zeros_like(flat) if failed else flat
        total = self._summed(mx.concatenate([own, mx.array(slots.reshape(-1))]))
        self._within = False
        every = np.array(total[flat.size :]).reshape(self.size, _WORDS)
        self._took += every[:, 4:]
        _raise(failed)
        for rank, numbers in enumerate(every[:, :4].astype(int).tolist()):
            _raise(from_numbers(rank, *numbers))
        return total[: flat.size]

    def _summed(self, array: mx.array) -> mx.array:
        if self.size == 1:
            return array
        if self.lost:
            raise UserError("another process of this run was lost", hint=LOST_HINT)
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
        if self.patience is None:
            yield
            return
        seconds = max(self.patience, _LONGER * self._longest)

        def give_up() -> None:
            what = f"another process of this run has not answered for {seconds:.0f} s (--ranks-timeout)"
            print_error(UserError(what, hint=LOST_HINT))
            os._exit(1)

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


ALONE = Ranks()


@cache
def started() -> Ranks:
    """Those that this process was started among, by `mlx.launch` or `--ranks`.

    Raises:
        UserError: Where the others cannot be reached.
    """
    if own_rank() is None:
        return ALONE
    try:
        ranks = Ranks(mx.distributed.init(strict=True))
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the other processes of this run cannot be reached: {error}", hint=LOST_HINT) from error
    said = [json.loads(text) for text in ranks.said(json.dumps([platform.node(), this_machine().memory]))]
    names = [name for name, _ in said]
    ranks.memory = min(memory // names.count(name) for name, memory in said)  # several may lie on one machine
    return ranks


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
    yield names


def _raise(failed: Sequence[BaseException]) -> None:
    for failure in failed:
        raise failure
