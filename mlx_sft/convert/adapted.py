"""A finished run as a model: the base with what was trained in its place. Knows nothing of how it was trained."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import mlx.core as mx

from mlx_sft.config import TrainConfig
from mlx_sft.convert.peft import read_adapter
from mlx_sft.convert.safetensors_file import SafetensorsFile, open_safetensors, read_float32
from mlx_sft.convert.trained import WEIGHTS_FILE
from mlx_sft.errors import UserError
from mlx_sft.methods import Full, Lora, Parameters
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


def load_run(run: str | Path, *, base: bool = False, dtype: str = "auto") -> AdaptedModel:
    """Load a run's base model and put what the run trained into it.

    Args:
        run: The folder that `train` made.
        base: Leave the model as it was before training.
        dtype: As for `load_model`; adapters stay float32.

    Raises:
        UserError: If the run has not finished, its base model cannot be loaded, or what it trained does not fit it.
    """
    folder = RunFolder.open(run)
    config = TrainConfig.resolve(folder.config)
    loaded = load_model(config.model, dtype)
    if not base:
        _attach_trained(loaded, folder, config)
    known = {field.name: getattr(loaded, field.name) for field in fields(LoadedModel)}
    return AdaptedModel(**known, run=folder, train_config=config)


def trained_adapter(run: RunFolder) -> Path:
    """The adapter folder of a LoRA run; raises `UserError` where the run has not written one."""
    if not run.adapter.is_dir():
        raise _unfinished(run, "adapter")
    return run.adapter


def trained_weights(run: RunFolder) -> SafetensorsFile:
    """The weights of a full run, float32 under MLX names; raises `UserError` where it has not written them."""
    if not run.weights.is_dir():
        raise _unfinished(run, "weights")
    return open_safetensors(run.weights / WEIGHTS_FILE)


def check_fit(trained: Parameters, model: Parameters, where: Path) -> None:
    """Raise `UserError` unless both have the same names and shapes; it names the first that differs.

    Args:
        trained: Parameters that were read from `where`.
        model: Parameters that a method's `attach` returned for the model at hand.
        where: The folder that the message names.
    """
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


def _attach_trained(loaded: LoadedModel, run: RunFolder, config: TrainConfig) -> None:
    method: Lora | Full
    if config.method == "full":
        method, where = Full(), run.weights
        parameters = {t.name: mx.array(read_float32(t)) for t in trained_weights(run).tensors}
    else:
        where = trained_adapter(run)
        settings, parameters = read_adapter(where)
        method = Lora(settings)
    try:
        start = method.attach(loaded.model, seed=0)
    except UserError as error:
        what = f"this adapter is for another model: {error.what}"
        raise UserError(what, where=str(where), hint=error.hint) from error
    check_fit(parameters, start, where)
    method.bind(loaded.model, parameters)
    mx.eval(loaded.model.parameters())


def _unfinished(run: RunFolder, missing: str) -> UserError:
    return UserError(
        f"this run has not finished: it has no {missing}/",
        where=str(run.path),
        hint=f"finish it with `mlx-sft train --resume {run.path}`",
    )
