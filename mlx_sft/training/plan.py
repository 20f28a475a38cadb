"""The verb `plan`: what a run would take on a machine, and what would fit, before any weight is read.

config.json ─► outline ─► footprint ─► settings that `train` would choose, what fits at which length, on which Mac, how long
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from mlx_sft.config import TrainConfig
from mlx_sft.config_files import read_settings
from mlx_sft.console import Look, count, duration, epochs, size
from mlx_sft.data.batches import JOINED, PADDED, Layout
from mlx_sft.data.dataset import Examples
from mlx_sft.data.new_tokens import NewTokens
from mlx_sft.data.pipeline import ReadingProgress
from mlx_sft.data.prepare import prepare
from mlx_sft.data.sources import refuse_missing
from mlx_sft.data.template import with_todays_variables
from mlx_sft.errors import UserError
from mlx_sft.methods import for_new_tokens
from mlx_sft.model.load import extended_tokenizer, resolve_checkpoint
from mlx_sft.recommended import in_words
from mlx_sft.registry import OBJECTIVES
from mlx_sft.training.batch_settings import (
    LongestRow,
    MemoryPlanner,
    asked_for,
    choose,
    configured,
    most_tokens,
    predicted_peak,
)
from mlx_sft.training.fitting import footprint_of, what_would_fit
from mlx_sft.training.machine import COMMON_MACS, mac, measured_teraflops, read_machine, this_machine, within
from mlx_sft.training.memory import MODES, Footprint
from mlx_sft.training.recompute import Mode
from mlx_sft.training.schedule import planned_steps
from mlx_sft.training.start import from_run

Pieces = Iterator[tuple[str, Look]]

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
    def of(cls, examples: Examples, in_front: int = 0) -> Work:
        """Of rows that have so many further positions in front of each."""
        lengths = examples.needed_lengths.astype(np.int64) + in_front
        return cls(int(lengths.sum()), int((lengths * lengths).sum()), int(examples.supervised_tokens.sum()))


def operations(footprint: Footprint, mode: Mode, work: Work, *, first_pass: bool = False) -> float:
    """Floating-point operations of an epoch.

    Args:
        first_pass: Whether the objective needs a pass without gradient before.
    """
    full = footprint.trains_weights
    upper = sum(layer.weights for layer in footprint.layers)
    lower = sum(layer.weights for layer in footprint.below)
    a_token = 2 * (upper + lower) + 2 * upper + 2 * _FORWARDS_AGAIN[mode] * upper
    if full:
        a_token += 2 * sum(layer.weights for layer in footprint.layers if layer.trained)
    else:
        a_token += 6 * footprint.adapters
    attended = sum(layer.attended for layer in footprint.layers)
    only_forward = sum(layer.attended for layer in footprint.below)
    a_square = 2 * only_forward + (7 + 2 * _ATTENTION_AGAIN[mode]) * attended
    head = (6 if footprint.trains_head else 4) * footprint.hidden * footprint.vocabulary
    if first_pass:
        a_token += 2 * (upper + lower + footprint.adapters)
        a_square += 2 * (only_forward + attended)
        head += 2 * footprint.hidden * footprint.vocabulary
    return float(a_token * work.tokens + a_square * work.squares + head * work.supervised)


class RunPlan:
    """What a run with a configuration would take.

    Args:
        machine_name: A Mac, as `read_machine` takes it; None for this machine, whose speed is then measured.
        progress: Is told how the reading of data goes.

    Attributes:
        dtype: Precision of the model on the machine.
        footprint: Of the model there; `on_macs` is that on a Mac.
        longest: The row that must fit.
        settings: The settings that `train` would choose; None where it would refuse, and `refusal` says why.
        predicted: The parts of the peak, with those settings; without, of the longest row in the mode that keeps least.
        work: Of an epoch; None without data.
        epochs: Passes over the data.
        teraflops: The machine's speed; None where it is not known.

    Raises:
        UserError: For a model, data or machine that cannot be read.
    """

    def __init__(
        self, config: TrainConfig, machine_name: str | None = None, progress: ReadingProgress | None = None
    ) -> None:
        self.config = config = from_run(config)
        self.measured = machine_name is None
        machine = self.machine = within(this_machine() if machine_name is None else read_machine(machine_name), config)
        if config.data != [NO_DATA]:
            refuse_missing(config)
        path = resolve_checkpoint(config.model, weights=False)
        tokenizer, new = None, NewTokens()
        if config.data != [NO_DATA] or config.add_tokens:
            tokenizer, new = extended_tokenizer(path, config.chat_template, config.add_tokens)
        config = for_new_tokens(config, new.ids)
        data = None
        if tokenizer is not None and config.data != [NO_DATA]:
            data = prepare(with_todays_variables(config, tokenizer), tokenizer, progress)
        given = config.dtype != "auto"
        self.dtype = config.dtype if given else machine.dtype
        self.footprint = footprint_of(config, path, self.dtype, new, fused=machine.fused)
        self.on_macs = footprint_of(config, path, self.dtype if given else "bfloat16", new, fused=True)
        lengths = data.train.needed_lengths if data else [config.max_length - 1]
        in_front = self.footprint.virtual_tokens
        layout = Layout.of_few_shapes(lengths) if machine.compiles else PADDED if in_front else JOINED
        layout = replace(layout, in_front=in_front)
        self.longest = LongestRow(layout.width_of(config.max_length - 1), f"a row of --max-length {config.max_length}")
        if data:
            self.longest = LongestRow.of(data.train, layout)
        ways_out = partial(what_would_fit, path=path, dtype=self.dtype, new_tokens=new)
        planner = MemoryPlanner(config, machine, self.footprint, self.longest, layout, ways_out)
        settings = self.settings = planner.choose()
        self._planner = planner
        self.work: Work | None = None
        self.epochs = 1.0 if config.epochs == "auto" else float(config.epochs)
        if data:
            steps = planned_steps(config, data)
            self.work = Work.of(data.train, in_front)
            self.epochs = steps.total_steps / steps.steps_per_epoch
        if settings is None:
            self.predicted = self.footprint.predict(asked_for(config)[-1], self.longest.tokens)
        elif data:
            self.predicted = predicted_peak(self.footprint, settings, steps, data.train)
        else:
            tokens, width = max(self.longest.tokens, settings.micro_batch_tokens), self.longest.tokens
            chunk = settings.head_chunk
            self.predicted = self.footprint.predict(settings.mode, tokens, width=width, head_chunk=chunk)
        self.teraflops = measured_teraflops(self.dtype) if self.measured else machine.teraflops

    @cached_property
    def refusal(self) -> UserError | None:
        """What `train` would say; to find what would fit takes some seconds."""
        return None if self.settings else self._planner.refusal()

    def lengths(self) -> list[dict[str, Any]]:
        """For each length and mode, how many rows fit at once, and what one takes."""
        memory, in_front = self.machine.memory, self.footprint.virtual_tokens
        return [
            {
                "length": length,
                **{
                    configured(mode): {
                        "rows": (most_tokens(self.footprint, mode, memory) + in_front) // (length + in_front),
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
            settings = choose(self.on_macs, limit, self.longest.tokens)
            found.append(
                {
                    "gigabytes": gigabytes,
                    "working_set_bytes": limit,
                    "micro_batch_tokens": settings.micro_batch_tokens if settings else None,
                    "grad_checkpoint": configured(settings.mode) if settings else None,
                    "longest_row": {configured(mode): most_tokens(self.on_macs, mode, limit) for mode in MODES},
                }
            )
        return found

    def seconds(self) -> float | None:
        """Of the whole run; None where speed or data is not known."""
        if self.work is None or self.teraflops is None:
            return None
        mode, first_pass = (
            self.settings.mode if self.settings else MODES[-1],
            OBJECTIVES[self.config.objective].first_pass,
        )
        counted = operations(self.footprint, mode, self.work, first_pass=first_pass)
        return self.epochs * (counted / (REACHED * self.teraflops * 1e12))

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

    def pieces(self) -> Pieces:
        """What each part takes, what `train` would choose, what fits here and on common Macs, for a terminal."""
        yield from _verdict(self)
        yield from _facts(self)
        yield f"Rows that fit at once on {self.machine.name}, by their length and --grad-checkpoint\n", "title"
        modes = [configured(mode) for mode in MODES]
        rows = [[fits["length"], *(fits[mode]["rows"] for mode in modes)] for fits in self.lengths()]
        yield from _table(["tokens", *modes], rows)
        yield (
            "Common Macs: settings for the longest row, and the longest row that fits, by --grad-checkpoint\n",
            "title",
        )
        rows = [
            [
                f"{fits['gigabytes']} GB",
                size(fits["working_set_bytes"]),
                f"{fits['micro_batch_tokens']} tokens, {fits['grad_checkpoint']}"
                if fits["grad_checkpoint"]
                else "does not fit",
                *fits["longest_row"].values(),
            ]
            for fits in self.common_macs()
        ]
        yield from _table(["memory", "may take", "settings", *modes], rows)


def planned_config(config_file: str | None, given: dict[str, Any]) -> TrainConfig:
    """A configuration as `train` would read it, which may leave out the data."""
    named = given.get("data") or (read_settings(config_file).get("data") if config_file else None)
    return TrainConfig.resolve(config_file, **(given if named else given | {"data": [NO_DATA]}))


def _verdict(plan: RunPlan) -> Pieces:
    """Whether it fits, and what would where it does not."""
    if plan.refusal is None:
        return
    row = "" if plan.refusal.where == "memory" else f"{plan.refusal.where}: "
    yield f"This run does not fit: {row}{plan.refusal.what}\n", "bad"
    yield f"  {plan.refusal.hint}\n\n", "plain"


def _facts(plan: RunPlan) -> Pieces:
    machine, parts, chosen = plan.machine, plan.predicted, plan.settings
    yield f"{plan.config.model} on {machine.name}\n", "title"
    facts = {
        "may take": f"{size(machine.memory)} ({machine.basis})",
        "weights": f"{size(parts.weights)} in {plan.dtype}",
        "trained": f"{size(parts.trained)} for {count(plan.footprint.trainable)} parameters: "
        "value, gradient and the optimizer's state",
        "kept": f"{size(parts.kept)} for the backward pass",
        "passing": f"{size(parts.passing)} for a layer's backward pass, or the logits of a tile",
        "peak": f"{size(parts.peak)} predicted",
        "longest row": f"{plan.longest.tokens:,} tokens computed ({plan.longest.origin})",
    }
    if chosen is not None:
        tokens, mode = chosen.micro_batch_tokens, configured(chosen.mode)
        facts["settings"] = f"--micro-batch-tokens {tokens} --grad-checkpoint {mode} --dtype {plan.dtype}"
    if words := in_words(plan.config.recommended()):
        facts["recommended"] = words
    if getattr(plan.config, "shard_base", False):
        facts["split base"] = (
            "not counted here, where one machine has all of it: of N each has 1/N of the layers' weights"
        )
    facts["time"] = _time(plan)
    width = max(map(len, facts))
    for name, value in facts.items():
        yield f"  {name:{width}}  ", "faint"
        yield f"{value}\n", "plain"
    yield "\n", "plain"


def _time(plan: RunPlan) -> str:
    if plan.work is None:
        return "give --data for an estimate"
    taken = plan.seconds()
    if taken is None:
        return "no estimate: this chip's speed is not known; name it, as in --machine 'M2 16GB'"
    source = "measured now" if plan.measured else "from a table"
    basis = f"products at {plan.teraflops:.2g} TFLOP/s ({source}), of which steps reach {REACHED:.0%}"
    about = f"about {duration(taken)}" if taken >= 1 else "under a second"
    return f"{about} for {epochs(plan.epochs)} of {count(plan.work.tokens)} tokens: an estimate from {basis}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str | int]]) -> Pieces:
    """Words and numbers under each other; nothing fits where a number is 0."""
    written = [[cell if isinstance(cell, str) else f"{cell:,}" if cell else "-" for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *written, strict=True)]
    for number, line in enumerate([head, *written]):
        text = "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        yield f"  {text}\n", "plain" if number else "faint"
    yield "\n", "plain"
