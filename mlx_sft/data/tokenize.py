"""A source → its tokenized rows, mapped into memory: found in the cache, or made now by one process or several.

The result is the same for any number of processes. Rows wait in memory only while they are being worked on.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_sft.data.cache import Writer, entry_key, open_store, writing
from mlx_sft.data.dataset import LostRow, Store, pack
from mlx_sft.data.pipeline import Pipeline, ReadingProgress
from mlx_sft.data.readers import Row
from mlx_sft.data.sources import Source
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import cache_folder
from mlx_sft.writing import remove

ROWS_AT_ONCE = 128
CHARACTERS_AT_ONCE = 1 << 19
"""A chunk is closed when its rows hold so many characters: a row of 100 MB goes alone."""
_PARALLEL_FROM = 16_000_000
"""Bytes. To start a process takes some three seconds, and one alone tokenizes about a megabyte a second."""
_MOST_WORKERS = 4

AnyRow = Row | UserError
OnLost = Callable[[LostRow], None]
"""Told of each row without an example, in order; it may raise to end the reading."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A source's tokenized rows, and the digest of its bytes where it has one."""

    store: Store
    sha256: str | None


def tokenized(
    source: Source, pipeline: Pipeline, progress: ReadingProgress, *, workers: int | None, keep: bool, on_lost: OnLost
) -> Tokenized:
    """The tokenized rows of a source.

    Args:
        workers: Processes that share the work; None: as many as its size is worth.
        keep: Use the cache; else, and for a source without a digest, what is written to the disk is gone with this process.

    Raises:
        UserError: where the source cannot be read, or changes meanwhile; and what `on_lost` raises.
    """
    before = _state(source)
    sha256 = source.sha256()
    cache = cache_folder()
    home = cache / entry_key(sha256, source.name, pipeline) if keep and sha256 and cache else None
    store = open_store(home) if home else None
    if store is not None:
        progress.finished(source.name, store.rows, cached=True)
        for lost in store.lost:
            on_lost(lost)
        return Tokenized(store, sha256)
    if home and home.exists():
        progress.note(f"the cache entry {home} is damaged; its rows are tokenized again")
        with suppress(OSError):
            remove(home)
    with writing(home, progress) as folder:
        store = _write(folder, source, pipeline, progress, workers, on_lost)
        if _state(source) != before:
            hint = "run again when nothing writes to it any more"
            raise UserError("it changed while it was being read", where=source.name, hint=hint)
        if home:
            # Where another run was first, or the cache cannot be written to, this entry serves this run alone.
            with suppress(OSError):
                folder.rename(home)
    progress.finished(source.name, store.rows, cached=False)
    return Tokenized(store, sha256)


def _state(source: Source) -> list[tuple[int, int, int]]:
    """What changes with any change of a source's files."""
    source.size()  # raises `UserError` where there is no such file
    states = [file.stat() for file in source.files]
    return [(state.st_size, state.st_mtime_ns, state.st_ino) for state in states]


def _write(
    folder: Path, source: Source, pipeline: Pipeline, progress: ReadingProgress, workers: int | None, on_lost: OnLost
) -> Store:
    size = source.size()
    done = 0

    def count(position: int) -> None:
        nonlocal done
        done = position

    writer = Writer(folder)
    with closing(chunks_tokenized(source.rows(count), pipeline, workers_for(size, workers), progress)) as chunks:
        for chunk in chunks:
            for lost in writer.append(chunk).lost:
                on_lost(lost)
            progress.reading(source.name, writer.rows, done, size)
    return writer.finish()


def workers_for(size: int | None, asked: int | None) -> int:
    """How many processes are to work on an input of `size` bytes."""
    if asked is not None:
        return asked
    if size is None or size < _PARALLEL_FROM:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_WORKERS, cores)


def chunks_tokenized(
    rows: Iterable[AnyRow], pipeline: Pipeline, workers: int, progress: ReadingProgress
) -> Generator[Store]:
    """What becomes of every row, a chunk of rows at a time, in order.

    Args:
        pipeline: Its reader is settled by the first row that has a known format.
    """
    chunks = chunks_of(rows)
    for chunk in chunks:
        settled = _settled_by(chunk, pipeline)
        yield _process(chunk, settled or pipeline)
        if settled:
            pipeline = settled
            break
    if workers > 1:
        try:
            work = pickle.dumps(pipeline)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            progress.note(f"this tokenizer cannot be sent to other processes ({error}); going on in one")
        else:
            yield from _in_processes(chunks, work, workers)
    for chunk in chunks:
        yield _process(chunk, pipeline)


def chunks_of(rows: Iterable[AnyRow]) -> Iterator[list[AnyRow]]:
    """Rows in order, no more at once than a process should be given."""
    chunk: list[AnyRow] = []
    characters = 0
    for row in rows:
        chunk.append(row)
        characters += len(repr(row.value)) if isinstance(row, Row) else 0
        if len(chunk) >= ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _settled_by(chunk: Sequence[AnyRow], pipeline: Pipeline) -> Pipeline | None:
    """The pipeline for rows of the format of the first row of a known one; None where no row has one."""
    for row in chunk:
        if isinstance(row, Row):
            try:
                return replace(pipeline, reader=pipeline.reader.settled_by(row))
            except UserError as error:
                if error.exit_code == USAGE:
                    raise  # a column that was asked for is not there
    return None


def _process(chunk: Sequence[AnyRow], pipeline: Pipeline) -> Store:
    return pack(map(pipeline.process, chunk), pipeline.reader.format_name)


# Several processes


def _in_processes(chunks: Iterator[list[AnyRow]], work: bytes, workers: int) -> Iterator[Store]:
    waiting: deque[Future[Store]] = deque()
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(workers, mp_context=spawn, initializer=_begin, initargs=(work,))
    try:
        for chunk in chunks:
            waiting.append(_submitted(executor, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenExecutor as error:
        raise UserError(
            "a process that shares the tokenizing died or could not start",
            hint="--data-workers 1 (data_workers=1 from Python) does without: it may be for want of memory, or the script "
            'that began it has no `if __name__ == "__main__":`',
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _submitted(executor: ProcessPoolExecutor, chunk: list[AnyRow]) -> Future[Store]:
    # Ctrl-C is for this process, which ends the others; a process begins with the signals blocked that are so here.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return executor.submit(_work, chunk)
    except OSError as error:
        raise BrokenExecutor(str(error)) from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_own: Pipeline
"""That of a worker process."""


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


def _work(chunk: list[AnyRow]) -> Store:
    return _process(chunk, _own)
