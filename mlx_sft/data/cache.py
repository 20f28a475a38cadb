"""The cache of tokenized sources: a folder each, found by a key of all that its rows depend on, and mapped into memory.

    <cache>/<key>/          the arrays of a `Store`, rows.json with what is not in them, and the checksums of all these files
    <cache>/.writing-.../   one that is being written; it is renamed to its key when it is complete

Nothing here is needed again: what is damaged, unused for a month or left by a killed run is removed, and made anew when asked for.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from mlx_sft.data.dataset import CONTENTS, TABLE, LostRow, Store
from mlx_sft.data.example import SPAN
from mlx_sft.data.key_counts import KeyCount, KeyCounts
from mlx_sft.data.pipeline import Pipeline, ReadingProgress
from mlx_sft.data.splitting import BREAK
from mlx_sft.errors import UserError
from mlx_sft.files import code_digest, open_regular, read_json
from mlx_sft.registry import FORMATS
from mlx_sft.writing import new_file, open_to_append, private_folder, remove

UNUSED_DAYS = 30
_ARRAYS = {
    "token_ids": np.dtype("<i4"),
    "spans": SPAN,
    "breaks": BREAK,
    "table": TABLE,
    "contents": CONTENTS,
    "origins": np.dtype("u1"),
}
_ROWS, _CHECKSUMS = "rows.json", "checksums.json"
_KEY = re.compile("[0-9a-f]{64}")
_PACKAGES = ("transformers", "tokenizers", "jinja2")
_PIECE = 1 << 20


# The key


def entry_key(sha256: str, name: str, pipeline: Pipeline) -> str:
    """SHA-256 of all that could change what the pipeline makes of a source, or the names of its rows.

    Args:
        sha256: Of the source's bytes.
        name: The source's.
    """
    encoder, reader, objective = pipeline.encoder, pipeline.reader, pipeline.objective
    others = [row_format for known, row_format in FORMATS.items() if known not in FORMATS.built_in()]
    parts = {
        "source": [sha256, name],
        "tokenizer": _tokenizer(encoder.tokenizer),
        "end_tokens": sorted(encoder.end_tokens),
        "day": _day(encoder.tokenizer.chat_template, encoder.settings.template_kwargs),
        "encoding": asdict(encoder.settings),
        "format": [
            reader.format,
            dict(reader.columns),
            reader.consecutive_turns,
            dict(reader.roles),
            *(_module_digest(row_format.read) for row_format in others),
        ],
        "objective": objective and [objective.name, objective.settings.model_dump(), _module_digest(type(objective))],
        "special_in_content": pipeline.special_in_content,
        "ignore_unknown_keys": pipeline.keys.ignore_unknown,
        "code": [code_digest(Path(__file__).parent), platform.python_version(), *map(version, _PACKAGES)],
    }
    return hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()


def _tokenizer(tokenizer: Any) -> list[Any]:
    """All that decides how a tokenizer cuts text and writes a conversation."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = json.loads(backend.to_str()) if backend else {}
    return [
        type(tokenizer).__name__,
        # How to cut and pad is left out: the first text that is tokenized without changes both.
        {part: value for part, value in whole.items() if part not in ("truncation", "padding")},
        tokenizer.special_tokens_map,
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        getattr(tokenizer, "split_special_tokens", False),
        tokenizer.chat_template,
    ]


def _day(template: Any, template_kwargs: dict[str, Any]) -> str | None:
    """Today, where the template writes it by itself: where it asks for it, and goes by no day that it is given."""
    text = json.dumps(template)
    is_given = "date_string" in text and "date_string" in template_kwargs
    return f"{datetime.now():%Y-%m-%d}" if "strftime_now" in text and not is_given else None


def _module_digest(thing: Any) -> str:
    """SHA-256 of the file that a function or class is from; never twice the same where there is none, as in a notebook."""
    file = getattr(sys.modules.get(thing.__module__), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else repr(time.time_ns())


# An entry


@dataclass(frozen=True)
class _About:
    """What `rows.json` holds."""

    rows: Annotated[int, Field(ge=0, le=2**53)]
    row_format: str | None
    lost: list[LostRow]
    keys: list[KeyCount]


_ABOUT = TypeAdapter(_About)


def open_store(folder: Path) -> Store | None:
    """The rows in a folder, which is used now; None where there is no entry, or a damaged one."""
    try:
        checksums = {name: _checksum(folder / name) for name in (*_ARRAYS, _ROWS)}
        if read_json(folder / _CHECKSUMS) != checksums:
            return None
        store = _mapped_store(folder)
    except (OSError, ValueError, UserError):
        return None
    if not _is_whole(store):
        return None
    with suppress(OSError):  # of a cache that may only be read
        os.utime(folder)
    return store


def _mapped_store(folder: Path) -> Store:
    """It stays usable where its files are removed from the disk."""
    with open_regular(folder / _ROWS) as file:
        about = _ABOUT.validate_python(json.load(file))  # Rust reads no half characters, as of files' names
    arrays = {name: _mapped(folder / name, dtype) for name, dtype in _ARRAYS.items()}
    return Store(**arrays, rows=about.rows, lost=about.lost, row_format=about.row_format, keys=about.keys)


def _is_whole(store: Store) -> bool:
    """Whether the parts that its table names are there, and its numbers can be those of tokens."""
    table, contents = store.table, store.contents
    if len(table) != len(contents):
        return False
    parts = (
        (store.token_ids, table["first_token"], contents["length"]),
        (store.spans, table["first_span"], table["spans"]),
        (store.breaks, table["first_break"], table["breaks"]),
        (store.origins, table["first_character"], table["characters"]),
        (range(store.rows), table["row"], 1),
    )
    there = all(np.all((first >= 0) & (size >= 0) & (first <= len(part) - size)) for part, first, size in parts)
    counts = (contents[name] for name in ("needed_length", "supervised_tokens"))
    counted = all(np.all((count >= 0) & (count <= contents["length"])) for count in counts)
    weights = bool(np.all(np.isfinite(store.spans["weight"])))
    return there and counted and weights and store.token_ids.min(initial=0) >= 0


def _mapped(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


def _checksum(path: Path) -> int:
    checksum = 0
    with open_regular(path) as file:
        while piece := file.read(_PIECE):
            checksum = zlib.crc32(piece, checksum)
    return checksum


class Writer:
    """Writes an entry chunk by chunk; of what it wrote, only the lost rows and the counts of keys stay in memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._checksums = dict.fromkeys(_ARRAYS, 0)
        self._lengths = dict.fromkeys(_ARRAYS, 0)
        self._lost: list[LostRow] = []
        self._keys = KeyCounts()
        self._row_format: str | None = None
        self.rows = 0
        for name in _ARRAYS:
            new_file(folder / name).close()

    def append(self, chunk: Store) -> Store:
        """Write a chunk's rows; returns them as they are counted in the whole."""
        lengths = self._lengths
        tokens, spans, breaks, characters = (lengths[name] for name in ("token_ids", "spans", "breaks", "origins"))
        chunk = chunk.behind(tokens, spans, breaks, characters, self.rows)
        for name in _ARRAYS:
            array: NDArray[Any] = getattr(chunk, name)
            content = array.tobytes()
            with open_to_append(self._folder / name) as file:
                file.write(content)
            self._checksums[name] = zlib.crc32(content, self._checksums[name])
            lengths[name] += len(array)
        self._lost += chunk.lost
        self._keys.add(chunk.keys)
        self._row_format = chunk.row_format
        self.rows += chunk.rows
        return chunk

    def finish(self) -> Store:
        """The whole, mapped into memory."""
        about = _About(self.rows, self._row_format, self._lost, self._keys.counts)
        with new_file(self._folder / _ROWS) as file:
            file.write(json.dumps(asdict(about)).encode())
        checksums = self._checksums | {_ROWS: _checksum(self._folder / _ROWS)}
        with new_file(self._folder / _CHECKSUMS) as file:
            file.write(json.dumps(checksums).encode())
        return _mapped_store(self._folder)


# Its folder


@contextmanager
def writing(home: Path | None, progress: ReadingProgress) -> Iterator[Path]:
    """Yield a folder to write an entry in; it is removed when the block ends, unless it has been moved to its home.

    Args:
        home: Where it is to be moved; None for an entry that is not kept, as are all where the cache cannot be written to.

    Raises:
        UserError: where writing fails.
    """
    with write_errors(Path(tempfile.gettempdir())):
        temporary = _beside(home, progress) or private_folder()
    with temporary as folder, write_errors(Path(folder).parent):
        yield Path(folder)


def _beside(home: Path | None, progress: ReadingProgress) -> tempfile.TemporaryDirectory[str] | None:
    if home is None:
        return None
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        remove_unused(home.parent)
        return private_folder(home.parent)
    except OSError as error:
        progress.note(
            f"cannot write to the cache {home.parent} ({error.strerror or error}): tokenized rows are not kept; "
            "MLX_SFT_CACHE names another folder"
        )
        return None


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


def remove_unused(parent: Path) -> None:
    """Remove what no run has used for `UNUSED_DAYS`."""
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for folder in parent.iterdir():
        if _KEY.fullmatch(folder.name):
            with suppress(OSError):
                if folder.lstat().st_mtime < oldest:
                    remove(folder)
