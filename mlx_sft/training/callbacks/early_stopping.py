"""`--early-stop N`: a run ends after so many evaluations without a better validation loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field, NonNegativeInt

from mlx_sft.config import TrainConfig
from mlx_sft.errors import USAGE, UserError
from mlx_sft.settings import Settings
from mlx_sft.training.callbacks import Callback, Record, TrainingRun

if TYPE_CHECKING:
    from mlx_sft.data.prepare import PreparedData


class EarlyStoppingSettings(Settings):
    """Settings of early stopping."""

    early_stop: int | None = Field(default=None, ge=1)
    """Stop after so many evaluations without a better validation loss."""


class _State(BaseModel):
    without_better: NonNegativeInt = 0
    stopped_of: int | None = None
    """The planned steps of the run when it was stopped."""


class EarlyStopping(Callback):
    """The callback `early-stopping`."""

    name: ClassVar = "early-stopping"
    Settings: ClassVar = EarlyStoppingSettings

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._state = _State()

    def check(self, config: TrainConfig, data: PreparedData) -> None:
        if self.settings.early_stop and not data.valid:
            hint = "give --valid FILE or --valid-fraction 0.05"
            raise UserError("--early-stop needs validation rows", hint=hint, exit_code=USAGE)

    def on_start(self, run: TrainingRun, record: Record) -> None:
        """A run that was stopped and is given more steps waits for a better evaluation anew."""
        if self._state.stopped_of not in (None, run.total_steps):
            self._state = _State()

    def on_evaluation(self, run: TrainingRun, record: Record) -> None:
        state = self._state
        state.without_better = 0 if record["best"] else state.without_better + 1
        if self.settings.early_stop and state.without_better >= self.settings.early_stop:
            state.stopped_of = run.total_steps
            run.stop("validation got no better")

    def state(self) -> dict[str, Any]:
        return self._state.model_dump()

    def load_state(self, state: dict[str, Any]) -> None:
        self._state = _State.model_validate(state)
