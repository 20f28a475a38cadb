"""Everything before the first step: configuration, data, model and plan become a `Job`; a resumed run is checked.

Nothing is written before all of it is known to be good. Knows nothing of the loop.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sft.config import TrainConfig, option_name, public_name
from mlx_sft.console import Console, count, size
from mlx_sft.convert.adapted import check_fit
from mlx_sft.convert.peft import read_adapter
from mlx_sft.data.batches import Plan, collate, cut
from mlx_sft.data.encode import Example, decoded_segments
from mlx_sft.data.prepare import PreparedData, prepare
from mlx_sft.data.template import todays_variables
from mlx_sft.errors import USAGE, UserError
from mlx_sft.methods import Full, Lora, Parameters, make_method
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import (
    LoadedModel,
    checkpoint_fingerprint,
    load_model,
    load_tokenizer,
    resolve_checkpoint,
    resolve_dtype,
)
from mlx_sft.runs import RunFolder, to_json, user_path
from mlx_sft.training import checkpoint
from mlx_sft.training.checkpoint import Progress
from mlx_sft.training.memory import Footprint, ThisMachine, choose, prepare_device
from mlx_sft.training.optim import AdamW
from mlx_sft.training.step import Learner, Shape, lengths_of, padded_shape

_MOST_TRACES = 16
_PACKAGES = ("mlx-sft", "mlx", "mlx-lm", "transformers", "numpy", "safetensors")
_NOT_THE_RESULT = {"out", "resume", "quiet", "json_lines", "keep"}
"""Settings that may differ between a run and its continuation."""


@dataclass
class Job:
    """A run that is ready to take its next step."""

    config: TrainConfig
    run: RunFolder
    base: LoadedModel
    method: Lora | Full
    learner: Learner
    plan: Plan
    data: PreparedData
    lengths: list[int]
    parameters: Parameters
    optimizer: AdamW
    identity: dict[str, str]
    progress: Progress
    console: Console


def prepare_job(config: TrainConfig, console: Console) -> Job:
    """Load and check everything that the configuration names; write the head of the run folder.

    Raises:
        UserError: For anything in data, model, adapter or configuration that cannot be.
    """
    prepare_device()
    run = RunFolder.open(config.resume) if config.resume else None
    config = _resumed_config(config, run) if run else _with_full_paths(config)
    if run is None and config.out is not None:
        RunFolder.new(config.out)  # before the work, not after it
    path = resolve_checkpoint(config.model)
    tokenizer = load_tokenizer(path)
    if run is None:
        pinned = todays_variables(tokenizer) | config.chat_template_kwargs
        config = config.model_copy(update={"chat_template_kwargs": pinned})
    data = prepare(config, tokenizer)
    if config.early_stop and not data.valid:
        hint = "give --valid FILE or --valid-fraction 0.05"
        raise UserError("--early-stop needs validation rows", hint=hint, exit_code=USAGE)
    base = load_model(config.model, config.dtype, tokenizer)
    split = SplitModel(base.model)
    config, method, parameters = _attach(config, base)
    lengths = lengths_of(data.train)
    config = _fit_to_machine(config, split, parameters, lengths)
    plan = Plan(
        len(data.train),
        batch_size=config.batch_size,
        epochs=config.epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        shuffle=config.shuffle,
    )
    optimizer = AdamW(config, parameters, method.decayed)
    identity = _identity(config, data, path)
    run, progress, parameters = _open_or_create(config, run, data, identity, parameters, optimizer)
    vocabulary = int(base.config.get("vocab_size") or len(tokenizer))
    learner = Learner(
        split,
        method,
        vocabulary,
        recompute=config.grad_checkpoint == "on",
        compiled=_compiled_shapes(config, plan, data.train, lengths),
    )
    job = Job(
        config, run, base, method, learner, plan, data, lengths,
        parameters, optimizer, identity, progress, console,
    )  # fmt: skip
    _show(job, split)
    return job


def _resumed_config(given: TrainConfig, run: RunFolder) -> TrainConfig:
    """The run's own configuration; whatever else was given must agree with it."""
    saved = TrainConfig.resolve(run.config)
    full = _with_full_paths(given)
    for field in sorted(given.model_fields_set - _NOT_THE_RESULT):
        before, now = getattr(saved, field), getattr(full, field)
        if field == "chat_template_kwargs":
            now = before | now  # the run added the day on which it began
        if now != before and now != "auto":
            raise UserError(
                f"{option_name(field)} {now} differs from the run's {before}",
                where=str(run.config),
                hint="leave it out to resume, or start a new run",
                exit_code=USAGE,
            )
    if given.out is not None and user_path(given.out).resolve() != run.path.resolve():
        what = "--out names another folder than --resume"
        raise UserError(what, where=given.out, hint="leave it out to resume", exit_code=USAGE)
    names = {"quiet", "json_lines", "resume"} | (given.model_fields_set & {"keep"})
    return saved.model_copy(update={name: getattr(given, name) for name in names})


def _with_full_paths(config: TrainConfig) -> TrainConfig:
    """What lies on disk by its full path, so that the run folder can be used from anywhere."""
    names = ("data", "valid", "model", "init_adapter")
    given = {name: getattr(config, name) for name in names}
    full = {
        name: str(user_path(value).resolve())
        for name, value in given.items()
        if value is not None and value != "tiny" and user_path(value).exists()
    }
    return config.model_copy(update=full)


def _attach(config: TrainConfig, base: LoadedModel) -> tuple[TrainConfig, Lora | Full, Parameters]:
    """The method and its parameters at the start; an initial adapter decides over its own shape."""
    where = config.init_adapter
    if where is None:
        method = make_method(config)
        return config, method, method.attach(base.model, config.seed)
    settings, trained = read_adapter(where)
    decided = {
        "rank": settings.rank,
        "alpha": settings.alpha,
        "rslora": settings.rslora,
        "target": list(settings.targets),
    }
    for name, value in decided.items():
        if name in config.model_fields_set and getattr(config, name) != value:
            raise UserError(
                f"{option_name(name)} {getattr(config, name)} differs from the adapter's {value}",
                where=where,
                hint="leave it out; the adapter decides over its own shape",
                exit_code=USAGE,
            )
    config = config.model_copy(update=decided)
    method = make_method(config)
    try:
        start = method.attach(base.model, config.seed)
    except UserError as error:
        what = f"this adapter is for another model: {error.what}"
        raise UserError(what, where=where, hint=error.hint) from error
    check_fit(trained, start, Path(where))
    return config, method, {name: trained[name] for name in start}


def _fit_to_machine(config: TrainConfig, split: SplitModel, parameters: Parameters, lengths: list[int]) -> TrainConfig:
    """Replace every `auto` by what it stands for here, so that a resumed run repeats it to the byte."""
    trainable = sum(value.size for value in parameters.values())
    choice = choose(
        Footprint.of(split, trainable),
        ThisMachine().usable_bytes(),
        max(lengths),
        micro_batch_tokens=config.micro_batch_tokens,
        grad_checkpoint=config.grad_checkpoint,
    )
    decided = {
        "dtype": resolve_dtype(config.dtype),
        "micro_batch_tokens": choice.micro_batch_tokens,
        "grad_checkpoint": "on" if choice.recompute else "off",
    }
    return config.model_copy(update=decided)


def _compiled_shapes(config: TrainConfig, plan: Plan, examples: list[Example], lengths: list[int]) -> list[Shape]:
    """The most frequent shapes of the first epoch: the plan says beforehand which traces will pay for themselves."""
    if mx.default_device() != mx.Device(mx.gpu):
        return []  # on the CPU a trace takes seconds of g++ and saves nothing
    shapes: Counter[Shape] = Counter()
    for step in plan.steps():
        if step.epoch > 1:
            break
        for micro_batch in cut(step.rows, lengths, config.micro_batch_tokens or 1):
            shapes[padded_shape(collate(examples, micro_batch))] += 1
    frequent = sorted(shapes.items(), key=lambda item: (-item[1], item[0]))
    return [shape for shape, times in frequent[:_MOST_TRACES] if times > 2]


def _identity(config: TrainConfig, data: PreparedData, path: Path) -> dict[str, str]:
    """Hashes of what decides the result."""
    settings = json.dumps(_result_settings(config), sort_keys=True)
    return {
        "config": hashlib.sha256(settings.encode()).hexdigest(),
        "data": data.report.fingerprint,
        "model": checkpoint_fingerprint(path),
    }


def _result_settings(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=_NOT_THE_RESULT)


def _open_or_create(
    config: TrainConfig,
    run: RunFolder | None,
    data: PreparedData,
    identity: dict[str, str],
    parameters: Parameters,
    optimizer: AdamW,
) -> tuple[RunFolder, Progress, Parameters]:
    if run is not None:
        _refuse_changes(run, config, data, identity)
        progress, parameters = checkpoint.load(run, parameters, optimizer, identity)
        return run, progress, parameters
    run = RunFolder.create(config.out or RunFolder.default_path(config.model))
    run.write_head(
        config=config.model_copy(update={"out": None}).to_yaml("# mlx-sft train --config config.yaml\n"),
        data_report=to_json(data.report.to_json()),
        environment=to_json(_environment(config, identity)),
    )
    return run, Progress(), parameters


def _environment(config: TrainConfig, identity: dict[str, str]) -> dict[str, Any]:
    return {
        "packages": {name: version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": {"default": str(mx.default_device()), **mx.device_info()},
        "identity": identity,
        "settings": _result_settings(config),
    }


def _refuse_changes(run: RunFolder, config: TrainConfig, data: PreparedData, identity: dict[str, str]) -> None:
    """Raise `UserError` naming what is not as it was when the run began."""
    began = _read_json(run.environment)
    settings, before = _result_settings(config), began.get("settings", {})
    changed = [public_name(name) for name in settings if settings[name] != before.get(name)]
    if changed:
        hint = "put it back as it was, or start a new run with `mlx-sft train --config`"
        what = f"{', '.join(changed)} changed since the run began"
        raise UserError(what, where=str(run.config), hint=hint)
    known = began.get("identity", {})
    if known.get("data") != identity["data"]:
        reported = {s["name"]: s["sha256"] for s in _read_json(run.data_report).get("sources", [])}
        files = [s.name for s in data.report.sources if reported.get(s.name) != s.sha256]
        what = "the data changed since the run began: " + (", ".join(files) or "it reads differently")
        raise UserError(what, where=str(run.path), hint="put it back as it was, or start a new run")
    if known.get("model") != identity["model"]:
        what = f"the model {config.model} changed since the run began"
        raise UserError(what, where=str(run.path), hint="put it back as it was, or start a new run")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = "start a new run with `mlx-sft train --config` on its config.yaml"
        raise UserError(f"cannot be read: {error}", where=str(path), hint=hint) from error
    return content


def _show(job: Job, split: SplitModel) -> None:
    """Before anything is learnt: what from, and how."""
    config, report, console = job.config, job.data.report, job.console
    train = report.train
    trainable = sum(value.size for value in job.parameters.values())
    facts = {
        "model": f"{config.model} ({config.dtype})",
        "rows": f"{count(train.rows)} to learn from, {count(report.valid.rows)} held out"
        + "".join(
            f", {getattr(report, fate)} {fate}" for fate in ("truncated", "dropped", "bad") if getattr(report, fate)
        ),
        "tokens": f"{count(train.tokens)}, {train.supervised_share:.0%} supervised; "
        f"a row has {train.lengths['p50']:.0f} (median) to {train.lengths['max']:.0f}",
        "trains": f"{count(trainable)} parameters ({config.method})",
        "steps": f"{job.plan.total_steps} of {config.batch_size} conversations, "
        f"up to {config.micro_batch_tokens} tokens at once"
        + (", layers recomputed" if config.grad_checkpoint == "on" else ""),
        "memory": f"{size(mx.get_active_memory())} for the weights",
        "run": str(job.run.path),
    }
    console.conversation(
        f"{job.data.train[0].origin}, with what will be learnt",
        decoded_segments(job.base.tokenizer, job.data.train[0]),
    )
    console.facts("Learning from", facts)
    if report.shared:
        console.warn(f"{report.shared} validation rows are also training rows")
    if split.body_name is None:
        console.warn(
            "this model's head cannot be told from its body; logits of every position are kept, "
            "which takes more memory and changes nothing else"
        )
    if job.progress.step:
        console.note(f"resuming after step {job.progress.step}")
