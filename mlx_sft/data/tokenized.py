"""A source → its tokenized rows, mapped into memory: found in the cache, or made now.

Knows when the cache serves and when it does not; knows nothing of which rows are kept.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_sft.data.cache import (
    Entry,
    Writer,
    cache_folder,
    open_entry,
    publish,
    remove,
    remove_unused,
    write_errors,
    writing,
)
from mlx_sft.data.key import entry_key, file_state
from mlx_sft.data.pipeline import Pipeline, Progress
from mlx_sft.data.sources import Source
from mlx_sft.data.tokenize import LostRow, Reading, workers_for
from mlx_sft.errors import UserError

OnLost = Callable[[LostRow], None]
"""Told of each row without an example, in order; it may raise to end the reading."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """A source's tokenized rows, the digest of its bytes, and the format of its rows where one is known."""

    entry: Entry
    sha256: str | None
    row_format: str | None


def tokenized(
    source: Source, pipeline: Pipeline, progress: Progress, *, workers: int | None, keep: bool, on_lost: OnLost
) -> Tokenized:
    """The tokenized rows of a source.

    Args:
        workers: Processes that share the work; None: as many as its size is worth.
        keep: Use the cache; else, and for a source without a digest, what is written to the disk is gone with this process.

    Raises:
        UserError: where the source cannot be read, or changes meanwhile; and what `on_lost` raises.
    """
    root = cache_folder() if keep else None
    before = file_state(source)
    sha256 = source.sha256()
    key = entry_key(sha256, source.name, pipeline) if root and sha256 else None
    home = root / key if root and key else None
    entry = _cached(home, source.name, progress) if home else None
    if entry is not None:
        for lost in entry.lost():
            on_lost(lost)
    else:
        with ExitStack() as stack:
            written, home = _place(home, stack, progress)
            _write(written, source, pipeline, progress, workers, on_lost)
            if file_state(source) != before:
                hint = "run again when nothing writes to it any more"
                raise UserError("it changed while it was being read", where=source.name, hint=hint)
            entry = publish(written, home, source.name) if home else Entry(written, source.name)
            if home:
                remove_unused(home.parent)
        progress.finished(source.name, entry.store.rows, cached=False)
    return Tokenized(entry, sha256, entry.meta["row_format"])


def _cached(home: Path, name: str, progress: Progress) -> Entry | None:
    entry = open_entry(home, name)
    if entry is not None:
        progress.finished(name, entry.store.rows, cached=True)
    elif home.exists():
        progress.note(f"the cache entry {home} is damaged; its rows are tokenized again")
        remove(home)
    return entry


def _place(home: Path | None, stack: ExitStack, progress: Progress) -> tuple[Path, Path | None]:
    """A folder to write in, and where it is to be moved: nowhere if the cache cannot be written to."""
    if home is not None:
        try:
            return stack.enter_context(writing(home.parent)), home
        except OSError as error:
            progress.note(
                f"cannot write to the cache {home.parent} ({error.strerror or error}): tokenized rows are not kept; "
                "MLX_SFT_CACHE names another folder"
            )
    parent = Path(tempfile.gettempdir())
    with write_errors(parent):
        return stack.enter_context(writing(parent)), None


def _write(
    folder: Path, source: Source, pipeline: Pipeline, progress: Progress, workers: int | None, on_lost: OnLost
) -> None:
    size = source.size()
    done = 0

    def count(position: int) -> None:
        nonlocal done
        done = position

    reading = Reading(source.rows(count), pipeline, source.name)
    writer = Writer(folder, source.name)
    blocks = reading.blocks(workers_for(size, workers), progress)
    try:
        for processed in blocks:
            for lost in processed.lost:
                on_lost(replace(lost, number=writer.rows + lost.number))
            writer.append(processed)
            progress.reading(source.name, writer.rows, done, size)
        writer.finish(row_format=reading.row_format)
    finally:
        blocks.close()
        writer.close()
