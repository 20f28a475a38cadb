"""A finished run as a model: the base with what was trained in its place. Knows nothing of how it was trained."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.config import TrainConfig
from mlx_sft.convert.peft import base_model_name, read_adapter
from mlx_sft.convert.trained import finished_folder, load_trained
from mlx_sft.errors import USAGE, UserError
from mlx_sft.methods import Lora, Method, Parameters
from mlx_sft.methods.lora import detach, put_back
from mlx_sft.model.load import LoadedModel, cast, load_model
from mlx_sft.runs import RunFolder


@dataclass(frozen=True, kw_only=True, repr=False)
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
    # A base that training quantized is quantized from the same numbers.
    loaded = load_model(
        config.model, config.dtype if config.quantize else dtype or config.dtype, quantize=config.quantize
    )
    cast(loaded.model, dtype or config.dtype)
    if trained is not None:
        method, parameters = trained
        attach_trained(loaded.model, method, parameters, finished_folder(folder, config.method))
        mx.eval(loaded.model.parameters())
    known = {field.name: getattr(loaded, field.name) for field in fields(LoadedModel)}
    adapter = f"{config.method} from {folder.path}" if trained else ""
    return AdaptedModel(**known | {"adapter": adapter}, run=folder, train_config=config)


def load_adapter(folder: str | Path, model: str | None = None, dtype: str = "auto") -> LoadedModel:
    """Load a base model with an adapter of PEFT's on it.

    Args:
        folder: The adapter, trained here or elsewhere.
        model: The base; the one that the adapter names where not given.
        dtype: As for `load_model`.

    Raises:
        UserError: If the adapter is missing or damaged, names no base, or does not fit it; the message says what differs.
    """
    name = model or base_model_name(folder)
    if not name:
        raise UserError("this adapter names no base model", where=str(folder), hint="give --model", exit_code=USAGE)
    loaded = load_model(name, dtype)
    put_adapter(loaded.model, folder)
    return replace(loaded, adapter=f"the adapter {folder}")


def put_adapter(model: nn.Module, folder: str | Path | None) -> None:
    """Put an adapter on a model, in place of the one that is on it; with None, none.

    Raises:
        UserError: If it is damaged, or for another model; then the model is as it was.
    """
    trained = None if folder is None else read_adapter(folder)
    before = detach(model)
    if trained is None:
        return
    settings, parameters = trained
    try:
        attach_trained(model, Lora(settings), parameters, Path(str(folder)))
    except BaseException:
        detach(model)
        put_back(model, before)
        raise


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
