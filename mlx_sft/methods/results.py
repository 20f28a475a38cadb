"""The folder in which a run keeps the result of its method, as a person names it."""

from __future__ import annotations

from pathlib import Path

from mlx_sft.config import TrainConfig
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import user_path
from mlx_sft.methods import Method
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
