"""A finished run as a model: the base with what was trained in its place. Knows nothing of how it was trained."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.config import TrainConfig
from mlx_sft.convert.trained import finished_folder, load_trained
from mlx_sft.errors import UserError
from mlx_sft.methods import Method, Parameters
from mlx_sft.model.load import LoadedModel, load_model
from mlx_sft.runs import RunFolder


@dataclass(frozen=True)
class AdaptedModel(LoadedModel):
    """A loaded model with a run's adapter or weights in it.

    Attributes:
        run: The run's folder.
        train_config: The run's configuration.
    """

    run: RunFolder
    train_config: TrainConfig


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
    trained = None if base else load_trained(folder, config.method)
    loaded = load_model(config.model, dtype or config.dtype)
    if trained is not None:
        method, parameters = trained
        attach_trained(loaded.model, method, parameters, finished_folder(folder, config.method))
        mx.eval(loaded.model.parameters())
    known = {field.name: getattr(loaded, field.name) for field in fields(LoadedModel)}
    return AdaptedModel(**known, run=folder, train_config=config)


def attach_trained(model: nn.Module, method: Method, trained: Parameters, where: Path) -> Parameters:
    """Attach a method to a model with what it trained before.

    Args:
        model: A frozen model, as loaded.
        method: In the shape that it was trained in.
        trained: Parameters that were read from `where`.
        where: The folder that a message names.

    Returns:
        The trained parameters, in the model's order.

    Raises:
        UserError: If they are another model's; it names the first parameter that differs.
    """
    try:
        start = method.attach(model, seed=0)
    except UserError as error:
        what = f"this adapter is for another model: {error.what}"
        raise UserError(what, where=str(where), hint=error.hint) from error
    _check_fit(trained, start, where)
    parameters = {name: trained[name] for name in start}
    method.bind(model, parameters)
    return parameters


def _check_fit(trained: Parameters, model: Parameters, where: Path) -> None:
    """Raise `UserError` unless both have the same names and shapes; it names the first that differs."""
    hint = "it belongs to another model; give the one that it was trained on"
    for name, value in trained.items():
        if name not in model:
            raise UserError(f"this model has no place for {name}", where=str(where), hint=hint)
        if value.shape != model[name].shape:
            shapes = f"{list(value.shape)}, and the model asks for {list(model[name].shape)}"
            raise UserError(f"{name} is {shapes}", where=str(where), hint=hint)
    if missing := [name for name in model if name not in trained]:
        what = f"{len(missing)} parameters of this model are not in it, such as {missing[0]}"
        raise UserError(what, where=str(where), hint=hint)
