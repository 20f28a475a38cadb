"""Trackio, on this machine, or in the Space that its own variable names (`TRACKIO_SPACE_ID`); `trackio show` shows it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

from mlx_sft.training.callbacks.loggers import PROJECT, Logger


class Trackio(Logger):
    """The logger `trackio`. What it says on stdout, which is for results here, is left out."""

    package: ClassVar = "trackio"

    @classmethod
    def raises(cls) -> tuple[type[Exception], ...]:
        return (*super().raises(), sqlite3.Error)

    def begin(self, folder: Path, kept: str, config: Mapping[str, Any], step: int, *, resumed: bool) -> None:
        with redirect_stdout(StringIO()):
            import trackio

            self._run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=f"{folder.name}-{kept}",
                resume="allow" if resumed else "never",
                config=dict(config),
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def end(self, *, finished: bool) -> None:
        import trackio

        with redirect_stdout(StringIO()):
            trackio.finish()
