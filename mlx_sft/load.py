"""A run or an adapter as a model: the base with what was trained in its place."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.config import TrainConfig
from mlx_sft.errors import USAGE, UserError
from mlx_sft.methods import Method, Parameters, attach_trained, method_in
from mlx_sft.model.load import LoadedModel, cast, load_model, load_tokenizer, resolve_checkpoint
from mlx_sft.registry import METHODS
from mlx_sft.run_folder import RunFolder


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


def load_run(run: str | Path, *, base: bool = False, dtype: str | None = None) -> AdaptedModel:
    """Load a run's base model and put what the run trained into it.

    Args:
        run: The folder that `train` made.
        base: Leave the model as it was before training.
        dtype: As for `load_model`; without one, what the run was trained in. Adapters stay float32.

    Raises:
        UserError: If the run has not finished, its base model cannot be loaded, or what it trained does not fit it.
    """
    folder = RunFolder.open(run)
    config = TrainConfig.resolve(folder.config)
    trained = None if base else load_trained(folder, config)
    # A base that training quantized is quantized from the same numbers.
    tokenizer = load_tokenizer(resolve_checkpoint(config.model), config.chat_template)
    loaded = load_model(
        config.model, config.dtype if config.quantize else dtype or config.dtype, tokenizer, quantize=config.quantize
    )
    cast(loaded.model, dtype or config.dtype)
    method = None
    if trained is not None:
        method, parameters = trained
        attach_trained(loaded.model, method, parameters, finished_folder(folder, config))
        mx.eval(loaded.model.parameters())
    return adapted(loaded, method, folder, config)


def load_adapter(folder: str | Path, model: str | None = None, dtype: str = "auto") -> AdaptedModel:
    """Load a base model with an adapter on it, trained here or by PEFT.

    Args:
        folder: The adapter.
        model: The base; the one that the adapter names where not given.
        dtype: As for `load_model`.

    Raises:
        UserError: If the adapter is missing or damaged, names no base, or does not fit it; the message says what differs.
    """
    name = model or method_in(Path(folder)).base_model(Path(folder))
    if not name:
        raise UserError("this adapter names no base model", where=str(folder), hint="give --model", exit_code=USAGE)
    loaded = load_model(name, dtype)
    return adapted(loaded, put_adapter(loaded.model, folder))


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
    trained = None if folder is None else method_in(Path(folder)).read(Path(folder))
    put_back = [kind.detach(model) for _, kind in METHODS.items()]
    if trained is None:
        return None
    method, parameters = trained
    try:
        attach_trained(model, method, parameters, Path(str(folder)))
    except BaseException:
        for _, kind in METHODS.items():
            kind.detach(model)
        for undo in put_back:
            undo()
        raise
    return method


def load_trained(run: RunFolder, config: TrainConfig) -> tuple[Method, Parameters]:
    """The method of a run as it was trained, and its parameters, float32; raises `UserError` as `finished_folder` does."""
    kind: type[Method] = METHODS[config.method]
    return kind.read(finished_folder(run, config))


def finished_folder(run: RunFolder, config: TrainConfig) -> Path:
    """Where a run keeps its result; raises `UserError` where the run has not written one."""
    kind: type[Method] = METHODS[config.method]
    folder = run.path / kind.folder
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
