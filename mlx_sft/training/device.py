"""What a GPU is asked before the first step: whether it has the gradients, and how fast it is at what decides how steps are cut.

It takes a second or two. What was measured is kept in `environment.json`, so that a run that goes on computes as it began.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from mlx_sft.console import Console
from mlx_sft.data.batches import CALL_COST, Batch, Layout, MicroBatch, collate
from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Example
from mlx_sft.errors import UserError
from mlx_sft.files import read_json
from mlx_sft.methods import Parameters
from mlx_sft.model.head import SplitModel, training_mode
from mlx_sft.objectives import Weighting
from mlx_sft.run_folder import RunFolder
from mlx_sft.settings import first_problem
from mlx_sft.training.failures import BatchFailed, failures_noticed
from mlx_sft.training.layer_counts import LayerCounts, count_layers
from mlx_sft.training.machine import Machine
from mlx_sft.training.recompute import Mode
from mlx_sft.training.resume import NEW_RUN
from mlx_sft.training.step import GradientComputer

_BLOCK = "MLX_SDPA_VJP_BLOCK"
"""By this variable MLX's attention on Metal is told, in each backward pass, how many queries and keys to take at once."""
BLOCKS = (1024, 256)
"""MLX's own choice, and one that computes less of what is masked."""
_PAYS = 0.95
"""Of the time with MLX's own choice, above which that stays."""

_MOST_COST = 2048
_FAR_APART = 4
"""A micro-batch that takes so many times as long as the smallest tells what a token takes."""
_TIMES = 3
_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Measured:
    """What was measured on the device on which a run began.

    Attributes:
        call_cost: What one more micro-batch costs, in tokens.
        attention_block: Queries and keys at once in attention's backward pass; None for MLX's own choice.
    """

    call_cost: Annotated[int, Field(ge=0, le=_MOST_COST)] = CALL_COST
    attention_block: Annotated[int, Field(ge=1, le=max(BLOCKS))] | None = None

    @classmethod
    def of_run(cls, run: RunFolder) -> Measured:
        """As the run began; raises `UserError` where its folder says what cannot be."""
        try:
            return TypeAdapter(cls).validate_python(read_json(run.environment, hint=NEW_RUN).get("measured", {}))
        except ValidationError as error:
            what = f"what was measured cannot be read: {first_problem(error)}"
            raise UserError(what, where=str(run.environment), hint="remove its part `measured`") from error


def ask(
    computer: GradientComputer, parameters: Parameters, layout: Layout, mode: Mode, machine: Machine, console: Console
) -> None:
    """Have a GPU differentiate the shortest and the longest row that there will be; where it refuses, compose attention of plain
    operations. On a CPU there is nothing to ask.

    Args:
        mode: Of recomputation; the one that takes the least memory.

    Raises:
        UserError: Where it refuses that too.
    """
    if not machine.fused:
        return
    computer.configure(mode)
    widths = sorted({layout.widths[0], layout.widths[-1]})
    if said := what_it_refuses(computer, parameters, widths):
        computer.compose_attention()
        if again := what_it_refuses(computer, parameters, widths):
            raise UserError(
                f"this device cannot train this model: {again}", hint="a newer mlx may; or train on the CPU"
            )
        console.note(
            f"attention is composed of plain operations, and takes more memory: the device has no gradient ({said})"
        )


def measure(
    computer: GradientComputer,
    split: SplitModel,
    parameters: Parameters,
    examples: Examples,
    layout: Layout,
    machine: Machine,
) -> Measured:
    """How a GPU is best given its work, after `ask`; on a CPU that is known."""
    if not machine.fused:
        return Measured()
    cost = call_cost(computer, split, parameters, layout.widths[-1])
    if machine.backend != "metal" or computer.composes_attention or _BLOCK in os.environ:
        return Measured(cost)
    return Measured(cost, attention_block(count_layers(split, fused=True), examples, layout, split.model_dtype()))


def what_it_refuses(computer: GradientComputer, parameters: Parameters, widths: Sequence[int]) -> str:
    """What the device says against the gradient of a row of one of these widths; empty where it can compute all of them."""
    for width in widths:
        batch = _row_of(width)
        try:
            computer.gradient(parameters, [batch], weighting=Weighting([batch.weights], float(width)))
        except BatchFailed:
            continue  # for want of memory, say: another cut may do, and it is no answer to this question
        except (RuntimeError, ValueError) as error:
            return str(error)
    return ""


def call_cost(computer: GradientComputer, split: SplitModel, parameters: Parameters, widest: int) -> int:
    """What one more micro-batch costs, in tokens: what the smallest takes beyond its tokens, at the pace of a larger one.

    A power of two, so that two starts on one machine nearly always find the same.
    """
    least, width = 16, 16

    def seconds(width: int) -> float:
        batch = _row_of(width)
        weights = batch.weights / np.float32(width)
        with failures_noticed(batch):
            return seconds_of(lambda: computer.micro_step(parameters, batch, weights, None))

    try:
        with training_mode(split.model):
            smallest = taken = seconds(least)
            while taken < _FAR_APART * smallest and width < min(widest, _MOST_COST):
                width *= 2
                taken = seconds(width)
    except BatchFailed:
        return CALL_COST
    finally:
        computer.bind(parameters)
    if width == least:
        return CALL_COST
    a_token = max((taken - smallest) / (width - least), 1e-9)
    return 1 << round(math.log2(min(_MOST_COST, max(1, smallest / a_token - least))))


def attention_block(layers: Sequence[LayerCounts], examples: Examples, layout: Layout, dtype: mx.Dtype) -> int | None:
    """The block in which attention's backward pass takes least time for the rows of these widths; None for MLX's own."""
    layer = next((layer for layer in layers if layer.heads), None)
    widths = [layout.width_of(int(length)) for length in examples.needed_lengths]
    times = {width: widths.count(width) for width in layout.widths if width > min(BLOCKS)}
    if layer is None or not times:
        return None

    def seconds(block: int) -> float:
        with attention_in_blocks(block):
            return sum(count * attention_seconds(layer, width, dtype) for width, count in times.items())

    own, other = map(seconds, BLOCKS)
    return BLOCKS[1] if other < _PAYS * own else None


@contextmanager
def attention_in_blocks(block: int | None) -> Iterator[None]:
    """Within the block, attention's backward pass on Metal takes so many queries and keys at once."""
    before = os.environ.get(_BLOCK)
    if block is not None:
        os.environ[_BLOCK] = str(block)
    try:
        yield
    finally:
        if block is not None:
            os.environ.pop(_BLOCK)
        if before is not None:
            os.environ[_BLOCK] = before


def seconds_of(make: Callable[[], Any]) -> float:
    """What it takes to compute what `make` gives, unevaluated: the best of two times, after one that is not counted."""
    taken = []
    for _ in range(_TIMES):
        arrays = make()
        started = time.perf_counter()
        mx.eval(arrays)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def attention_seconds(
    layer: LayerCounts,
    width: int,
    dtype: mx.Dtype,
    attention: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention,
) -> float:
    """Of the attention of one row, forward and backward, among as many as are computed at once."""
    rows, size = max(1, _TOKENS_AT_ONCE // width), layer.attended // layer.heads
    shapes = [(rows, heads, width, size) for heads in (layer.heads, *(layer.keys // size,) * 2)]
    arrays = [mx.random.normal(shape, dtype, key=mx.random.key(place)) for place, shape in enumerate(shapes)]

    def summed(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return attention(q, k, v, scale=size**-0.5, mask="causal").sum()

    mx.eval(arrays)
    return seconds_of(lambda: mx.grad(summed, argnums=(0, 1, 2))(*arrays)) / rows


def _row_of(width: int) -> Batch:
    """A row of one token over and over, all of it supervised."""
    row = Example("a row of one token over and over", np.zeros(width + 1, np.int32), np.ones(width + 1, np.float32))
    return collate([row], MicroBatch((0,), width))
