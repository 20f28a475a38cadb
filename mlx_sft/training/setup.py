"""Everything before the first step: configuration, data, model and plan become a `Job`.

Nothing is written before all of it is known to be good.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from transformers import PreTrainedTokenizerBase

from mlx_sft.common_settings import IN_MEMORY
from mlx_sft.config import TrainConfig
from mlx_sft.console import Console
from mlx_sft.convert.merge import check_exportable
from mlx_sft.data.chat_template import template_text, with_template
from mlx_sft.data.dataset import check_vocabulary
from mlx_sft.data.new_tokens import NewTokens, add_tokens
from mlx_sft.data.prepare import prepare
from mlx_sft.data.template import with_todays_variables
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import to_json
from mlx_sft.methods import for_new_tokens
from mlx_sft.model.given import given_model, given_tokenizer
from mlx_sft.model.head import SplitModel
from mlx_sft.model.linears import joined_note
from mlx_sft.model.load import extended_tokenizer, load_model, resolve_checkpoint, resolve_dtype, untested_note
from mlx_sft.model.quantize import WeightRow, first_rows
from mlx_sft.model.translate import read_config
from mlx_sft.model.vocabulary import vocabulary_size
from mlx_sft.objectives import make_objective
from mlx_sft.optimizers import make_optimizer
from mlx_sft.run_folder import RunFolder
from mlx_sft.training import checkpoint, device, lead, sharded
from mlx_sft.training.batch_settings import (
    BatchSettings,
    LongestRow,
    MemoryPlanner,
    asked_for,
    decided,
    layout_on,
    predicted_peak,
)
from mlx_sft.training.callbacks import Callback, Callbacks
from mlx_sft.training.checkpoint import Progress
from mlx_sft.training.device import Measured, attention_in_blocks, measure
from mlx_sft.training.disk_need import DiskNeed
from mlx_sft.training.fitting import refuse_too_large, what_would_fit
from mlx_sft.training.forgetting import ForgettingMeter
from mlx_sft.training.job import Job
from mlx_sft.training.machine import hold_to, prepare_device, this_machine, within
from mlx_sft.training.memory import Footprint
from mlx_sft.training.ranks import ALONE, Ranks
from mlx_sft.training.reference import Start
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
from mlx_sft.training.schedule import epochs_of, planned_steps
from mlx_sft.training.shapes import compiled_shapes
from mlx_sft.training.start import (
    new_config,
    refuse_dropout_outside_layers,
    refuse_inexact_length,
    resumed_run,
    starting_parameters,
    starting_progress,
)
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
    config: TrainConfig,
    console: Console,
    held: ExitStack | None = None,
    given: Given | None = None,
    ranks: Ranks = ALONE,
) -> Job:
    """Load and check everything that the configuration names; write the head of the run folder.

    Args:
        held: Keeps the lock of the run folder until it is closed; where None, it is given back when the job is prepared.
        given: What is in memory already.
        ranks: The processes that share it, of which this is the first.

    Raises:
        UserError: For anything in data, model, adapter or configuration that cannot be.
    """
    started = time.monotonic()
    prepare_device()
    mx.reset_peak_memory()
    setup = Setup(config, console, ExitStack() if held is None else held, given or Given(), ranks)
    setup.read_data()
    if ranks.sharded:
        sharded.begin(setup.config, ranks, identity_of(setup.config, setup.data, setup.path), begun=setup.begun)
    with sharded.agreed(ranks):
        setup.load_base()
    setup.adapt()
    setup.plan_memory()
    setup.find_reference()
    setup.plan_steps(started)
    setup.take_up_state()
    return setup.job()


class Setup:
    """What is known of a run before it is a job: each method finds what those after it need.

    Attributes:
        run: The folder of a run that goes on, and in the end that of every run.
        begun: Whether it has a checkpoint, and so needs nothing of what it began with.
        anew: What is given with `--resume` of how it is computed.
    """

    def __init__(
        self, config: TrainConfig, console: Console, held: ExitStack, given: Given, ranks: Ranks = ALONE
    ) -> None:
        self.console, self.held, self.given, self.ranks = console, held, given, ranks
        self.anew, self.more_time = computed_anew(config), config.time_limit is not None
        self.config, self.run = _opened(_with_given(config, given), console, held)
        sharded.settle(self.config, ranks, config.model_fields_set, console, in_memory=given.model is not None)
        self.begun = self.run is not None and bool(self.run.checkpoint_steps())
        self.path = resolve_checkpoint(self.config.model)
        self.callbacks = Callbacks.of_run(self.config, given.callbacks)

    def read_data(self) -> None:
        """The tokenizer, what was added to it, and the rows as it writes them; a new run pins the day on which it begins."""
        read_config(self.path)  # first, because the tokenizer would take the blame
        self.tokenizer, self.new_tokens = _tokenizer(self.config, self.path, self.given)
        config = for_new_tokens(self.config, self.new_tokens.ids)
        if note := self.new_tokens.note():
            self.console.note(note)
        if self.run is None:
            if config.chat_template is not None:
                config = config.model_copy(update={"chat_template": template_text(config.chat_template)})
            config = with_todays_variables(config, self.tokenizer)
        with self.console.reading() as reading:
            rows, valid_rows = self.given.data, self.given.valid
            self.data = prepare(config, self.tokenizer, reading, rows=rows, valid_rows=valid_rows)
        settled = {"valid_fraction": self.data.valid_fraction, "epochs": epochs_of(config, self.data)}
        config = config.model_copy(update=settled)
        self.callbacks.check(config, self.data)
        self.config = config

    def load_base(self) -> None:
        """The model without its method, or this process's part of it."""
        config, given = self.config, self.given
        self.machine = self.ranks.narrowed(within(this_machine(), config))
        # Rather than go beyond it, MLX waits for operations that are under way.
        mx.set_memory_limit(self.machine.memory)
        settings: dict[str, Any] = {"quantize": config.quantize}
        if given.model is None:
            new, group = self.new_tokens, self.ranks.group
            refuse_too_large(config, self.path, self.machine, self.data.train, new, group)
            base = load_model(config.model, config.dtype, self.tokenizer, new_tokens=new, group=group, **settings)
        else:
            base = given_model(given.model, config.model, self.tokenizer, dtype=config.dtype, **settings)
        for note in filter(None, (untested_note(base.config), joined_note(base.model))):
            self.console.note(note)
        self.base, self.vocabulary = base, vocabulary_size(base.model, base.config)
        for part in (self.data.train, self.data.valid):
            check_vocabulary(part, self.vocabulary)

    def adapt(self) -> None:
        """The method is attached, once it is sure that rows can be computed and the result be merged; of a split base in all processes."""
        rows = first_rows(self.base.model)
        with self.ranks.of_parts():
            self.split = SplitModel(self.base.model)
        self.meter = None
        if not self.ranks.sharded:
            self.meter = ForgettingMeter.of_run(self.config, self.data, self.split, self.vocabulary, self.console)
        elif self.config.forgetting and self.data.valid:
            self.console.note("forgetting is not measured: the base is split among processes")
        with sharded.agreed(self.ranks):
            self._attach(rows)
        objective, mode = make_objective(self.config), asked_for(self.config)[0]
        noise = self.config.neftune_alpha
        with self.ranks.of_parts():
            self.computer = GradientComputer(
                self.split, self.method, self.vocabulary, objective, recompute=mode, neftune_alpha=noise
            )
            self.layout = layout_on(self.machine, self.computer, self.parameters, self.data.train)
        if self.meter:
            self.meter.settle(head_is_frozen=self.computer.head_is_frozen(self.parameters))

    def _attach(self, rows: dict[str, WeightRow]) -> None:
        self.config, self.method, self.parameters = starting_parameters(
            self.config, self.base.model, self.tokenizer, begun=self.begun
        )
        if note := self.method.start_note():
            self.console.note(note)
        if self.ranks.rank == 0:  # of another's part, the first row is not the checkpoint's
            check_exportable(self.base.path, self.method, self.parameters, rows, new_tokens=self.new_tokens)
        for value in self.parameters.values():
            mx.eval(value)  # one after another: what they are computed from may be as large as the model
        refuse_dropout_outside_layers(self.method, self.split, self.parameters)
        for part in (self.data.train, self.data.valid):
            refuse_inexact_length(part, self.base.path, self.method)

    def plan_memory(self) -> None:
        """How a step is computed on this machine, by what is measured now, or was when a run that goes on began."""
        config, computer, parameters, machine, train, layout = (
            self.config, self.computer, self.parameters, self.machine, self.data.train, self.layout,
        )  # fmt: skip
        if not self.ranks.sharded:
            device.ask(computer, parameters, layout, asked_for(config)[-1], machine, self.console)
        if self.run:
            self.measured = Measured.of_run(self.run)
        elif self.ranks.sharded:
            self.measured = Measured()
        else:
            self.measured = measure(computer, self.split, parameters, train, layout, machine)
        layout = replace(layout, call_cost=self.measured.call_cost)
        self.held.enter_context(attention_in_blocks(self.measured.attention_block))
        footprint = Footprint.of(
            config, self.split, self.method, parameters, self.vocabulary, head=computer.head_way, fused=machine.fused,
            composes_attention=computer.composes_attention,
        )  # fmt: skip
        ways_out = partial(
            what_would_fit, path=self.path, dtype=resolve_dtype(config.dtype), new_tokens=self.new_tokens
        )
        planner = MemoryPlanner(config, machine, footprint, LongestRow.of(train, layout), layout, ways_out)
        if self.ranks.sharded:
            planner = replace(planner, ways_out=None, why_no_probe=sharded.NO_PROBE)
        self.memory, settings = planner.plan(computer, parameters, len(train))
        self.settings = settings if config.micro_batch_tokens is not None else lead.cut_to_share(self, settings)
        self.config = decided(config, self.settings)

    def find_reference(self) -> None:
        """What the model, as training starts, finds of every example, where the objective asks for it; a run that goes on has kept it."""
        start = Start(self.config, self.path, self.method, self.parameters, self.computer, self.settings)
        self.reference = start.reference(self.data, self.run, self.console)

    def plan_steps(self, started: float) -> None:
        """As many as the configuration says, or as end in the time that it gives since `started`."""
        self.plan = planned_steps(self.config, self.data)
        if self.run is None and self.config.time_limit is not None and self.config.resume_from_peft is None:
            self._configure()
            self.config, self.plan = within_time(
                self.config, self.plan, self.data, self.computer, self.parameters, self.settings,
                checkpoint_bytes=self.memory.footprint.checkpoint_bytes,
                started=started, console=self.console,
            )  # fmt: skip

    def _configure(self) -> None:
        """Which shapes are compiled follows from the plan alone, so that a run that goes on compiles the same."""
        tokens, layout = self.settings.micro_batch_tokens, self.settings.layout
        compiled = () if self.ranks.sharded else compiled_shapes(self.plan, self.data.train, tokens, layout)
        self.computer.configure(self.settings.mode, compiled, self.settings.head_chunk)

    def take_up_state(self) -> None:
        """The optimizer, and where the run stands: at its beginning, at its newest checkpoint, or where a TRL export stopped."""
        config, run, steps = self.config, self.run, self.plan.total_steps
        self.optimizer = make_optimizer(
            config, self.parameters, self.method.decayed, self.method.rate, compiled=self.machine.compiles
        )
        identity = self.identity = identity_of(config, self.data, self.path)
        if run:
            refuse_changes(run, config, self.data, identity)
        if run and self.begun:
            expected = self.parameters | self.method.fixed
            progress, kept, states = checkpoint.load(run, expected, self.optimizer, identity, seed=config.seed)
            self.parameters = self.method.take_up(kept)
            if untaken := self.callbacks.load_state(states):
                names = ", ".join(untaken)
                self.console.warn(
                    f"the checkpoint holds the state of {names}, a callback that this run does not have now"
                )
        else:
            progress = starting_progress(config, self.parameters, self.optimizer, identity, steps)
        if run:
            if self.more_time or progress.stopped_of != steps:  # one that a callback ended early goes on with more
                progress = progress.after(stopped_of=None)
            self.settings, progress = _resumed(self.settings, progress, self.anew)
        self.progress = progress
        lead.begin(self)

    def job(self) -> Job:
        """The job, once there is room on the disk; the head of its folder is written."""
        config, run, plan, goes_back = self.config, self.run, self.plan, self.callbacks.may_go_back
        predicted = predicted_peak(self.memory.footprint, self.settings, plan, self.data.train)
        sizes = self.memory.footprint.checkpoint_bytes, self.method.written_bytes(self.parameters)
        disk = DiskNeed.of_run(*sizes, config, plan, goes_back=goes_back)
        disk.refuse_where_short(run.path if run else Path(config.out or "."), run.checkpoints if run else None)
        if run:
            record_revision(run, config, plan.total_steps)
        else:
            environment = describe_environment(config, self.identity, plan.total_steps)
            environment |= {"memory": self.memory.describe(predicted), "measured": asdict(self.measured)}
            if self.reference is not None:
                environment |= {"reference": self.reference.digest()}
            run = RunFolder.create(config.out or RunFolder.default_path(config.model))
            self.held.enter_context(run.locked(self.console.warn))
            RunFolder.new(run.path)  # another process may have begun one meanwhile
            run.write_head(
                config=config.model_copy(update={"out": None}).to_yaml(CONFIG_HEADER),
                data_report=to_json(self.data.report.to_json()),
                environment=to_json(environment),
                reference=self.reference.write if self.reference else None,
            )
        hold_to(self.machine, predicted)
        self._configure()
        self.computer.bind(self.parameters)
        return Job(
            config, run, self.base, self.split, self.method, self.computer, plan, self.data, self.parameters, self.optimizer,
            self.callbacks, self.identity, self.progress, self.console, self.memory, self.settings, predicted, disk, meter=self.meter,
        )  # fmt: skip


def _with_given(config: TrainConfig, given: Given) -> TrainConfig:
    """The configuration says that rows came from memory, where they did; raises `UserError` where it names others too."""
    in_memory: tuple[tuple[str, Any, Any], ...] = (("data", given.data, [IN_MEMORY]), ("valid", given.valid, IN_MEMORY))
    for name, rows, said in in_memory:
        stated = getattr(config, name)
        if rows is None:
            continue
        if stated and stated != said:
            what = f"{name} is given twice: as rows in memory, and in the configuration as {stated}"
            raise UserError(what, hint="leave one of them out", exit_code=USAGE)
        config = config.model_copy(update={name: said})
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
