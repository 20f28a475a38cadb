"""The verb `plan`: what a run would take on a machine, and what would fit, before any weight is read.

config.json ─► outline ─► footprint ─► settings that `train` would choose, what fits at which length, on which Mac, how long
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_sft.config import TrainConfig
from mlx_sft.console import Look, count, duration, size
from mlx_sft.data.batches import Layout, padded_width
from mlx_sft.data.pipeline import ReadingProgress
from mlx_sft.data.prepare import PreparedData, prepare
from mlx_sft.data.template import todays_variables
from mlx_sft.errors import UserError
from mlx_sft.files import read_yaml
from mlx_sft.methods import Method, make_method
from mlx_sft.model.load import load_tokenizer, resolve_checkpoint, vocabulary_size
from mlx_sft.model.outline import outline
from mlx_sft.model.tiles import expected_tiles
from mlx_sft.model.translate import read_config
from mlx_sft.registry import METHODS
from mlx_sft.training.batch_settings import BatchSettings, asked_for, choose, configured, most_tokens
from mlx_sft.training.machine import COMMON_MACS, Machine, mac, measured_teraflops, read_machine, this_machine, within
from mlx_sft.training.memory import MODES, Footprint, Prediction
from mlx_sft.training.memory_planner import LongestRow, MemoryPlan, MemoryPlanner, planned_steps
from mlx_sft.training.recompute import Mode
from mlx_sft.training.setup import optimizer_state_bytes

NO_DATA = "(no data)"
"""Stands for the data of a configuration that names none: rows of `max_length` are assumed then."""

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)


REACHED = 0.7
"""The share of the speed of products that steps are taken to reach; norms, activations and the optimizer take the rest."""

_FORWARDS_AGAIN: dict[Mode, int] = {"off": 0, "light": 0, "layers": 1, "blocks": 2}
"""How often the backward pass computes a layer's products again."""

_ATTENTION_AGAIN: dict[Mode, int] = {"off": 0, "light": 1, "layers": 1, "blocks": 2}


@dataclass(frozen=True)
class Work:
    """What is computed in an epoch.

    Attributes:
        tokens: Of all rows, those that go through the model.
        squares: Σ length² of the rows.
        supervised: Positions that the head computes.
    """

    tokens: int
    squares: int
    supervised: int

    @classmethod
    def of(cls, lengths: NDArray[Any], supervised: int) -> Work:
        """Of rows of these lengths."""
        long = lengths.astype(np.int64)
        return cls(int(long.sum()), int((long * long).sum()), supervised)


def operations(footprint: Footprint, mode: Mode, work: Work) -> float:
    """Floating-point operations of an epoch."""
    full = footprint.trains_weights
    upper = sum(layer.weights for layer in footprint.layers)
    lower = sum(layer.weights for layer in footprint.below)
    a_token = 2 * (upper + lower) + (4 if full else 2) * upper + 2 * _FORWARDS_AGAIN[mode] * upper
    if not full:
        a_token += 6 * footprint.trainable
    attended = sum(layer.attended for layer in footprint.layers)
    only_forward = sum(layer.attended for layer in footprint.below)
    a_square = 2 * only_forward + (7 + 2 * _ATTENTION_AGAIN[mode]) * attended
    head = (6 if full else 4) * footprint.hidden * footprint.vocabulary
    return float(a_token * work.tokens + a_square * work.squares + head * work.supervised)


def seconds(operations: float, teraflops: float) -> float:
    """At a machine's speed of products."""
    return operations / (REACHED * teraflops * 1e12)


@dataclass(frozen=True)
class RunPlan:
    """What a run would be.

    Attributes:
        dtype: Precision of the model on this machine.
        longest: The row that must fit.
        settings: The settings that `train` would choose; None where it would refuse, and `refusal` then says why.
        predicted: The parts of the peak, with those settings; without, of the longest row in the mode that keeps least.
        work: Of an epoch; None without data.
        epochs: Passes over the data.
        teraflops: The machine's speed; None where it is not known.
        measured: Whether that was measured just now.
    """

    config: TrainConfig
    machine: Machine
    dtype: str
    footprint: Footprint
    macs: Footprint
    longest: LongestRow
    settings: BatchSettings | None
    refusal: UserError | None
    predicted: Prediction
    work: Work | None
    epochs: float
    teraflops: float | None
    measured: bool

    def lengths(self) -> list[dict[str, Any]]:
        """For each length and mode, how many rows fit at once, and what one takes."""
        return [
            {
                "length": length,
                **{
                    configured(mode): {
                        "rows": self._rows(mode, length),
                        "peak_bytes_of_one": self.footprint.predict(mode, length).peak,
                    }
                    for mode in MODES
                },
            }
            for length in LENGTHS
        ]

    def common_macs(self) -> list[dict[str, Any]]:
        """For each size of memory, the settings for the longest row, and the longest row that fits at all."""
        found = []
        for gigabytes in COMMON_MACS:
            limit = mac("", gigabytes).memory
            settings = choose(self.macs, limit, self.longest.tokens)
            found.append(
                {
                    "gigabytes": gigabytes,
                    "working_set_bytes": limit,
                    "micro_batch_tokens": settings.micro_batch_tokens if settings else None,
                    "grad_checkpoint": configured(settings.mode) if settings else None,
                    "longest_row": {configured(mode): most_tokens(self.macs, mode, limit) for mode in MODES},
                }
            )
        return found

    def seconds(self) -> float | None:
        """Of the whole run; None where speed or data is not known."""
        if self.work is None or self.teraflops is None:
            return None
        mode = self.settings.mode if self.settings else MODES[-1]
        counted = operations(self.footprint, mode, self.work)
        return self.epochs * seconds(counted, self.teraflops)

    def to_json(self) -> str:
        """All of it, for a machine."""
        settings = self.settings
        return json.dumps(
            {
                "model": self.config.model,
                "dtype": self.dtype,
                "method": self.config.method,
                "trainable": self.footprint.trainable,
                "machine": asdict(self.machine),
                "predicted": asdict(self.predicted) | {"peak": self.predicted.peak},
                "settings": {
                    "micro_batch_tokens": settings.micro_batch_tokens,
                    "grad_checkpoint": configured(settings.mode),
                    "head_chunk": settings.head_chunk,
                }
                if settings
                else None,
                "refusal": str(self.refusal) if self.refusal else None,
                "longest_row": asdict(self.longest),
                "lengths": self.lengths(),
                "macs": self.common_macs(),
                "epoch": asdict(self.work) if self.work else None,
                "epochs": self.epochs,
                "seconds": self.seconds(),
                "teraflops": self.teraflops,
                "share_of_speed_reached": REACHED,
            },
            ensure_ascii=False,
        )

    def _rows(self, mode: Any, length: int) -> int:
        return most_tokens(self.footprint, mode, self.machine.memory) // length


def planned_config(config_file: str | None, given: dict[str, Any]) -> TrainConfig:
    """A configuration as `train` would read it, which may leave out the data."""
    named = given.get("data") or (read_yaml(Path(config_file)).get("data") if config_file else None)
    return TrainConfig.resolve(config_file, **(given if named else given | {"data": [NO_DATA]}))


def make_plan(config: TrainConfig, machine_name: str | None = None, progress: ReadingProgress | None = None) -> RunPlan:
    """What a run with this configuration would take.

    Args:
        machine_name: A Mac, as `read_machine` takes it; None for this machine.
        progress: Is told how the reading of data goes.

    Raises:
        UserError: For a model, data or machine that cannot be read.
    """
    here = machine_name is None
    machine = within(this_machine() if machine_name is None else read_machine(machine_name), config)
    path = resolve_checkpoint(config.model, weights=False)
    config = _with_adapter(config)
    data = _data(config, path, progress)
    dtype = machine.dtype if config.dtype == "auto" else config.dtype
    footprint = _footprint(config, path, dtype, fused=machine.fused)
    on_macs = _footprint(config, path, "bfloat16" if config.dtype == "auto" else dtype, fused=True)
    layout: Layout = "grid" if machine.compiles else "joined"
    longest = _longest(config, layout, data)
    planner = MemoryPlanner(config, machine, footprint, longest, layout)
    settings = planner.choose()
    refusal = None if settings else planner.refusal()
    speed = measured_teraflops(dtype) if here else machine.teraflops
    return RunPlan(
        config=config,
        machine=machine,
        dtype=dtype,
        footprint=footprint,
        macs=on_macs,
        longest=longest,
        settings=settings,
        refusal=refusal,
        predicted=_predicted(config, machine, footprint, settings, data, longest),
        work=Work.of(data.train.needed_lengths, int(data.train.supervised_tokens.sum())) if data else None,
        epochs=_epochs(config, data),
        teraflops=speed,
        measured=here,
    )


def _with_adapter(config: TrainConfig) -> TrainConfig:
    """An existing adapter's settings override those of the configuration that shape it."""
    if config.init_adapter is None:
        return config
    where = Path(config.init_adapter)
    kind: type[Method] = METHODS[config.method]
    return config.model_copy(update=kind.read(where)[0].decides(where))


def _data(config: TrainConfig, path: Path, progress: ReadingProgress | None) -> PreparedData | None:
    if config.data == [NO_DATA]:
        return None
    tokenizer = load_tokenizer(path)
    pinned = todays_variables(tokenizer) | config.chat_template_kwargs
    return prepare(config.model_copy(update={"chat_template_kwargs": pinned}), tokenizer, progress)


def _footprint(config: TrainConfig, path: Path, dtype: str, *, fused: bool) -> Footprint:
    split = outline(path, dtype, config.quantize)
    method = make_method(config)
    parameters = method.attach(split.model, config.seed)
    vocabulary = vocabulary_size(split.model, read_config(path))
    tiled = expected_tiles(split) is not None
    return Footprint.of(
        split,
        method,
        parameters,
        vocabulary,
        optimizer_state_bytes=optimizer_state_bytes(config, parameters),
        tiled=tiled,
        fused=fused,
        accumulates=config.batch_size > 1,
    )


def _longest(config: TrainConfig, layout: Layout, data: PreparedData | None) -> LongestRow:
    if data is None:
        return LongestRow(padded_width(config.max_length - 1, layout), f"a row of --max-length {config.max_length}")
    return LongestRow.of(data.train, layout)


def _predicted(
    config: TrainConfig,
    machine: Machine,
    footprint: Footprint,
    settings: BatchSettings | None,
    data: PreparedData | None,
    longest: LongestRow,
) -> Prediction:
    if settings is None:
        return footprint.predict(asked_for(config)[-1], longest.tokens)
    if data is None:
        tokens = max(longest.tokens, settings.micro_batch_tokens)
        return footprint.predict(settings.mode, tokens, width=longest.tokens, head_chunk=settings.head_chunk)
    return MemoryPlan(machine, footprint, settings).largest(planned_steps(config, data), data.train)


def _epochs(config: TrainConfig, data: PreparedData | None) -> float:
    if data is None:
        return float(config.epochs)
    steps = planned_steps(config, data)
    return steps.total_steps / steps.steps_per_epoch


Pieces = Iterator[tuple[str, Look]]

_MODES = [configured(mode) for mode in MODES]


def plan_pieces(plan: RunPlan) -> Pieces:
    """What each part takes, what `train` would choose, what fits here and on common Macs."""
    yield from _facts(plan)
    yield from _lengths(plan)
    yield from _macs(plan)


def _facts(plan: RunPlan) -> Pieces:
    config, machine, parts, chosen = plan.config, plan.machine, plan.predicted, plan.settings
    yield f"{config.model} on {machine.name}\n", "title"
    rows = [
        ("may take", f"{size(machine.memory)} ({machine.basis})"),
        ("weights", f"{size(parts.weights)} in {plan.dtype}"),
        (
            "trained",
            f"{size(parts.trained)} for {count(plan.footprint.trainable)} parameters: value, gradient and the optimizer's state",
        ),
        ("kept", f"{size(parts.kept)} for the backward pass"),
        ("passing", f"{size(parts.passing)} for a layer's backward pass, or the logits of a tile"),
        ("peak", f"{size(parts.peak)} predicted"),
        ("longest row", f"{plan.longest.tokens:,} tokens ({plan.longest.origin})"),
    ]
    if chosen is not None:
        settings = f"--micro-batch-tokens {chosen.micro_batch_tokens} --grad-checkpoint {configured(chosen.mode)}"
        rows.append(("settings", f"{settings} --dtype {plan.dtype}"))
    rows += _time(plan)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        yield f"  {name:{width}}  ", "faint"
        yield f"{value}\n", "plain"
    if plan.refusal is not None:
        yield f"  train would refuse: {plan.refusal}\n", "bad"
    yield "\n", "plain"


def _time(plan: RunPlan) -> list[tuple[str, str]]:
    if plan.work is None:
        return [("time", "give --data for an estimate")]
    taken = plan.seconds()
    if taken is None:
        return [("time", "no estimate: this chip's speed is not known; name it, as in --machine 'M2 16GB'")]
    source = "measured now" if plan.measured else "from a table"
    basis = f"products at {plan.teraflops:.2g} TFLOP/s ({source}), of which steps reach {REACHED:.0%}"
    epochs = f"{plan.epochs:.3g} epoch{'' if plan.epochs == 1 else 's'}"
    tokens = f"{epochs} of {count(plan.work.tokens)} tokens"
    return [("time", f"about {duration(taken)} for {tokens}: an estimate from {basis}")]


def _lengths(plan: RunPlan) -> Pieces:
    yield f"Rows that fit at once on {plan.machine.name}, by their length and --grad-checkpoint\n", "title"
    head = ["tokens", *_MODES]
    rows = [
        [f"{found['length']:,}", *(f"{found[mode]['rows']:,}" if found[mode]["rows"] else "-" for mode in _MODES)]
        for found in plan.lengths()
    ]
    yield from _table(head, rows)


def _macs(plan: RunPlan) -> Pieces:
    yield "Common Macs: settings for the longest row, and the longest row that fits, by --grad-checkpoint\n", "title"
    head = ["memory", "may take", "settings", *_MODES]
    rows = []
    for found in plan.common_macs():
        settings = f"{found['micro_batch_tokens']} tokens, {found['grad_checkpoint']}"
        rows.append(
            [
                f"{found['gigabytes']} GB",
                size(found["working_set_bytes"]),
                settings if found["grad_checkpoint"] else "does not fit",
                *(f"{tokens:,}" if tokens else "-" for tokens in found["longest_row"].values()),
            ]
        )
    yield from _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Pieces:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for line, look in [(head, "faint"), *((row, "plain") for row in rows)]:
        text = "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        yield f"  {text}\n", "faint" if look == "faint" else "plain"
    yield "\n", "plain"
