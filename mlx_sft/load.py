"""A run or an adapter as a model: the base with what was trained in its place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from transformers import PreTrainedTokenizerBase

from mlx_sft.config import TrainConfig
from mlx_sft.data.new_tokens import NewTokens, beyond
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import folder_bytes, user_path
from mlx_sft.methods import Method, Parameters, make_method, method_in
from mlx_sft.methods.results import adapter_folder, attach_trained, run_of_result
from mlx_sft.model.load import (
    LoadedModel,
    cast,
    checkpoint_fingerprint,
    extended_tokenizer,
    has_tokenizer,
    load_model,
    load_tokenizer,
    name_elsewhere,
    resolve_checkpoint,
)
from mlx_sft.registry import METHODS
from mlx_sft.run_folder import RunFolder
from mlx_sft.safetensors_file import read_arrays
from mlx_sft.writing import workplace

WhichStep = str | int | None
"""Which step of a run: `best`, by validation loss; `last`; the number of one that has a checkpoint; None for a finished run's result."""

_STEP = "take what it has with --step best, last, or"
_ONE = "leave one of them out"


@dataclass(frozen=True, repr=False)
class AdaptedModel(LoadedModel):
    """A loaded model with an adapter or trained weights in it.

    Attributes:
        method: What was trained, attached to the model; None where the model is as it was before training.
        run: The run's folder; None for an adapter that is no run's.
        train_config: The run's configuration; None likewise.
    """

    method: Method | None = None
    run: RunFolder | None = None
    train_config: TrainConfig | None = None

    def describe(self) -> str:
        """As of a loaded model, with what was put into it."""
        run = f" from {self.run.path}" if self.run else ""
        return super().describe() + (f", with {self.method.name}{run}" if self.method else "")


def load_run(
    run: str | Path,
    *,
    base: bool = False,
    dtype: str | None = None,
    step: WhichStep = None,
    base_model: str | None = None,
    strength: float | None = None,
) -> AdaptedModel:
    """Load a run's base model and put what the run trained into it.

    Args:
        run: The folder that `train` made.
        base: Leave the model as it was before training.
        dtype: As for `load_model`; without one, what the run was trained in. Adapters stay float32.
        step: What it had trained by `"best"` or `"last"`, or by a step that has a checkpoint; without one, the result of a finished run.
        base_model: Where its base lies now, if no longer where training found it; it must be the same one.
        strength: What an adapter adds is multiplied with this.

    Raises:
        UserError: If the run has not finished and no step is given, it has nothing of that step, its base model cannot be loaded or is
            another one, or what it trained does not fit it.
    """
    folder = RunFolder.open(run)
    config = config_of(folder, base_model)
    if base and step is not None:
        raise UserError("--step is of what was trained, which --base leaves out", hint=_ONE, exit_code=USAGE)
    if base and strength is not None:
        raise UserError("--strength is of what was trained, which --base leaves out", hint=_ONE, exit_code=USAGE)
    return load_on_base(folder, config, None if base else Trained(folder, config, step, strength), dtype)


def load_on_base(run: RunFolder, config: TrainConfig, found: Trained | None, dtype: str | None = None) -> AdaptedModel:
    """As `load_run`, with what it has found: the configuration, which says where the base is, and what goes into it."""
    trained = found.read() if found else None
    path = base_of(run, config)
    # A base that training quantized is quantized from the same numbers.
    tokenizer, new = extended_tokenizer(path, config.chat_template, config.add_tokens)
    loaded = load_model(
        config.model, config.dtype if config.quantize else dtype or config.dtype, tokenizer,
        quantize=config.quantize, new_tokens=new,
    )  # fmt: skip
    cast(loaded.model, dtype or config.dtype)
    method = None
    if found is not None and trained is not None:
        method, parameters = trained
        attach_trained(loaded.model, method, parameters, found.folder)
        mx.eval(loaded.model.parameters())
    return adapted(loaded, method, run, config)


def config_of(run: RunFolder, base_model: str | None = None) -> TrainConfig:
    """A run's configuration, with its base where it lies now; raises `UserError` where another lies there."""
    config = TrainConfig.resolve(run.config)
    if base_model is None:
        return config
    refuse_other_base(run, base_model)
    folder = user_path(base_model)
    return config.model_copy(update={"model": str(folder.resolve()) if folder.is_dir() else base_model})


def refuse_other_base(run: RunFolder, model: str) -> None:
    """Raise `UserError` for a model that is not the one that a run began with."""
    if run.trained_on() is not None and not is_base(run, model):
        what = "this is not the model that the run was trained on: its configuration, tokenizer or weights are others"
        raise UserError(what, where=model, hint="give the same model, wherever it lies now", exit_code=USAGE)


def is_base(run: RunFolder, model: str) -> bool:
    """Whether a model is the one that a run began with, wherever it lies."""
    return checkpoint_fingerprint(resolve_checkpoint(model)) == run.trained_on()


def base_of(run: RunFolder, config: TrainConfig, *, weights: bool = True) -> Path:
    """The folder of a run's base; raises `UserError` with the way out where it is gone."""
    if Path(config.model).is_absolute() and not Path(config.model).exists():
        hint = "give the place where it lies now with --base-model"
        raise UserError(f"the base of {run.path} is no longer here", where=config.model, hint=hint)
    return resolve_checkpoint(config.model, weights=weights)


def load_adapter(folder: str | Path, model: str | None = None, dtype: str = "auto") -> AdaptedModel:
    """Load a base model with an adapter on it, trained here or by PEFT.

    Args:
        folder: The adapter, or the run that trained it.
        model: The base; the one that the adapter names where not given.
        dtype: As for `load_model`.

    Raises:
        UserError: If the adapter is missing or damaged, names no base, or does not fit it; the message says what differs.
    """
    folder = adapter_folder(folder)
    name = model or method_in(folder).base_model(folder)
    if not name:
        raise UserError("this adapter names no base model", where=str(folder), hint="give --model", exit_code=USAGE)
    tokenizer, new = own_tokenizer(folder, resolve_checkpoint(name))
    loaded = load_model(name, dtype, tokenizer, new_tokens=new)
    return adapted(loaded, put_adapter(loaded.model, folder))


def own_tokenizer(folder: Path, base: Path) -> tuple[PreTrainedTokenizerBase | None, NewTokens | None]:
    """The tokenizer that lies beside an adapter, or that its run had, where it has tokens that the base's lacks, and these."""
    if (run := run_of_result(folder)) is not None:
        config = TrainConfig.resolve(run.config)
        tokenizer, new = extended_tokenizer(base, config.chat_template, config.add_tokens)
        return (tokenizer, new) if new.ids else (None, None)
    if not has_tokenizer(folder):
        return None, None
    tokenizer = load_tokenizer(folder)
    new = beyond(tokenizer, load_tokenizer(base))
    return (tokenizer, new) if new.ids else (None, None)


def load_named(
    run: str | None = None, model: str | None = None, adapter: str | None = None, base: bool = False, **of_run: Any
) -> LoadedModel:
    """The model that a person names in one of three ways: a run, a model, or an adapter on a model.

    Args:
        of_run: What only a run takes: `step`, `base_model` and `strength` of `load_run`.

    Raises:
        UserError: If these do not go together, or as `load_run` and `load_adapter`.
    """
    if (run is None) == (model is None and adapter is None):
        hint = "`mlx-sft runs` lists the runs under runs/, and --model tiny is a model that comes with the program"
        what = "give either a run (RUN or --run), or --model or --adapter, or both of these"
        raise UserError(what, hint=hint, exit_code=USAGE)
    if base and run is None:
        raise UserError("--base goes with --run (or RUN)", hint="a model alone is its own base", exit_code=USAGE)
    if stray := next((name for name, value in of_run.items() if value is not None and run is None), None):
        option = "--" + stray.replace("_", "-")
        raise UserError(f"{option} goes with --run (or RUN)", hint=f"leave {option} out", exit_code=USAGE)
    if adapter is not None:
        return load_adapter(adapter, model)
    return load_run(run, base=base, **of_run) if run is not None else load_model(str(model))


def put_adapter(model: nn.Module, folder: str | Path | None, attached: Method | None = None) -> Method | None:
    """Put an adapter on a model, in place of the one that is on it; with None, none. Returns the adapter's method.

    Args:
        attached: The method of the one that is on it, where that is known.

    Raises:
        UserError: If it is damaged, or for another model, or what is on the model cannot be taken off; then the model is as it was.
    """
    if attached is not None and type(attached).detach is Method.detach:
        what = f"--method {attached.name} does not say how it is taken off a model"
        raise UserError(what, hint="start again, with --base or with another --adapter")
    where = None if folder is None else adapter_folder(folder)
    trained = None if where is None else method_in(where).read(where)
    put_back = [kind.detach(model) for _, kind in METHODS.items()]
    if where is None or trained is None:
        return None
    method, parameters = trained
    try:
        attach_trained(model, method, parameters, where)
    except BaseException:
        for _, kind in METHODS.items():
            kind.detach(model)
        for undo in put_back:
            undo()
        raise
    return method


class Trained:
    """What a run has trained, up to one of its steps.

    Args:
        run: The run.
        config: Its configuration.
        step: Which step; see `WhichStep`.
        strength: What it adds to the base is multiplied with this; as it is where None.

    Raises:
        UserError: If the run has not finished and no step was given, or there is nothing of that step.
    """

    def __init__(
        self, run: RunFolder, config: TrainConfig, step: WhichStep = None, strength: float | None = None
    ) -> None:
        self.run, self.config, self.step, self.strength = run, config, step, strength
        if strength is not None and not 0 < strength < math.inf:
            raise UserError(f"--strength {strength:g} is no number above 0", hint="give 0.8 or so", exit_code=USAGE)
        self._kind: type[Method] = METHODS[config.method]
        self.file: Path | None = None
        """Of the checkpoint that it is read from."""
        self.number: int | None = None
        """The step of that checkpoint."""
        self.folder = self._found()
        """Where it is, in its method's own form or as a checkpoint."""

    def _found(self) -> Path:
        run, result = self.run, self.run.path / self._kind.folder
        if self.step is None:
            return finished_folder(run, self.config, _STEP)
        if self.step == "best" and run.best_step() is not None and result.is_dir():
            return result
        if self.step == "best":
            what = "this run has no best step: it has not been evaluated on validation rows"
            raise UserError(what, where=str(run.path), hint="give --step last", exit_code=USAGE)
        if self.step == "last" and run.is_finished:
            return run.last if run.last.is_dir() else finished_folder(run, self.config)
        steps = run.checkpoint_steps()
        if self.step == "last" and not steps:
            run.refuse_unfinished()
        self.number = steps[-1] if self.step == "last" else self._number()
        self.file = run.trained_parameters(self.number)
        return self.file.parent

    def _number(self) -> int:
        try:
            return int(str(self.step))
        except ValueError:
            what = f"--step is best, last or the number of a step, and not {self.step}"
            raise UserError(what, hint="see `mlx-sft export --help`", exit_code=USAGE) from None

    def read(self) -> tuple[Method, Parameters]:
        """The method, and its parameters, float32; raises `UserError` where its strength cannot be another."""
        if self.file is None:
            method, parameters = self._kind.read(self.folder)
        else:
            kept = {name: mx.array(value) for name, value in read_arrays(self.file)}
            method, parameters = make_method(self.config).of_checkpoint(kept)
        return method, parameters if self.strength is None else method.scaled(parameters, self.strength)

    def bytes(self) -> int:
        """Near enough what it takes on the disk in its method's own form."""
        return self.file.stat().st_size if self.file else folder_bytes(self.folder)

    @contextmanager
    def in_own_form(self) -> Iterator[Path]:
        """A folder with it in its method's own form; for a checkpoint, and of another strength, one that is there while the block runs."""
        if self.file is None and self.strength is None:
            yield self.folder
            return
        doing = "reading this checkpoint" if self.file else "scaling what was trained"
        with workplace(self.run.path, self.bytes(), doing) as folder:
            method, parameters = self.read()
            method.write(folder, parameters, name_elsewhere(self.config.model))
            del parameters
            yield folder


def load_trained(run: RunFolder, config: TrainConfig, step: WhichStep = None) -> tuple[Method, Parameters]:
    """What a run has trained, as `Trained` finds it: the method and its parameters, float32."""
    return Trained(run, config, step).read()


def finished_folder(run: RunFolder, config: TrainConfig, way_out: str = "") -> Path:
    """Where a run keeps its result; raises `UserError`, with `way_out` as in `refuse_unfinished`, where the run has not finished."""
    kind: type[Method] = METHODS[config.method]
    folder = run.path / kind.folder
    run.refuse_unfinished(way_out)
    if not folder.is_dir():
        raise UserError(
            f"this run has not finished: it has no {folder.name}/",
            where=str(run.path),
            hint=f"finish it with `mlx-sft train --resume {run.path}`",
        )
    return folder


def adapted(
    loaded: LoadedModel, method: Method | None, run: RunFolder | None = None, config: TrainConfig | None = None
) -> AdaptedModel:
    """A loaded model that has this method attached, or none."""
    known = {field.name: getattr(loaded, field.name) for field in fields(LoadedModel)}
    return AdaptedModel(**known, method=method, run=run, train_config=config)
