"""Everything before the first step: configuration, data, model and plan become a `Job`.

Nothing is written before all of it is known to be good.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from transformers import PreTrainedTokenizerBase

from mlx_sft.common_settings import IN_MEMORY
from mlx_sft.config import TrainConfig
from mlx_sft.console import Console
from mlx_sft.convert.merge import check_exportable
from mlx_sft.data.batches import Layout
from mlx_sft.data.chat_template import template_text, with_template
from mlx_sft.data.dataset import Examples, check_vocabulary
from mlx_sft.data.new_tokens import NewTokens, add_tokens
from mlx_sft.data.prepare import PreparedData, prepare
from mlx_sft.data.template import with_todays_variables
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import to_json
from mlx_sft.methods import Method, Parameters, for_new_tokens
from mlx_sft.model.given import given_model, given_tokenizer
from mlx_sft.model.head import SplitModel
from mlx_sft.model.linears import joined_note
from mlx_sft.model.load import (
    LoadedModel,
    extended_tokenizer,
    load_model,
    resolve_checkpoint,
    resolve_dtype,
    untested_note,
)
from mlx_sft.model.quantize import first_rows
from mlx_sft.model.translate import exact_length, read_config
from mlx_sft.model.vocabulary import vocabulary_size
from mlx_sft.objectives import make_objective
from mlx_sft.optimizers import make_optimizer
from mlx_sft.run_folder import RunFolder
from mlx_sft.training import checkpoint, device
from mlx_sft.training.batch_settings import (
    BatchSettings,
    LongestRow,
    MemoryPlanner,
    asked_for,
    configured,
    layout_on,
    predicted_peak,
    refuse_too_large,
)
from mlx_sft.training.callbacks import Callback, Callbacks
from mlx_sft.training.checkpoint import CallbackStates, Progress
from mlx_sft.training.device import Measured, attention_in_blocks, measure
from mlx_sft.training.disk_need import DiskNeed
from mlx_sft.training.job import Job
from mlx_sft.training.machine import Machine, hold_to, prepare_device, this_machine, within
from mlx_sft.training.memory import Footprint
from mlx_sft.training.resume import (
    CONFIG_HEADER,
    computed_anew,
    describe_environment,
    identity_of,
    record_revision,
    refuse_changes,
    refuse_missing,
    resumed_config,
)
from mlx_sft.training.schedule import planned_steps
from mlx_sft.training.shapes import compiled_shapes
from mlx_sft.training.start import new_config, resumed_run, starting_parameters, starting_progress
from mlx_sft.training.step import GradientComputer
from mlx_sft.training.time_plan import within_time


@dataclass(frozen=True)
class Given:
    """What `train` was given beside the configuration; see there."""

    data: Any = None
    valid: Any = None
    model: Any = None
    tokenizer: Any = None
    callbacks: tuple[Callback, ...] = ()


def prepare_job(
    config: TrainConfig, console: Console, held: ExitStack | None = None, given: Given | None = None
) -> Job:
    """Load and check everything that the configuration names; write the head of the run folder.

    Args:
        held: Keeps the lock of the run folder until it is closed; where None, it is given back when the job is prepared.
        given: What is in memory already.

    Raises:
        UserError: For anything in data, model, adapter or configuration that cannot be.
    """
    started = time.monotonic()
    prepare_device()
    mx.reset_peak_memory()
    held = ExitStack() if held is None else held
    given = given or Given()
    anew, more_time = computed_anew(config), config.time_limit is not None
    config, run = _opened(_with_given(config, given), console, held)
    path = resolve_checkpoint(config.model)
    callbacks = Callbacks.of_run(config, given.callbacks)
    config, tokenizer, new_tokens, data = _read_data(config, path, console, given, new=run is None)
    callbacks.check(config, data)
    machine = within(this_machine(), config)
    mx.set_memory_limit(machine.memory)  # rather than go beyond it, MLX waits for operations that are under way
    if given.model is None:
        refuse_too_large(config, path, machine)
    base, vocabulary = _load_base(config, tokenizer, new_tokens, data, console, given)
    split = SplitModel(base.model)
    begun = run is not None and bool(run.checkpoint_steps())
    config, method, parameters = _attach_exportable(config, base, new_tokens, begun=begun)
    _refuse_dropout_outside_layers(method, split, parameters)
    computer = GradientComputer(split, method, vocabulary, make_objective(config), recompute=asked_for(config)[0])
    layout, measured = _measured_layout(config, run, computer, split, parameters, data, machine, console)
    held.enter_context(attention_in_blocks(measured.attention_block))
    planner = _planner(config, machine, computer, split, method, parameters, vocabulary, data, layout)
    memory, settings = planner.plan(computer, parameters, len(data.train))
    config = _decided(config, settings)
    plan = planned_steps(config, data)
    if run is None and config.time_limit is not None and config.resume_from_peft is None:
        compiled = compiled_shapes(plan, data.train, settings.micro_batch_tokens, settings.layout)
        computer.configure(settings.mode, compiled, settings.head_chunk)
        config, plan = within_time(
            config, plan, data, computer, parameters, settings, uses_dropout=method.uses_dropout,
            checkpoint_bytes=memory.footprint.checkpoint_bytes, started=started, console=console,
        )  # fmt: skip
    optimizer = make_optimizer(config, parameters, method.decayed, compiled=machine.compiles)
    identity = identity_of(config, data, path)
    if run:
        refuse_changes(run, config, data, identity)
    if run and begun:
        progress, parameters, states = checkpoint.load(run, parameters, optimizer, identity, seed=config.seed)
        _hand_over(states, callbacks, console)
    else:
        progress = starting_progress(config, parameters, optimizer, identity, plan.total_steps)
    if run:
        if more_time or progress.stopped_of != plan.total_steps:  # one that a callback ended early goes on with more
            progress = progress.after(stopped_of=None)
        settings, progress = _resumed(settings, progress, anew)
    predicted = predicted_peak(memory.footprint, settings, plan, data.train)
    disk = DiskNeed.of_run(
        memory.footprint.checkpoint_bytes, method.written_bytes(parameters), config, plan,
        goes_back=callbacks.may_go_back,
    )  # fmt: skip
    disk.refuse_where_short(run.path if run else Path(config.out or "."), run.checkpoints if run else None)
    if run:
        record_revision(run, config, plan.total_steps)
    else:
        environment = describe_environment(config, identity, plan.total_steps)
        environment |= {"memory": memory.describe(predicted), "measured": asdict(measured)}
        run = _create(config, data, environment, console, held)
    hold_to(machine, predicted)
    compiled = compiled_shapes(plan, data.train, settings.micro_batch_tokens, settings.layout)
    computer.configure(settings.mode, compiled, settings.head_chunk)
    computer.bind(parameters)
    return Job(
        config, run, base, split, method, computer, plan, data,
        parameters, optimizer, callbacks, identity, progress, console, memory, settings, predicted, disk,
    )  # fmt: skip


def _measured_layout(
    config: TrainConfig, run: RunFolder | None, computer: GradientComputer, split: SplitModel, parameters: Parameters,
    data: PreparedData, machine: Machine, console: Console,
) -> tuple[Layout, Measured]:  # fmt: skip
    """How rows are laid out on this machine, and what was measured for it: now, or as a run that goes on began."""
    layout = layout_on(machine, computer, parameters, data.train)
    device.ask(computer, parameters, layout, asked_for(config)[-1], machine, console)
    measured = Measured.of_run(run) if run else measure(computer, split, parameters, data.train, layout, machine)
    return replace(layout, call_cost=measured.call_cost), measured


def _with_given(config: TrainConfig, given: Given) -> TrainConfig:
    """The configuration says that rows came from memory, where they did; raises `UserError` where it names others too."""
    for name, rows in (("data", given.data), ("valid", given.valid)):
        stated = getattr(config, name)
        if rows is not None and stated and stated not in ([IN_MEMORY], IN_MEMORY):
            what = f"{name} is given twice: as rows in memory, and in the configuration as {stated}"
            raise UserError(what, hint="leave one of them out", exit_code=USAGE)
    if given.data is not None:
        config = config.model_copy(update={"data": [IN_MEMORY]})
    if given.valid is not None:
        config = config.model_copy(update={"valid": IN_MEMORY})
    config.require_data()
    return config


def _opened(config: TrainConfig, console: Console, held: ExitStack) -> tuple[TrainConfig, RunFolder | None]:
    """The settings of a run that begins, or of one that goes on, and then its folder, locked and without damaged checkpoints."""
    if not config.resume:
        config = new_config(config, console)
        if config.out is not None:
            RunFolder.new(config.out)  # before the work, not after it
        return config, None
    run = resumed_run(config.resume)
    held.enter_context(run.locked(console.warn))
    for damage in checkpoint.set_aside_damaged(run):
        console.warn(damage)
    resumed = resumed_config(config, run)
    refuse_missing(run, resumed)
    return resumed, run


def _read_data(
    config: TrainConfig, path: Path, console: Console, given: Given, *, new: bool
) -> tuple[TrainConfig, PreTrainedTokenizerBase, NewTokens, PreparedData]:
    """The tokenizer, what was added to it, and the rows as it writes them; a new run pins the day on which it begins."""
    read_config(path)  # first, because the tokenizer would take the blame
    tokenizer, added = _tokenizer(config, path, given)
    config = for_new_tokens(config, added.ids)
    if note := added.note():
        console.note(note)
    if new:
        if config.chat_template is not None:
            config = config.model_copy(update={"chat_template": template_text(config.chat_template)})
        config = with_todays_variables(config, tokenizer)
    with console.reading() as reading:
        data = prepare(config, tokenizer, reading, rows=given.data, valid_rows=given.valid)
    return config, tokenizer, added, data


def _tokenizer(config: TrainConfig, path: Path, given: Given) -> tuple[PreTrainedTokenizerBase, NewTokens]:
    """The model's, or the one that was given, with the run's own tokens and chat template; and what was added."""
    tokenizer = given_tokenizer(given.model, given.tokenizer)
    if tokenizer is None:
        return extended_tokenizer(path, config.chat_template, config.add_tokens)
    if given.model is not None and config.add_tokens:
        hint = "let `train` load it by its name"
        raise UserError("a model in memory gets no new tokens", where="add_tokens", hint=hint, exit_code=USAGE)
    if config.add_tokens:
        tokenizer = copy.deepcopy(tokenizer)
    added = add_tokens(tokenizer, config.add_tokens)
    if config.chat_template is not None:
        tokenizer = with_template(copy.copy(tokenizer), config.chat_template, path)
    return tokenizer, added


def _load_base(
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: NewTokens,
    data: PreparedData,
    console: Console,
    given: Given,
) -> tuple[LoadedModel, int]:
    """The model before training and its vocabulary, once it is sure that it can compute every row."""
    if given.model is None:
        base = load_model(config.model, config.dtype, tokenizer, quantize=config.quantize, new_tokens=new_tokens)
    else:
        base = given_model(given.model, config.model, tokenizer, dtype=config.dtype, quantize=config.quantize)
    for note in (untested_note(base.config), joined_note(base.model)):
        if note:
            console.note(note)
    vocabulary = vocabulary_size(base.model, base.config)
    for part in (data.train, data.valid):
        check_vocabulary(part, vocabulary)
        _refuse_inexact_length(part, base.path)
    return base, vocabulary


def _attach_exportable(
    config: TrainConfig, base: LoadedModel, new_tokens: NewTokens, *, begun: bool
) -> tuple[TrainConfig, Method, Parameters]:
    """As `starting_parameters`, once it is sure that what will be trained can be merged into the checkpoint."""
    rows = first_rows(base.model)
    config, method, parameters = starting_parameters(config, base.model, begun=begun)
    check_exportable(base.path, method, parameters, rows, new_tokens=new_tokens)
    for value in parameters.values():
        mx.eval(value)  # one after another: what they are computed from may be as large as the model
    return config, method, parameters


def _planner(
    config: TrainConfig,
    machine: Machine,
    computer: GradientComputer,
    split: SplitModel,
    method: Method,
    parameters: Parameters,
    vocabulary: int,
    data: PreparedData,
    layout: Layout,
) -> MemoryPlanner:
    footprint = Footprint.of(
        config,
        split,
        method,
        parameters,
        vocabulary,
        head=computer.head_way,
        fused=machine.fused,
        composes_attention=computer.composes_attention,
    )
    return MemoryPlanner(config, machine, footprint, LongestRow.of(data.train, layout), layout)


def _hand_over(states: CallbackStates, callbacks: Callbacks, console: Console) -> None:
    """Give callbacks the states that a checkpoint holds."""
    if untaken := callbacks.load_state(states):
        names = ", ".join(untaken)
        console.warn(f"the checkpoint holds the state of {names}, a callback that this run does not have now")


def _refuse_dropout_outside_layers(method: Method, split: SplitModel, parameters: Parameters) -> None:
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


def _refuse_inexact_length(examples: Examples, path: Path) -> None:
    """Beyond some length, mlx-lm's code for a few families is not the model that was trained."""
    most = exact_length(path)
    if most is not None and examples.lengths.max(initial=0) > most:
        longest = examples[int(examples.lengths.argmax())]
        raise UserError(
            f"{len(longest)} tokens, and mlx-lm computes this model exactly for no more than {most}",
            where=longest.origin,
            hint=f"give --max-length {most}",
        )


def _decided(config: TrainConfig, settings: BatchSettings) -> TrainConfig:
    """Every `auto` replaced by what it stands for here, so that a resumed run repeats it to the byte."""
    decided = {
        "dtype": resolve_dtype(config.dtype),
        "micro_batch_tokens": settings.micro_batch_tokens,
        "grad_checkpoint": configured(settings.mode),
        "head_chunk": settings.head_chunk,
    }
    return config.model_copy(update=decided)


def _resumed(settings: BatchSettings, progress: Progress, anew: Collection[str]) -> tuple[BatchSettings, Progress]:
    """What out-of-memory recovery made of a run's settings stays, but for what is given anew; and that stays from now on."""
    kept = {
        "micro_batch_tokens": (progress.micro_batch_tokens, "micro_batch_tokens"),
        "mode": (progress.recompute, "grad_checkpoint"),
        "head_chunk": (progress.head_chunk, "head_chunk"),
    }
    changes: dict[str, Any] = {
        name: value for name, (value, setting) in kept.items() if value is not None and setting not in anew
    }
    settings = replace(settings, **changes)
    if anew:
        progress = progress.after(
            micro_batch_tokens=settings.micro_batch_tokens, recompute=settings.mode, head_chunk=settings.head_chunk
        )
    return settings, progress


def _create(
    config: TrainConfig, data: PreparedData, environment: dict[str, Any], console: Console, held: ExitStack
) -> RunFolder:
    """A run folder with its head, locked until `held` is closed."""
    run = RunFolder.create(config.out or RunFolder.default_path(config.model))
    held.enter_context(run.locked(console.warn))
    RunFolder.new(run.path)  # another process may have begun one meanwhile
    run.write_head(
        config=config.model_copy(update={"out": None}).to_yaml(CONFIG_HEADER),
        data_report=to_json(data.report.to_json()),
        environment=to_json(environment),
    )
    return run
