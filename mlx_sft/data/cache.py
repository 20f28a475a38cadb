"""The cache of tokenized sources: folders that are whole or absent, found by key, mapped into memory.

    <cache>/<key>/               token_ids, spans, table, origins, lost.jsonl; meta.json with their sizes and checksums
    <cache>/.writing-<random>/   one that is being written; its lock ends with its process

Concurrent runs each write their own; whoever ends second takes the first's. Knows nothing of rows, tokenizers or settings.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.dataset import Store
from mlx_sft.data.packing import SPAN, TABLE, moved
from mlx_sft.data.report import Note
from mlx_sft.data.tokenize import LostRow, Processed
from mlx_sft.errors import UserError
from mlx_sft.files import sync, sync_path

UNUSED_DAYS = 30
_META, _LOCK, _LOST = "meta.json", "lock", "lost.jsonl"
_FILES = {"token_ids": np.dtype("<i4"), "spans": SPAN, "table": TABLE, "origins": np.dtype("u1"), _LOST: np.dtype("u1")}
_WRITING = ".writing-mlx-sft-"
_KEY = re.compile("[0-9a-f]{64}")
_NAME = "\0"
"""Stands for the source's name in a note, so that the source may move."""
_PIECE = 1 << 20
_PIECES = 256
"""A checksum reads a file of so many pieces whole, and of a larger one as many, evenly spread, so that it takes no more time."""


def cache_folder() -> Path:
    """$MLX_SFT_CACHE, else mlx-sft in $XDG_CACHE_HOME, else in ~/.cache."""
    if own := os.environ.get("MLX_SFT_CACHE"):
        return Path(own).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (base if base.is_absolute() else Path.home() / ".cache") / "mlx-sft"
    except RuntimeError:  # a user without a home
        return Path(tempfile.gettempdir()) / f"mlx-sft-{os.getuid()}"


class Entry:
    """A tokenized source, mapped into memory: it may be removed from the disk while it is in use.

    Attributes:
        store: Its examples.
        meta: What `Writer.finish` was told.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.meta: dict[str, Any] = json.loads((folder / _META).read_text(encoding="utf-8"))
        arrays = {file: _mapped(folder / file, dtype) for file, dtype in _FILES.items()}
        self.store = Store(
            name, arrays["token_ids"], arrays["spans"], arrays["table"], arrays["origins"], self.meta["rows"]
        )
        self._lost = arrays[_LOST]

    def lost(self) -> Iterator[LostRow]:
        """The rows without examples, in order."""
        first = 0
        for end in np.flatnonzero(self._lost == ord("\n")).tolist():
            record = json.loads(self._lost[first:end].tobytes())
            first = end + 1
            texts = {key: record[key].replace(_NAME, self.store.name) for key in ("origin", "reason", "hint")}
            yield LostRow(record["row"], Note(fate=record["fate"], **texts), record["mixed"])


def open_entry(folder: Path, name: str) -> Entry | None:
    """The entry in a folder, whose last use is now; None where there is none, or what is there is damaged.

    Args:
        name: The source's name as of now.
    """
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        if meta["files"] != {file: _checksum(folder / file) for file in _FILES}:
            return None
        entry = Entry(folder, name)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    with suppress(OSError):  # of a cache that may only be read
        os.utime(folder / _META)
    return entry


def publish(written: Path, folder: Path, name: str) -> Entry:
    """Move a finished entry to its place, and open it; or the one that another run has put there meanwhile."""
    entry = Entry(written, name)
    (written / _LOCK).unlink(missing_ok=True)
    for _ in range(3):
        try:
            written.rename(folder)
        except OSError:
            if found := open_entry(folder, name):
                return found
            remove(folder)  # a damaged one
        else:
            with suppress(OSError):
                sync_path(folder.parent)
            break
    return entry  # where it could not be moved it serves this run alone


@contextmanager
def writing(parent: Path) -> Iterator[Path]:
    """Yield a folder to write an entry in, beneath `parent`; it is removed afterwards, or by a later run if this one is killed.

    Raises:
        OSError: where nothing can be written in `parent`.
        UserError: where writing fails later on.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(parent)
    folder = Path(tempfile.mkdtemp(prefix=_WRITING, dir=parent))
    try:
        locking = folder / f"{_LOCK}ing"
        with locking.open("wb") as lock:
            with suppress(OSError):  # not every file system has locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locking.rename(folder / _LOCK)  # another run, which tries it, finds it locked or not at all
            with write_errors(parent):
                yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def write_errors(parent: Path) -> Iterator[None]:
    """Turn a failed write in the cache into a `UserError` that names a way out."""
    try:
        yield
    except OSError as error:
        elsewhere = "set MLX_SFT_CACHE to a folder elsewhere"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = f"free some space (tokenized rows take about as much as their file), or {elsewhere}"
            raise UserError("the disk is full", where=str(parent), hint=hint) from error
        what = f"cannot write tokenized rows: {error.strerror or error}"
        raise UserError(what, where=str(parent), hint=f"check the disk, or {elsewhere}") from error


def remove_leftovers(parent: Path) -> None:
    """Remove what killed runs were writing."""
    for folder in parent.glob(f"{_WRITING}*"):
        if _is_abandoned(folder):
            shutil.rmtree(folder, ignore_errors=True)


def remove_unused(parent: Path) -> None:
    """Remove entries that no run has used for `UNUSED_DAYS`."""
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for folder in [path for path in parent.iterdir() if _KEY.fullmatch(path.name)]:
        with suppress(OSError):
            if (folder / _META).stat().st_mtime < oldest:
                remove(folder)


def remove(folder: Path) -> None:
    """Remove an entry so that no run finds a part of it."""
    away = folder.with_name(f"{_WRITING}{folder.name[:8]}-{os.getpid()}-{time.monotonic_ns()}")
    with suppress(OSError):
        folder.rename(away)
        shutil.rmtree(away, ignore_errors=True)


class Writer:
    """Writes an entry block by block; nothing of it stays in memory."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._name = name
        self._files = {file: (folder / file).open("xb") for file in _FILES}
        self._tokens = self._spans = self._characters = self.rows = 0

    def append(self, processed: Processed) -> None:
        """Write a chunk's examples and lost rows."""
        block = processed.block
        table = moved(block, tokens=self._tokens, spans=self._spans, characters=self._characters, rows=self.rows)
        for file, content in (
            ("token_ids", np.ascontiguousarray(block.token_ids).data),
            ("spans", block.spans.tobytes()),
            ("table", table.tobytes()),
            ("origins", block.origins),
            (_LOST, b"".join(map(self._line, processed.lost))),
        ):
            self._files[file].write(content)
        self._tokens += len(block.token_ids)
        self._spans += len(block.spans)
        self._characters += len(block.origins)
        self.rows += block.rows

    def _line(self, lost: LostRow) -> bytes:
        note = lost.note
        record = {
            "row": self.rows + lost.number,
            "mixed": lost.mixed,
            "fate": note.fate,
            **{key: getattr(note, key).replace(self._name, _NAME) for key in ("origin", "reason", "hint")},
        }
        return json.dumps(record).encode() + b"\n"

    def finish(self, **meta: Any) -> None:
        """Put everything on the disk, and the meta file last."""
        for file in self._files.values():
            file.flush()
            sync(file.fileno())
            file.close()
        checksums = {file: _checksum(self._folder / file) for file in _FILES}
        content = json.dumps({"rows": self.rows, **meta, "files": checksums}, indent=2) + "\n"
        (self._folder / _META).write_text(content, encoding="utf-8")
        sync_path(self._folder / _META)
        sync_path(self._folder)

    def close(self) -> None:
        """Leave what is unfinished; do nothing after `finish`."""
        for file in self._files.values():
            with suppress(OSError):
                file.close()


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


def _checksum(path: Path) -> list[int]:
    """A file's size and CRC-32, of a large one's samples."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        last, crc = max(0, size - _PIECE), 0
        pieces = -(-size // _PIECE)
        for number in range(min(pieces, _PIECES)):
            file.seek(number * _PIECE if pieces <= _PIECES else last * number // (_PIECES - 1))
            crc = zlib.crc32(file.read(_PIECE), crc)
    return [size, crc]


def _is_abandoned(folder: Path) -> bool:
    """Whether the process that was writing a folder is dead; without a lock, one is given an hour."""
    try:
        with (folder / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except FileNotFoundError:
        with suppress(OSError):
            return folder.stat().st_mtime < time.time() - 3600
    except OSError:
        pass  # its process is alive, or there are no locks here
    return False
