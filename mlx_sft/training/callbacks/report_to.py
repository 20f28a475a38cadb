"""`--report-to wandb,tensorboard,trackio`: the numbers of a run in another program, under the names that these have elsewhere.

No step is told twice. A run that goes back, or that was killed and goes on from a checkpoint before its last step, takes steps again:
a logger that can takes back what it has of them; one that cannot keeps what it was told first, and is not told again.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, TypeAdapter, field_validator

from mlx_sft.common_settings import public_name
from mlx_sft.config import TrainConfig
from mlx_sft.errors import UserError
from mlx_sft.report.metrics import OF_STEP, number
from mlx_sft.run_folder import RunFolder
from mlx_sft.settings import OnResume, Settings
from mlx_sft.training.callbacks import Callback, Record, TrainingRun
from mlx_sft.training.callbacks.loggers import LOGGERS, Logger

if TYPE_CHECKING:
    from mlx_sft.data.prepare import PreparedData

_NAMES = {"tokens_per_second": "tokens_per_sec"}
_TOLD = ("epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second")
_OF_EVALUATION = ("loss", "perplexity", "token_accuracy", "exact_match")
_PARTS = {"train": "train", "evaluation": "eval"}
"""The kind of a record → what its names begin with."""


class ReportToSettings(Settings):
    """Settings of what is told to other programs."""

    report_to: Annotated[list[str], OnResume.FREE] = Field(default_factory=list)
    """Send losses, rates and the settings to wandb, tensorboard or trackio, or to several: wandb,tensorboard. Nothing is sent where not
    given."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _names_of_loggers(cls, value: Any) -> Any:
        return list(dict.fromkeys(LOGGERS.listed(value, "give names of loggers")))


def values(record: Record) -> dict[str, float]:
    """What a record of a step or an evaluation has to tell, by the names that it has elsewhere: `train/loss`, `eval/perplexity`, ..."""
    is_step = record["kind"] == "train"
    own = sorted(record.keys() - {*OF_STEP, *_OF_EVALUATION, "best"})
    told = {name: number(record, name) for name in (*(_TOLD if is_step else _OF_EVALUATION), *own)}
    if is_step:
        told["peak_gb"] = record["peak_memory_bytes"] / 1e9
    return {
        f"{_PARTS[record['kind']]}/{_NAMES.get(name, name)}": value for name, value in told.items() if value is not None
    }


class ReportTo(Callback):
    """The callback `report-to`. It keeps a text by which a logger knows the run again."""

    name: ClassVar = "report-to"
    Settings: ClassVar = ReportToSettings

    def __init__(self, settings: Any = None) -> None:
        super().__init__(settings)
        self._loggers: dict[str, Logger] = {}
        self._kept: str | None = None
        self._told: dict[str, int] = {}
        """The kind of a record → the highest step that was told, to loggers that take nothing back."""
        self._ended = False

    def check(self, config: TrainConfig, data: PreparedData) -> None:
        for name in self.settings.report_to:
            LOGGERS[name].require(name)
        if self.settings.report_to and config.resume is not None:
            self._told = _highest(RunFolder(config.resume))

    def on_start(self, run: TrainingRun, record: Record) -> None:
        resumed = self._kept is not None
        if not resumed:  # nothing is known to those that will be told
            self._kept, self._told = secrets.token_hex(4), {}
        config = {public_name(name): value for name, value in run.config.model_dump(mode="json").items()}
        for name in self.settings.report_to:
            logger: Logger = LOGGERS[name]()
            try:
                logger.begin(run.folder.path, str(self._kept), config, run.step, resumed=resumed)
            except logger.raises() as error:
                what = f"--report-to {name} cannot begin: {_in_words(error)}"
                if not resumed:
                    hint = "put that right, or leave it out"
                    raise UserError(what, where=str(run.folder.path), hint=hint) from error
                run.console.warn(f"{what}; the run goes on without it")
            else:
                self._loggers[name] = logger

    def on_record(self, run: TrainingRun, record: Record) -> None:
        super().on_record(run, record)
        kind, step = record["kind"], record.get("step", run.step)
        if kind == "rollback":
            self._each(run, lambda logger: logger.go_back(step))
        if kind not in _PARTS or not self._loggers:
            return
        found, is_new = values(record), step > self._told.get(kind, -1)
        self._told[kind] = max(step, self._told.get(kind, -1))
        self._each(run, lambda logger: logger.log(step, found) if is_new or logger.takes_back else None)

    def on_end(self, run: TrainingRun, record: Record) -> None:
        self._ended = True

    def state(self) -> dict[str, Any]:
        return {"kept": self._kept} if self._loggers else {}

    def load_state(self, state: dict[str, Any]) -> None:
        if not self._loggers:
            self._kept = TypeAdapter(Annotated[str, Field(pattern="^[0-9a-f]{8}$")] | None).validate_python(
                state.get("kept")
            )

    def close(self) -> None:
        for logger in self._loggers.values():
            with suppress(*logger.raises()):  # the run has ended; what it could not send any more is not its result
                logger.end(finished=self._ended)

    def _each(self, run: TrainingRun, do: Callable[[Logger], None]) -> None:
        """Do something with each; one that fails is told no more."""
        for name, logger in list(self._loggers.items()):
            try:
                do(logger)
            except logger.raises() as error:
                del self._loggers[name]
                run.console.warn(f"{name} is told no more of this run: {_in_words(error)}")


def _in_words(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _highest(run: RunFolder) -> dict[str, int]:
    """The highest step of each kind that the metrics know of, some of which a continuation takes again."""
    found: dict[str, int] = {}
    for line in run.metric_lines() if run.metrics.is_file() else ():
        with suppress(ValueError, TypeError, KeyError, RecursionError):  # a line that was cut
            record = json.loads(line)
            found[record["kind"]] = max(int(record["step"]), found.get(record["kind"], -1))
    return found
