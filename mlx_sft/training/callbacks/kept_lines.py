"""A file that grows by lines of JSON and that a resumed run cuts back to what its checkpoint knows of.

A line is written without a buffer, which could fail when it is closed.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt, TypeAdapter

from mlx_sft.errors import UserError
from mlx_sft.files import disk_errors
from mlx_sft.writing import open_to_append, sync


class KeptLines:
    """The file. Its state is its length, once all of it would survive a loss of power."""

    def __init__(self) -> None:
        self._path = Path()
        self._file: FileIO | None = None
        self._kept_bytes = 0

    def open(self, path: Path) -> None:
        """Open it, cut back to its state, or to the last whole line before that where someone has cut it elsewhere."""
        self._path = path
        with disk_errors(path):
            self._file = open_to_append(path)
            self._file.seek(0)
            self._cut(self._file, self._file.read(min(self._kept_bytes, path.stat().st_size)).rfind(b"\n") + 1)

    def write(self, records: Iterable[dict[str, Any]], what: str) -> None:
        """A line of each, all at once, where the file is open; raises `UserError`, which calls them `what`, where one cannot be JSON."""
        if self._file is None:
            return
        try:
            text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        except (TypeError, ValueError) as error:
            hint = "give plain and finite numbers, texts, lists and dicts"
            raise UserError(f"{what} cannot be written: {error}", where=str(self._path), hint=hint) from error
        data = text.encode("utf-8", "backslashreplace")
        with disk_errors(self._path):
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, "no space left for a whole line")

    def state(self) -> dict[str, Any]:
        if self._file is None:
            return {"bytes": self._kept_bytes}
        with disk_errors(self._path):
            sync(self._file.fileno())
        return {"bytes": self._file.tell()}

    def load_state(self, state: dict[str, Any]) -> None:
        self._kept_bytes = TypeAdapter(NonNegativeInt).validate_python(state.get("bytes", 0))
        if self._file is not None:
            with disk_errors(self._path):
                self._cut(self._file, min(self._kept_bytes, self._path.stat().st_size))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    @staticmethod
    def _cut(file: FileIO, kept_bytes: int) -> None:
        file.truncate(kept_bytes)
        file.seek(0, os.SEEK_END)
