"""A Mac that trains does not fall asleep for want of a user: macOS's own `caffeinate` runs beside the run."""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import Annotated, Any, ClassVar

from mlx_sft.settings import OnResume, Settings
from mlx_sft.training.callbacks import Callback, Record, TrainingRun


class KeepAwakeSettings(Settings):
    """Settings of what keeps a Mac awake."""

    keep_awake: Annotated[bool, OnResume.FREE] = True
    """Keep a Mac from falling asleep while it trains; its display may sleep, and a closed lid still puts it to sleep."""


class KeepAwake(Callback):
    """The callback `keep-awake`. It never keeps the display on: a GPU that also draws is taken away from long computations."""

    name: ClassVar = "keep-awake"
    Settings: ClassVar = KeepAwakeSettings

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._process: subprocess.Popen[bytes] | None = None

    def on_start(self, run: TrainingRun, record: Record) -> None:
        program = shutil.which("caffeinate")
        if program is None or not self.settings.keep_awake:
            return
        nothing = subprocess.DEVNULL
        # -i: against idle sleep alone. -w: until this process is gone, however it goes.
        command = [program, "-i", "-w", str(os.getpid())]
        try:
            self._process = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing)  # noqa: S603
        except OSError as error:
            run.console.warn(
                f"this Mac may fall asleep while it trains: caffeinate cannot be started ({error.strerror})"
            )
            return
        run.console.note("this Mac stays awake while it trains; a closed lid still puts it to sleep")

    def close(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
