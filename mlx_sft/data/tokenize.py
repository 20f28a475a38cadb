"""Rows → packed blocks of outcomes, in order, by one process or by several; the result is the same.

Knows processes; knows nothing of files or of what is done with a row. Rows wait in memory only while they are being worked on,
and none is lost where a process cannot start or dies: this one goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from mlx_sft.data.packing import Block, PackedRow, pack
from mlx_sft.data.pipeline import Outcome, Pipeline, Progress
from mlx_sft.data.readers import Row
from mlx_sft.data.report import Note
from mlx_sft.errors import USAGE, UserError

ROWS_AT_ONCE = 128
CHARACTERS_AT_ONCE = 1 << 19
"""A chunk is closed when its rows hold so many characters: a row of 100 MB goes alone."""
_PARALLEL_FROM = 16_000_000
"""Bytes. To start a process takes some three seconds, and one alone tokenizes about a megabyte a second."""
_MOST_WORKERS = 4

AnyRow = Row | UserError


@dataclass(frozen=True, slots=True)
class LostRow:
    """A row without an example: its number from 0, the note that says why, and whether it has another format than others."""

    number: int
    note: Note
    mixed: bool


@dataclass(frozen=True, slots=True)
class Processed:
    """A chunk's examples, and its other rows, counted from its beginning."""

    block: Block
    lost: list[LostRow]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], name: str) -> Processed:
        rows = [PackedRow(outcome.origin, outcome.examples, outcome.sign_mask) for outcome in outcomes]
        lost = [LostRow(number, one.note, one.mixed) for number, one in enumerate(outcomes) if one.note]
        return cls(pack(rows, name), lost)


def workers_for(size: int | None, asked: int | None) -> int:
    """How many processes are to work on an input of `size` bytes."""
    if asked is not None:
        return asked
    if size is None or size < _PARALLEL_FROM:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_WORKERS, cores)


class Reading:
    """The reading of one source.

    Args:
        rows: Of the source.
        pipeline: What is done with each; its reader is settled by the first row that has a known format.
        name: The source's.

    Attributes:
        row_format: The name of the rows' format, known once they are read.
    """

    def __init__(self, rows: Iterable[AnyRow], pipeline: Pipeline, name: str) -> None:
        self._rows = iter(rows)
        self._pipeline = pipeline
        self._name = name

    @property
    def row_format(self) -> str | None:
        return self._pipeline.reader.format_name

    def blocks(self, workers: int, progress: Progress) -> Generator[Processed]:
        """Every row's outcome, a chunk of rows at a time, in order."""
        yield from self._before_settled()
        chunks = chunks_of(self._rows)
        if workers > 1:
            yield from _in_processes(chunks, self._pipeline, self._name, workers, progress)
        for chunk in chunks:
            yield _process(chunk, self._pipeline, self._name)

    def _before_settled(self) -> Iterator[Processed]:
        for row in self._rows:
            if isinstance(row, Row):
                try:
                    reader = self._pipeline.reader.settled_by(row)
                except UserError as error:
                    if error.exit_code == USAGE:
                        raise  # a column that was asked for is not there
                    reader = None
                if reader is not None and reader.format_name is not None:
                    self._pipeline = replace(self._pipeline, reader=reader)
                    self._rows = chain([row], self._rows)
                    return
            yield _process([row], self._pipeline, self._name)


def chunks_of(rows: Iterable[AnyRow]) -> Iterator[list[AnyRow]]:
    """Rows in order, no more at once than a process should be given."""
    chunk: list[AnyRow] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += _characters(row.value) if isinstance(row, Row) else 0
        if len(chunk) >= ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _characters(value: Any) -> int:
    """About how much text is in a JSON value."""
    total, values = 0, [value]
    while values:
        value = values.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, dict):
            values.extend(value.values())
        elif isinstance(value, list):
            total += len(value)
            values.extend(value)
    return total


def _process(rows: Sequence[AnyRow], pipeline: Pipeline, name: str) -> Processed:
    return Processed.of([pipeline.process(row) for row in rows], name)


def _in_processes(
    chunks: Iterator[list[AnyRow]], pipeline: Pipeline, name: str, workers: int, progress: Progress
) -> Iterator[Processed]:
    """The chunks' outcomes by several processes; where these fail, of as many chunks as were given to them."""
    try:
        work = pickle.dumps((pipeline, name))
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        progress.note(f"this tokenizer cannot be sent to other processes ({error}); going on in one")
        return
    waiting: deque[tuple[list[AnyRow], Future[Processed] | None]] = deque()
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_begin, initargs=(work,))
    try:
        for chunk in chunks:
            future = _submitted(executor, chunk)
            waiting.append((chunk, future))
            if future is None:
                break
            if len(waiting) > 2 * workers:
                processed = _result(waiting[0][1])
                if processed is None:
                    break
                waiting.popleft()
                yield processed
        failed = False
        while waiting:
            chunk, future = waiting.popleft()
            processed = None if failed else _result(future)
            if processed is None and not failed:
                failed = True
                progress.note("the processes that should share the work cannot start or died; going on in one")
            yield processed or _process(chunk, pipeline, name)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _submitted(executor: ProcessPoolExecutor, chunk: list[AnyRow]) -> Future[Processed] | None:
    # Ctrl-C is for this process, which ends the others; a process begins with the signals blocked that are so here.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(_work, chunk)
    except (BrokenExecutor, OSError):
        return None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _result(future: Future[Processed] | None) -> Processed | None:
    """A chunk's outcomes; None where its process could not be started or died."""
    try:
        return future.result() if future else None
    except BrokenExecutor:
        return None


# In a worker process

_own: tuple[Pipeline, str]


def _begin(work: bytes) -> None:
    """Take up the work, until the process that shares it out ends."""
    global _own
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _own = pickle.loads(work)  # noqa: S301 (the process that began this one made it)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(rows: list[AnyRow]) -> Processed:
    pipeline, name = _own
    return _process(rows, pipeline, name)
