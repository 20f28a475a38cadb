"""The result of a method: the folder in which a run keeps it, as a person names it, and how it comes onto a model again."""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn

from mlx_sft.config import TrainConfig
from mlx_sft.console import many
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import user_path
from mlx_sft.methods import Method, Parameters
from mlx_sft.registry import METHODS
from mlx_sft.run_folder import RunFolder


def result_folder(name: str | Path) -> Path:
    """The folder of an adapter, which that of a run may stand for; raises `UserError` for a run that trained none."""
    folder = user_path(name)
    if not (folder / RunFolder(folder).config.name).is_file():
        return folder
    run = RunFolder.open(folder)
    kind: type[Method] = METHODS[TrainConfig.resolve(run.config).method]
    if not kind.frozen_base:
        raise UserError(f"a run of --method {kind.name} has no adapter", where=str(run.path), exit_code=USAGE)
    return run.path / kind.folder


def run_of_result(folder: str | Path) -> RunFolder | None:
    """The run that keeps its result in a folder, such as runs/x/adapter; None for a folder of anything else."""
    place = user_path(folder).resolve()
    run = RunFolder(place.parent)
    results = {kind.folder for _, kind in METHODS.items()} | {run.last.name}
    return run if place.name in results and run.config.is_file() and run.environment.is_file() else None


def refuse_unfinished_result(folder: str | Path, way_out: str = "") -> None:
    """Raise `UserError` for a folder in which a run that has not finished keeps its result, such as runs/x/adapter.

    Args:
        way_out: As in `RunFolder.refuse_unfinished`.
    """
    if (run := run_of_result(folder)) is not None:
        run.refuse_unfinished(way_out or f"give --run {run.path} in its place, with --step best, last, or")


def adapter_folder(name: str | Path, way_out: str = "") -> Path:
    """The folder of an adapter, or of the one that a finished run has trained; raises as the two functions before.

    Args:
        way_out: As in `RunFolder.refuse_unfinished`.
    """
    folder = result_folder(name)
    refuse_unfinished_result(folder, way_out)
    return folder


def attach_trained(model: nn.Module, method: Method, trained: Parameters, where: Path) -> Parameters:
    """Attach a method to a model with what it trained before.

    Args:
        model: A frozen model, as loaded.
        method: With the settings that it was trained with.
        trained: Parameters that were read from `where`.
        where: The folder that a message names.

    Returns:
        The trained parameters, in the model's order.

    Raises:
        UserError: If they are another model's; it names the first parameter that differs.
    """
    trained = method.of_model(model, trained, where)
    try:
        start = method.attach(model, seed=0)
    except UserError as error:
        what = f"this adapter is for another model: {error.what}"
        raise UserError(what, where=str(where), hint=error.hint) from error
    _check_same(trained, start, where)
    parameters = {name: trained[name] for name in start}
    method.bind(model, parameters)
    model.eval()  # modules that were attached are made in training mode
    return parameters


def _check_same(trained: Parameters, model: Parameters, where: Path) -> None:
    """Raise `UserError` unless both have the same names and shapes; it names the first that differs."""
    hint = "it belongs to another model; give the one that it was trained on"
    for name, value in trained.items():
        if name not in model:
            raise UserError(f"this model has no place for {name}", where=str(where), hint=hint)
        if value.shape != model[name].shape:
            shapes = f"{list(value.shape)}, and the model asks for {list(model[name].shape)}"
            raise UserError(f"{name} is {shapes}", where=str(where), hint=hint)
    if missing := [name for name in model if name not in trained]:
        what = f"of this model it lacks {many(len(missing), 'parameter')}, such as {missing[0]}"
        raise UserError(what, where=str(where), hint=hint)
