"""How a run starts: with parameters drawn from its seed, with an existing adapter, or where the train.py of a TRL export stopped."""

from __future__ import annotations

from pathlib import Path

import mlx.nn as nn
from transformers import PreTrainedTokenizerBase

from mlx_sft.common_settings import option_name
from mlx_sft.config import TrainConfig
from mlx_sft.console import Console
from mlx_sft.convert.targets.trl.folder import TrlFolder
from mlx_sft.data.dataset import Examples
from mlx_sft.data.sources import refuse_missing
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import user_path
from mlx_sft.load import finished_folder, refuse_other_base
from mlx_sft.methods import Method, Parameters, as_attached, make_method, method_in
from mlx_sft.methods.results import attach_trained, refuse_unfinished_result
from mlx_sft.model.head import SplitModel
from mlx_sft.model.translate import exact_length
from mlx_sft.optimizers import Optimizer
from mlx_sft.registry import METHODS
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.checkpoint import Progress
from mlx_sft.training.resume import continued_config, with_full_paths

_KEPT_OF_A_RUN = ("method", "model", "quantize", "chat_template", "chat_template_kwargs", "add_tokens", "system")
"""What of a run belongs to the adapter that it has trained: what that is a part of, and how text is written for it."""


def resumed_run(path: str) -> RunFolder:
    """The run that `--resume` names; raises `UserError` for a folder that is none, and for a TRL export, which has no checkpoints."""
    if TrlFolder.find(path) is not None:
        hint = f"go on from what its train.py left with: mlx-sft train --resume-from-peft {path}"
        raise UserError("this is a TRL export, and has no checkpoints", where=path, hint=hint, exit_code=USAGE)
    return RunFolder.open(path)


def new_config(given: TrainConfig, console: Console) -> TrainConfig:
    """The configuration of a new run, with what the folder decides that it goes on from.

    A TRL export decides over everything, as a run does that is resumed. Of any other folder there is only the adapter, because an
    `optimizer.pt` is pickled, which can run code: the run starts from it as from an initial adapter.

    Raises:
        UserError: If the TRL export has not been trained, or something else was given than it says.
    """
    given = from_run(given)
    folder = given.resume_from_peft
    if folder is None:
        if given.init_adapter is not None:
            way_out = "start from `mlx-sft export --format peft --step` best, last, or"
            refuse_unfinished_result(given.init_adapter, way_out)
        refuse_missing(given)
        return with_full_paths(given)
    if TrlFolder.find(folder) is not None:
        return continued_config(given, TrlFolder.trained(folder))
    method = METHODS[given.method]
    if not (method.peft and method.recognizes(user_path(folder))):
        hint = "give the folder of a TRL export, or one with adapter_config.json, such as a checkpoint-500 of TRL"
        raise UserError("neither a TRL export nor an adapter of PEFT", where=folder, hint=hint, exit_code=USAGE)
    if not given.data:
        hint = "give --data FILE; only a TRL export (`export --format trl`) knows its data and settings"
        raise UserError(
            "nothing to train on: this folder is an adapter alone", where=folder, hint=hint, exit_code=USAGE
        )
    console.note(f"of {folder} the adapter is taken: a new optimizer starts with it at step 0, as with --init-adapter")
    return with_full_paths(given.model_copy(update={"init_adapter": folder, "resume_from_peft": None}))


def from_run(given: TrainConfig) -> TrainConfig:
    """The configuration of a new run, where it starts from the result of a finished one with what else of that one the result needs."""
    path = given.run_from
    if path is None:
        return given
    run = RunFolder.open(path)
    before = TrainConfig.resolve(run.config)
    if not METHODS[before.method].frozen_base:
        what = f"a run of --method {before.method} has no adapter to start from"
        hint = f"start from its whole model: mlx-sft export {path} --out MERGED, then --model MERGED"
        raise UserError(what, where=path, hint=hint, exit_code=USAGE)
    adapter = finished_folder(run, before, "start from `mlx-sft export --format peft --step` best, last, or")
    settings = {name: getattr(given, name) for name in given.model_fields_set if name != "run_from"}
    if given.model != before.model and "model" in settings:
        refuse_other_base(run, given.model)
    kept = {name: getattr(before, name) for name in _KEPT_OF_A_RUN}
    return TrainConfig(**kept | settings | {"init_adapter": str(adapter)})


def starting_parameters(
    config: TrainConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None, *, begun: bool
) -> tuple[TrainConfig, Method, Parameters]:
    """The method, attached to a frozen model, and its parameters at the start.

    An existing adapter's own settings override those of the configuration that shape it. A run that has begun has its parameters in a
    checkpoint, and needs that adapter no more. Without a tokenizer, and where a checkpoint follows, what starts from a text has its
    shape alone.

    Raises:
        UserError: If the adapter cannot be read, belongs to another model, or is not as the configuration says.
    """
    where = None if begun else _given_adapter(config)
    if where is None:
        method = make_method(config)
        method.begun = begun
        if tokenizer is not None and not begun:
            method.read_tokenizer(tokenizer)
        parameters = method.attach(model, config.seed)
        if not parameters:
            raise UserError(f"--method {config.method} trains nothing of this model", where="method", exit_code=USAGE)
        method.bind(model, parameters)
        method.release(model)
        return as_attached(config, method), method, parameters
    kind = method_in(where)
    if kind.name != config.method and kind.recognizes(where):
        what, hint = f"this is an adapter of --method {kind.name}", f"give --method {kind.name}"
        raise UserError(what, where=str(where), hint=hint, exit_code=USAGE)
    adapter, trained = METHODS[config.method].read(where)
    trained = adapter.of_model(model, trained, where)
    decided = adapter.decides(where)
    for name, value in decided.items():
        given = getattr(config, name)
        if name in config.model_fields_set and not adapter.agrees(model, name, given):
            raise UserError(
                f"{option_name(name)} {given} differs from the adapter's {value}",
                where=str(where),
                hint="leave it out; an existing adapter's config overrides the settings of its shape",
                exit_code=USAGE,
            )
    if config.init_adapter is not None:  # the configuration of a TRL export says the same already
        config = config.model_copy(update=decided)
    method = make_method(config)
    parameters = attach_trained(model, method, trained, where)
    method.release(model)
    return as_attached(config, method), method, parameters


def starting_progress(
    config: TrainConfig, parameters: Parameters, optimizer: Optimizer, identity: dict[str, str], total_steps: int
) -> Progress:
    """Where a run stands before its own first step; the optimizer takes up what the train.py of a TRL export left of its own.

    Raises:
        UserError: If that is of other data, of another model or of other parameters.
    """
    if config.resume_from_peft is None:
        return Progress()
    export = TrlFolder.trained(config.resume_from_peft)
    export.refuse_changes(identity)
    step, moments = export.read_step(total_steps), export.read_moments(parameters)
    optimizer.take_up(*moments, step)
    return Progress(step=step)


def _given_adapter(config: TrainConfig) -> Path | None:
    if config.resume_from_peft is not None:
        return TrlFolder.trained(config.resume_from_peft).adapter
    return Path(config.init_adapter) if config.init_adapter is not None else None


def refuse_dropout_outside_layers(method: Method, split: SplitModel, parameters: Parameters) -> None:
    """The head is computed chunk by chunk, where one random mask for all chunks would not be dropout."""
    outside = [name for name in split.outside_layers(parameters) if method.drops(name)]
    if outside:
        module = outside[0].rpartition(".")[0]
        raise UserError(
            f"dropout cannot be trained on {module}, which is outside the repeated layers",
            where="target",
            hint=f"leave {module} out of --target, or give --dropout 0",
            exit_code=USAGE,
        )


def refuse_inexact_length(examples: Examples, path: Path, method: Method) -> None:
    """Beyond some length, mlx-lm's code for a few families is not the model that was trained; nor is a prefix behind a sliding window."""
    in_front = method.virtual_tokens + method.keys_in_front
    for most, why in (
        (exact_length(path), "mlx-lm computes this model exactly for no more than"),
        (method.most_positions, "a sliding window of this model has no more than"),
    ):
        if most is None or examples.lengths.max(initial=0) + in_front <= most:
            continue
        longest = examples[int(examples.lengths.argmax())]
        further = f" and {in_front} virtual ones" if in_front else ""
        what = f"{len(longest)} tokens{further}, and {why} {most}"
        raise UserError(what, where=longest.origin, hint=f"give --max-length {most - in_front}")
