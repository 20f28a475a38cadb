"""Weights & Biases. Where and how it sends is its own business: `WANDB_MODE=offline`, `WANDB_PROJECT`, `WANDB_DIR`, `wandb login`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mlx_sft.training.callbacks.loggers import PROJECT, Logger


class WandB(Logger):
    """The logger `wandb`."""

    package: ClassVar = "wandb"

    @classmethod
    def raises(cls) -> tuple[type[Exception], ...]:
        import wandb

        return (*super().raises(), wandb.Error)

    def begin(self, folder: Path, kept: str, config: Mapping[str, Any], step: int, *, resumed: bool) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", folder.name),
            id=kept,
            resume="allow",
            config=dict(config),
            # The terminal is the run's own, and no code is sent that nobody asked to send.
            settings=wandb.Settings(silent=True, console="off", save_code=False, disable_git=True),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def end(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
