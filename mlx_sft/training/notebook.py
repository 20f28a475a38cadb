"""A run in a Jupyter notebook: one display with a bar and the curve of the loss, which changes as the run goes on."""

from __future__ import annotations

import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_sft.charts import Series, chart
from mlx_sft.report.metrics import Metrics
from mlx_sft.report.page import LOSS, STEPS
from mlx_sft.run_folder import RunFolder
from mlx_sft.web_page import escaped

_STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
_EVERY = 1.0
"""Seconds between two changes."""


def is_notebook() -> bool:
    """Whether this process is a notebook's kernel, which has IPython loaded."""
    ipython: Any = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class NotebookDisplay:
    """The display of one run, below the cell that trains it."""

    def __init__(self, run: RunFolder, step: int, total_steps: int) -> None:
        self._ipython: Any = import_module("IPython.display")
        self._metrics = Metrics(run, total_steps)
        self._step, self._total = step, total_steps
        self._line = f"step {step}/{total_steps}"
        self._due = 0.0
        self._handle = self._ipython.display(self._ipython.HTML(self._html()), display_id=True)

    def show(self, step: int, total_steps: int, line: str | None = None, *, at_once: bool = False) -> None:
        """Change it, where that is due.

        Args:
            line: Of the newest step, in words.
            at_once: Whether it is due in any case.
        """
        self._step, self._total, self._line = step, total_steps, line or self._line
        if at_once or time.monotonic() >= self._due:
            self._due = time.monotonic() + _EVERY
            self._handle.update(self._ipython.HTML(self._html()))

    def _html(self) -> str:
        if self._metrics.is_cut:  # the run went back
            self._metrics = Metrics(self._metrics.run, self._total)
        self._metrics.follow()
        series = [
            Series(self._metrics.curves["loss"].points, "loss of each step", 0, "faint"),
            Series(self._metrics.smoothed["loss"].curve.points, "smoothed", 0),
            Series(self._metrics.curves["validation"].points, "validation", 1, "line and dots"),
        ]
        bar = f'<progress value="{self._step}" max="{self._total}"></progress><p>{escaped(self._line)}</p>'
        return f'<style>{_STYLE}</style><div class="mlx-sft">{bar}{chart(series, STEPS, LOSS, label="Loss")}</div>'
