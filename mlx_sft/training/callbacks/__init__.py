"""What hears of a run as it goes, and may ask it to stop. A further callback is one more file with a subclass of `Callback`.

The built-in ones in `ENTRIES` are always on. One of another package is chosen with `--callbacks NAME`; an object of one's own is given to
`train(config, callbacks=[...])`.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import ValidationError

from mlx_sft.config import TrainConfig
from mlx_sft.errors import USAGE, UserError
from mlx_sft.registry import CALLBACKS
from mlx_sft.run_folder import RunFolder
from mlx_sft.settings import Settings as NoSettings
from mlx_sft.settings import first_problem

if TYPE_CHECKING:
    import mlx.nn as nn

    from mlx_sft.console import Console
    from mlx_sft.data.prepare import PreparedData
    from mlx_sft.methods import Parameters

ENTRIES = {
    "metrics-file": "mlx_sft.training.callbacks.metrics_file:MetricsFile",
    "terminal": "mlx_sft.training.callbacks.terminal:Terminal",
    "divergence": "mlx_sft.training.callbacks.divergence:Divergence",
    "early-stopping": "mlx_sft.training.callbacks.early_stopping:EarlyStopping",
    "samples": "mlx_sft.training.callbacks.samples:Samples",
    "keep-awake": "mlx_sft.training.callbacks.keep_awake:KeepAwake",
    "power": "mlx_sft.training.callbacks.power:Power",
    "time-limit": "mlx_sft.training.callbacks.time_limit:TimeLimit",
    "report-page": "mlx_sft.training.callbacks.report_page:ReportPage",
    "report-to": "mlx_sft.training.callbacks.report_to:ReportTo",
}

_BEFORE_OTHERS = ("metrics-file", "terminal", "report-to")
"""Those that hear of a record first, so that it is written, shown and sent whatever another callback does about it."""

Record = dict[str, Any]
"""A line of `metrics.jsonl`, or `{"kind": "start" | "save" | "end", ...}`, which are not written there."""

_HEARD_BY = {
    "start": "on_start",
    "train": "on_step",
    "evaluation": "on_evaluation",
    "sample": "on_sample",
    "save": "on_save",
    "end": "on_end",
}
"""The kind of a record → the method that hears of it."""


class TrainingRun(Protocol):
    """A run, as a callback sees it.

    Attributes:
        config: Its settings.
        folder: Its folder.
        step: Optimizer steps taken.
        total_steps: Those planned.
        parameters: The trained arrays as they are now, by name.
        model: The model, with these parameters in it.
        tokenizer: The model's tokenizer.
        console: What the terminal shows.
    """

    config: TrainConfig
    parameters: Parameters
    console: Console

    @property
    def folder(self) -> RunFolder: ...
    @property
    def step(self) -> int: ...
    @property
    def total_steps(self) -> int: ...
    @property
    def model(self) -> nn.Module: ...
    @property
    def tokenizer(self) -> Any: ...

    def writes(self, token_ids: list[int], most: int, *, base: bool = False) -> Generator[tuple[str, str | None]]:
        """What the model writes by itself, greedily, after these tokens: its text piece by piece, with the last one
        why it ended: `stop` or `length`.

        Args:
            most: Tokens of it.
            base: By the model as training began; only before the first step. Where training starts from an adapter that has it, else not.

        Raises:
            UserError: If the method does not say how generation starts with it, or the memory or the tokenizer fails.
        """

    def stop(self, reason: str) -> None:
        """End the run after this step, evaluated and with a checkpoint; the reason is shown."""

    def emit(self, record: Record) -> None:
        """Tell every callback; `{"kind": "sample", ...}` is heard by `on_sample`, and all but start, save and end are written."""

    def go_back(self, step: int, *, rate_factor: float) -> None:
        """Undo all steps after a checkpoint, and go on from there with the schedule's learning rate times a factor."""

    def shorten(self, total_steps: int) -> None:
        """Plan so many steps in all from now on, over which the learning rate runs its course; only when a checkpoint was just written."""

    def check_stop(self) -> None:
        """What waits calls this now and then: it ends the run, saved, where that was asked for."""

    def suspect(self, steps: int) -> None:
        """Keep a checkpoint from before the last so many steps, which may have to be undone."""


class Callback:
    """One callback; each method may be left as it is.

    What `state` returns is kept in every checkpoint and given to `load_state` when the run goes on from it, so that a run that was
    killed and resumed ends as if it had not been. A `UserError` ends the run with its message. Whatever is raised, the step is saved, and
    the record that the callback was told of then is told again when the run goes on.

    Attributes:
        name: By which `--callbacks` chooses it, and under which its state is kept.
        Settings: Its settings, each of which becomes an option.
        settings: The chosen ones.
        may_go_back: Whether it may call `run.go_back`, so that a run must begin with a checkpoint.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[NoSettings]] = NoSettings
    may_go_back: bool = False

    def __init__(self, settings: Any = None) -> None:
        self.settings: Any = settings if settings is not None else self.Settings()

    def check(self, config: TrainConfig, data: PreparedData) -> None:
        """Raise `UserError` where the callback cannot do its work in this run; nothing is written by then."""

    def on_start(self, run: TrainingRun, record: Record) -> None:
        """Before the first step, or the first after a resume: `step`, `total_steps`."""

    def on_step(self, run: TrainingRun, record: Record) -> None:
        """After an optimizer step: `step`, `epoch`, `loss` (None where it was skipped), `learning_rate`, `grad_norm`, `tokens`, ..."""

    def on_evaluation(self, run: TrainingRun, record: Record) -> None:
        """After an evaluation: `step`, `loss`, `perplexity`, `token_accuracy`, `exact_match`, `best`, ..."""

    def on_sample(self, run: TrainingRun, record: Record) -> None:
        """After a callback has emitted a sample of what the model writes."""

    def on_save(self, run: TrainingRun, record: Record) -> None:
        """After a checkpoint is on the disk: `step`, `path`."""

    def on_end(self, run: TrainingRun, record: Record) -> None:
        """After the last step, with the result in its place: `step`, `loss`, `best_loss`, `stopped` (why, or None)."""

    def on_record(self, run: TrainingRun, record: Record) -> None:
        """Every record; calls the method for its kind. Others are `out_of_memory`, `interrupted` and `rollback`."""
        if heard_by := _HEARD_BY.get(record["kind"]):
            getattr(self, heard_by)(run, record)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON; empty for nothing."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""

    def close(self) -> None:
        """Let go of files and connections; called however the run ends."""


class Callbacks:
    """All callbacks of a run, in the order in which they hear."""

    def __init__(self, callbacks: Iterable[Callback]) -> None:
        self._callbacks = list(callbacks)
        for callback in self._callbacks:
            if not isinstance(callback, Callback):
                hint = "give objects of a subclass of `mlx_sft.training.callbacks.Callback`: Mine(), not Mine"
                raise UserError(f"{callback!r} is no callback", where="callbacks", hint=hint, exit_code=USAGE)
        names = [self._key(callback) for callback in self._callbacks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            hint = "give it once, or give the classes names of their own"
            raise UserError(f"two callbacks are named {twice}", where="callbacks", hint=hint, exit_code=USAGE)

    @classmethod
    def of_run(cls, config: TrainConfig, given: Sequence[Callback]) -> Callbacks:
        """The built-in ones, those that the configuration names, and those that are given."""
        own = [name for name in CALLBACKS.built_in() if name not in _BEFORE_OTHERS]
        names = dict.fromkeys((*_BEFORE_OTHERS, *config.callbacks))
        return cls([*(_made(name, config) for name in names), *given, *(_made(name, config) for name in own)])

    @property
    def may_go_back(self) -> bool:
        return any(callback.may_go_back for callback in self._callbacks)

    def check(self, config: TrainConfig, data: PreparedData) -> None:
        for callback in self._callbacks:
            callback.check(config, data)

    def emit(self, run: TrainingRun, record: Record, heard: list[str] | None = None) -> None:
        """Tell every callback of a record, which gets the time of day (UTC); raises `UserError` for one that is none.

        Args:
            heard: The names of those that know of it already; each that is told now is added.
        """
        heard = [] if heard is None else heard
        if not isinstance(record.get("kind"), str):
            raise UserError(f"a callback's record has no kind: {record}", hint='emit {"kind": "sample", ...}')
        record.setdefault("time", f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z")
        for callback in self._callbacks:
            if (name := self._key(callback)) not in heard:
                callback.on_record(run, record)
                heard.append(name)

    def state(self) -> dict[str, dict[str, Any]]:
        """The state of each that has one, by name."""
        states = {self._key(callback): state for callback in self._callbacks if (state := callback.state())}
        for name, state in states.items():
            try:
                json.dumps(state, allow_nan=False)
            except (TypeError, ValueError) as error:
                what = f"the state of the callback {name} cannot be kept in a checkpoint: {error}"
                raise UserError(what, hint="whoever wrote it can give plain numbers, texts, lists and dicts") from error
        return states

    def load_state(self, states: dict[str, dict[str, Any]]) -> list[str]:
        """Give each its state; returns the names of states that nobody takes.

        Raises:
            UserError: For a state that a callback cannot take up.
        """
        for callback in self._callbacks:
            name = self._key(callback)
            try:
                callback.load_state(states.get(name, {}))
            except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
                problem = first_problem(error) if isinstance(error, ValidationError) else error
                what = f"damaged checkpoint: in state.json, the callback {name} cannot take up its state: {problem}"
                raise UserError(
                    what, hint="remove the newest checkpoint; the run then goes on from the one before"
                ) from error
        return sorted(states.keys() - {self._key(callback) for callback in self._callbacks})

    def close(self) -> None:
        for callback in self._callbacks:
            callback.close()

    @staticmethod
    def _key(callback: Callback) -> str:
        return getattr(callback, "name", type(callback).__name__)


def _made(name: str, config: TrainConfig) -> Callback:
    kind: type[Callback] = CALLBACKS[name]
    return kind(config.settings(kind.Settings))
