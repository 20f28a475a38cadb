"""`metrics.jsonl`: a line for every step, evaluation, sample, out-of-memory recovery and rollback."""

from __future__ import annotations

from typing import Any, ClassVar

from mlx_sft.training.callbacks import Callback, Record, TrainingRun
from mlx_sft.training.callbacks.kept_lines import KeptLines

_NOT_WRITTEN = ("start", "save", "end")
"""Kinds that a run which was killed and resumed has at other places than one that was not."""


class MetricsFile(Callback):
    """The callback `metrics-file`."""

    name: ClassVar = "metrics-file"

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._lines = KeptLines()

    def on_record(self, run: TrainingRun, record: Record) -> None:
        super().on_record(run, record)
        if record["kind"] not in _NOT_WRITTEN:
            self._lines.write([record], f"a record of the kind {record['kind']}")

    def on_start(self, run: TrainingRun, record: Record) -> None:
        self._lines.open(run.folder.metrics)

    def state(self) -> dict[str, Any]:
        return self._lines.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self._lines.load_state(state)

    def close(self) -> None:
        self._lines.close()
