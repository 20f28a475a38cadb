"""How a run starts: with an adapter drawn from its seed, with one that there is, or where a twin's train.py stopped.

Knows nothing of data, memory or checkpoints.
"""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn

from mlx_sft.config import TrainConfig, option_name
from mlx_sft.console import Console
from mlx_sft.convert.adapted import attach_trained
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import user_path
from mlx_sft.methods import LoraSettings, Method, Parameters, make_method
from mlx_sft.methods.lora import resolve_targets
from mlx_sft.methods.peft_files import CONFIG as ADAPTER_CONFIG
from mlx_sft.methods.peft_files import read_adapter
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.checkpoint import Progress
from mlx_sft.training.identity import continued_config, with_full_paths
from mlx_sft.training.optim import AdamW
from mlx_sft.training.twin.folder import FIRST, SECOND, TwinFolder


def resumed_run(path: str) -> RunFolder:
    """The run that `--resume` names; raises `UserError` for a folder that is none, and for a twin, which has no checkpoints."""
    if TwinFolder.find(path) is not None:
        hint = f"go on from what its train.py left with: mlx-sft train --resume-from-peft {path}"
        raise UserError("this is a twin, and has no checkpoints", where=path, hint=hint, exit_code=USAGE)
    return RunFolder.open(path)


def new_config(given: TrainConfig, console: Console) -> TrainConfig:
    """The configuration of a new run, with what the folder decides that it goes on from.

    A twin decides over everything, as a run does that is resumed. Of any other folder there is only the adapter, because an
    `optimizer.pt` is pickled, which can run code: the run starts from it as from an initial adapter.

    Raises:
        UserError: If the twin has not been trained, or something else was given than it says.
    """
    folder = given.resume_from_peft
    if folder is None:
        return with_full_paths(given)
    if TwinFolder.find(folder) is not None:
        return continued_config(given, TwinFolder.trained(folder))
    if not (user_path(folder) / ADAPTER_CONFIG).is_file():
        hint = "give the folder of a twin, or one with adapter_config.json, such as a checkpoint-500 of TRL"
        raise UserError("neither a twin nor an adapter of PEFT", where=folder, hint=hint, exit_code=USAGE)
    if not given.data:
        hint = "give --data FILE; only a twin (`export --format trl`) knows its data and settings"
        raise UserError(
            "nothing to train on: this folder is an adapter alone", where=folder, hint=hint, exit_code=USAGE
        )
    console.note(f"of {folder} the adapter is taken: a new optimizer starts with it at step 0, as with --init-adapter")
    return with_full_paths(given.model_copy(update={"init_adapter": folder, "resume_from_peft": None}))


def starting_parameters(
    config: TrainConfig, model: nn.Module, *, begun: bool
) -> tuple[TrainConfig, Method, Parameters]:
    """The method, attached to a frozen model, and its parameters at the start; an adapter that there is decides over its own shape.

    A run that has begun has its parameters in a checkpoint, and needs that adapter no more.

    Raises:
        UserError: If the adapter cannot be read, belongs to another model, or is not as the configuration says.
    """
    where = None if begun else _given_adapter(config)
    if where is None:
        method = make_method(config)
        return config, method, method.attach(model, config.seed)
    settings, trained = read_adapter(where)
    if min(settings.alpha, *settings.alpha_pattern.values(), 1.0) <= 0:
        raise UserError(
            "its alpha is not above 0, so that it could not learn", where=str(where), hint="start from another adapter"
        )
    decided = {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "rslora": settings.rslora,
        "dora": settings.dora,
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
        "target": list(settings.targets),
    }
    wanted = LoraSettings.from_config(config).targets
    for name, value in decided.items():
        given = getattr(config, name)
        if name == "target" and given != value and _same_modules(model, wanted, settings.targets):
            given = value  # `all-linear` is these names
        if name in config.model_fields_set and given != value:
            raise UserError(
                f"{option_name(name)} {given} differs from the adapter's {value}",
                where=str(where),
                hint="leave it out; the adapter decides over its own shape",
                exit_code=USAGE,
            )
    if config.init_adapter is not None:  # a twin's configuration says the same already
        config = config.model_copy(update=decided)
    method = make_method(config)
    return config, method, attach_trained(model, method, trained, where)


def starting_progress(
    config: TrainConfig, parameters: Parameters, optimizer: AdamW, identity: dict[str, str], total_steps: int
) -> Progress:
    """Where a run stands before its own first step; the optimizer takes up what a twin's train.py left of its own.

    Raises:
        UserError: If that is of other data, of another model or of other parameters.
    """
    if config.resume_from_peft is None:
        return Progress()
    twin = TwinFolder.trained(config.resume_from_peft)
    twin.refuse_changes(identity)
    step, moments = twin.read_step(total_steps), twin.read_moments(parameters)
    optimizer.take_up(moments[FIRST], moments[SECOND], step)
    return Progress(step=step)


def _given_adapter(config: TrainConfig) -> Path | None:
    if config.resume_from_peft is not None:
        return TwinFolder.trained(config.resume_from_peft).adapter
    return Path(config.init_adapter) if config.init_adapter is not None else None


def _same_modules(model: nn.Module, *targets: tuple[str, ...]) -> bool:
    one, other = (resolve_targets(model, names) for names in targets)
    return one == other
