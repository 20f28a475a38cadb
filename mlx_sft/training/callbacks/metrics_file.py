"""`metrics.jsonl`: a line for every step, evaluation, sample, out-of-memory recovery and rollback.

A line is written without a buffer, which could fail when it is closed; a resumed run cuts the file back to what its checkpoint knows of.
"""

from __future__ import annotations

import errno
import json
import os
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar

from pydantic import NonNegativeInt, TypeAdapter

from mlx_sft.errors import UserError
from mlx_sft.files import disk_errors
from mlx_sft.training.callbacks import Callback, Record, TrainingRun
from mlx_sft.writing import open_to_append, sync

_NOT_WRITTEN = ("start", "save", "end")
"""Kinds that a run which was killed and resumed has at other places than one that was not."""


class MetricsFile(Callback):
    """The callback `metrics-file`. Its state is the file's length, once all of it would survive a loss of power."""

    name: ClassVar = "metrics-file"

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._path = Path()
        self._file: FileIO | None = None
        self._kept_bytes = 0

    def on_record(self, run: TrainingRun, record: Record) -> None:
        super().on_record(run, record)
        if record["kind"] in _NOT_WRITTEN or self._file is None:
            return
        try:
            line = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")
        except (TypeError, ValueError) as error:
            what = f"a record of the kind {record['kind']} cannot be written: {error}"
            raise UserError(
                what, where=str(self._path), hint="give plain and finite numbers, texts, lists and dicts"
            ) from error
        with disk_errors(self._path):
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, "no space left for a whole line")

    def on_start(self, run: TrainingRun, record: Record) -> None:
        """Open the file, cut back to its state, or to the last whole line before that where someone has cut it elsewhere."""
        self._path = run.folder.metrics
        with disk_errors(self._path):
            self._file = open_to_append(self._path)
            self._file.seek(0)
            self._cut(self._file, self._file.read(min(self._kept_bytes, self._path.stat().st_size)).rfind(b"\n") + 1)

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
