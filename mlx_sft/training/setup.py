"""Everything before the first step: configuration, data, model and plan become a `Job`.

Nothing is written before all of it is known to be good. Knows nothing of the loop.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from transformers import PreTrainedTokenizerBase

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console
from mlx_sft.convert.merge import check_exportable
from mlx_sft.data.batches import Plan, Step
from mlx_sft.data.dataset import Examples, check_vocabulary
from mlx_sft.data.prepare import PreparedData, prepare
from mlx_sft.data.template import todays_variables
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import to_json
from mlx_sft.methods import Method, Parameters
from mlx_sft.model.head import SplitModel
from mlx_sft.model.linears import is_quantized
from mlx_sft.model.load import (
    LoadedModel,
    load_model,
    load_tokenizer,
    resolve_checkpoint,
    resolve_dtype,
    untested_note,
    vocabulary_size,
)
from mlx_sft.model.quantize import first_rows
from mlx_sft.model.translate import exact_length, read_config
from mlx_sft.run_folder import RunFolder
from mlx_sft.training import checkpoint
from mlx_sft.training.checkpoint import Progress
from mlx_sft.training.choice import Choice, asked_for, configured
from mlx_sft.training.disk import DiskNeed
from mlx_sft.training.fit import (
    Fit,
    allowed_machine,
    fit_to_machine,
    hold_to,
    layout_on,
    planned_steps,
    refuse_too_large,
)
from mlx_sft.training.machine import prepare_device
from mlx_sft.training.memory import Footprint, Prediction
from mlx_sft.training.optim import AdamW, learning_rate
from mlx_sft.training.resume import (
    CONFIG_HEADER,
    computed_anew,
    describe_environment,
    identity_of,
    record_revision,
    refuse_changes,
    resumed_config,
)
from mlx_sft.training.shapes import compiled_shapes
from mlx_sft.training.start import new_config, resumed_run, starting_parameters, starting_progress
from mlx_sft.training.step import Learner
from mlx_sft.training.stopping import StopRequest


@dataclass(frozen=True)
class Given:
    """What `train` was given beside the configuration; see there."""

    data: Any = None
    valid: Any = None
    model: Any = None
    tokenizer: Any = None
    callbacks: tuple[Callback, ...] = ()


@dataclass
class Job:
    """A run that is ready to take its next step; callbacks see it as a `TrainingRun`."""

    config: TrainConfig
    run: RunFolder
    base: LoadedModel
    split: SplitModel
    method: Method
    gradient_computer: GradientComputer
    plan: Plan
    data: PreparedData
    parameters: Parameters
    optimizer: Optimizer
    callbacks: Callbacks
    identity: dict[str, str]
    progress: Progress
    console: Console
    memory: MemoryPlan
    predicted: Prediction
    disk: DiskNeed
    request: StopRequest = field(default_factory=StopRequest)
    stop_reason: str | None = None
    went_back: bool = False

    @property
    def settings(self) -> BatchSettings:
        """How its steps are computed now."""
        return self.memory.settings

    def learning_rate(self, step: Step) -> float:
        """That of the schedule, or what rollbacks have left of it."""
        return learning_rate(self.config, step.number, self.plan.total_steps) * self.progress.rate_factor

    # As callbacks see it

    @property
    def folder(self) -> RunFolder:
        return self.run

    @property
    def step(self) -> int:
        return self.progress.step

    @property
    def total_steps(self) -> int:
        return self.plan.total_steps

    @property
    def model(self) -> nn.Module:
        return self.base.model

    @property
    def tokenizer(self) -> Any:
        return self.base.tokenizer

    def emit(self, record: Record) -> None:
        self.callbacks.emit(self, record)

    def stop(self, reason: str) -> None:
        self.stop_reason = reason
        self.progress = self.progress.after(stopped_of=self.plan.total_steps)

    def suspect(self, steps: int) -> None:
        self.progress = self.progress.after(suspect=steps)

    def go_back(self, step: int, *, rate_factor: float) -> None:
        checkpoint.remove_after(self.run, step)
        seed = self.config.seed
        progress, self.parameters, states = checkpoint.load(
            self.run, self.parameters, self.optimizer, self.identity, seed=seed
        )
        self.progress = progress.after(rate_factor=rate_factor)
        self.callbacks.load_state(states)
        self.went_back = True


def prepare_job(config: TrainConfig, console: Console, held: ExitStack | None = None) -> Job:
    """Load and check everything that the configuration names; write the head of the run folder.

    Args:
        held: Keeps the lock of the run folder until it is closed; where None, it is given back when the job is prepared.

    Raises:
        UserError: For anything in data, model, adapter or configuration that cannot be.
    """
    prepare_device()
    mx.reset_peak_memory()
    held = ExitStack() if held is None else held
    anew = computed_anew(config)
    config, run = _opened(config, console, held)
    path = resolve_checkpoint(config.model)
    config, tokenizer, data = _read_data(config, path, console, new=run is None)
    machine = allowed_machine(config)
    refuse_too_large(config, path, machine)
    base, vocabulary = _load_base(config, tokenizer, data, console)
    split = SplitModel(base.model)
    begun = run is not None and bool(run.checkpoint_steps())
    config, method, parameters = _attach_exportable(config, base, begun=begun)
    _refuse_dropout_outside_layers(config, split, parameters)
    learner = Learner(split, method, vocabulary, recompute=asked_for(config)[0])
    fit = fit_to_machine(
        config,
        machine,
        Footprint.of(
            split,
            parameters,
            vocabulary,
            tiled=learner.tiled_head is not None,
            fused=machine.fused,
            accumulates=config.batch_size > 1,
        ),
        data.train,
        learner,
        parameters,
        layout_on(machine, learner),
    )
    config = _decided(config, fit.choice)
    plan = planned_steps(config, data)
    optimizer = AdamW(config, parameters, method.decayed)
    identity = identity_of(config, data, path)
    if run:
        refuse_changes(run, config, data, identity)
    if run and begun:
        progress, parameters = checkpoint.load(run, parameters, optimizer, identity, seed=config.seed)
    else:
        progress = starting_progress(config, parameters, optimizer, identity, plan.total_steps)
    if run:
        fit, progress = _resumed(fit, _gone_on(progress, plan), anew)
    predicted = fit.largest(plan, data.train)
    disk = DiskNeed.of_run(parameters, config, plan)
    disk.refuse_where_short(run.path if run else Path(config.out or "."), run.checkpoints if run else None)
    if run:
        record_revision(run, config)
    else:
        environment = describe_environment(config, identity) | {"memory": fit.describe(predicted)}
        run = _create(config, data, environment, held)
    hold_to(machine, predicted)
    compiled = compiled_shapes(machine, plan, data.train, fit.choice.micro_batch_tokens)
    learner.configure(fit.choice.mode, compiled, fit.choice.head_chunk)
    return Job(
        config, run, base, split, method, learner, plan, data,
        parameters, optimizer, identity, progress, console, fit, predicted, disk,
    )  # fmt: skip


def _opened(config: TrainConfig, console: Console, held: ExitStack) -> tuple[TrainConfig, RunFolder | None]:
    """The settings of a run that begins, or of one that goes on, and then its folder, locked and without damaged checkpoints."""
    if not config.resume:
        config = new_config(config, console)
        if config.out is not None:
            RunFolder.new(config.out)  # before the work, not after it
        return config, None
    run = resumed_run(config.resume)
    held.enter_context(run.locked())
    for damage in checkpoint.set_aside_damaged(run):
        console.warn(damage)
    return resumed_config(config, run), run


def _read_data(
    config: TrainConfig, path: Path, console: Console, *, new: bool
) -> tuple[TrainConfig, PreTrainedTokenizerBase, PreparedData]:
    """The tokenizer of a checkpoint folder, and the rows as it writes them; a new run pins the day on which it begins."""
    read_config(path)  # first, because the tokenizer would take the blame
    tokenizer = load_tokenizer(path)
    if new:
        pinned = todays_variables(tokenizer) | config.chat_template_kwargs
        config = config.model_copy(update={"chat_template_kwargs": pinned})
    with console.reading() as reading:
        data = prepare(config, tokenizer, reading)
    if config.early_stop and not data.valid:
        hint = "give --valid FILE or --valid-fraction 0.05"
        raise UserError("--early-stop needs validation rows", hint=hint, exit_code=USAGE)
    return config, tokenizer, data


def _load_base(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, data: PreparedData, console: Console
) -> tuple[LoadedModel, int]:
    """The model before training and its vocabulary, once it is sure that it can compute every row."""
    base = load_model(config.model, config.dtype, tokenizer, quantize=config.quantize)
    if note := untested_note(base.config):
        console.note(note)
    vocabulary = vocabulary_size(base.model, base.config)
    for part in (data.train, data.valid):
        check_vocabulary(part, vocabulary)
        _refuse_inexact_length(part, base.path)
    return base, vocabulary


def _attach_exportable(
    config: TrainConfig, base: LoadedModel, *, begun: bool
) -> tuple[TrainConfig, Method, Parameters]:
    """As `starting_parameters`, once it is sure that what will be trained can be merged into the checkpoint."""
    if config.method == "full" and any(is_quantized(module) for module in base.model.modules()):
        hint = "train adapters on it with --method lora, or give the original"
        raise UserError(
            "the weights of this model are quantized, and cannot be trained", where=str(base.path), hint=hint
        )
    rows = first_rows(base.model)
    config, method, parameters = starting_parameters(config, base.model, begun=begun)
    check_exportable(base.path, method, parameters, rows)
    for value in parameters.values():
        mx.eval(value)  # one after another: what they are computed from may be as large as the model
    return config, method, parameters


def _refuse_dropout_outside_layers(config: TrainConfig, split: SplitModel, parameters: Parameters) -> None:
    """The head is computed chunk by chunk, where one random mask for all chunks would not be dropout."""
    outside = split.outside_layers(parameters)
    if config.dropout and outside:
        module = next(iter(outside)).rpartition(".")[0]
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


def _decided(config: TrainConfig, choice: Choice) -> TrainConfig:
    """Every `auto` replaced by what it stands for here, so that a resumed run repeats it to the byte."""
    decided = {
        "dtype": resolve_dtype(config.dtype),
        "micro_batch_tokens": choice.micro_batch_tokens,
        "grad_checkpoint": configured(choice.mode),
        "head_chunk": choice.head_chunk,
    }
    return config.model_copy(update=decided)


def _gone_on(progress: Progress, plan: Plan) -> Progress:
    """A run that ended early goes on where it is given more steps, and waits for a better evaluation anew."""
    if progress.stopped_of in (None, plan.total_steps):
        return progress
    return progress.after(stopped_of=None, evaluations_without_better=0)


def _resumed(fit: Fit, progress: Progress, anew: Collection[str]) -> tuple[Fit, Progress]:
    """What a shortage of memory made of a run's settings stays, but for what is given anew; and that stays from now on."""
    choice = fit.choice
    if progress.micro_batch_tokens is not None and "micro_batch_tokens" not in anew:
        choice = replace(choice, micro_batch_tokens=progress.micro_batch_tokens)
    if progress.recompute is not None and "grad_checkpoint" not in anew:
        choice = replace(choice, mode=progress.recompute)
    if progress.head_chunk is not None and "head_chunk" not in anew:
        choice = replace(choice, head_chunk=progress.head_chunk)
    if anew:
        progress = progress.after(
            micro_batch_tokens=choice.micro_batch_tokens, recompute=choice.mode, head_chunk=choice.head_chunk
        )
    return replace(fit, choice=choice), progress


def _create(config: TrainConfig, data: PreparedData, environment: dict[str, Any], held: ExitStack) -> RunFolder:
    """A run folder with its head, locked until `held` is closed."""
    run = RunFolder.create(config.out or RunFolder.default_path(config.model))
    held.enter_context(run.locked())
    RunFolder.new(run.path)  # another process may have begun one meanwhile
    run.write_head(
        config=config.model_copy(update={"out": None}).to_yaml(CONFIG_HEADER),
        data_report=to_json(data.report.to_json()),
        environment=to_json(environment),
    )
    return run
