"""`doctor --device`: what this device does and how fast, asked of it in some minutes; a line of JSON a question.

What was expected stands beside what was found, so that a record from a machine that nobody here has tells what to look at first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from statistics import median
from typing import Any, get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_sft.config import TrainConfig
from mlx_sft.data.batches import Batch, MicroBatch, collate
from mlx_sft.data.example import Example
from mlx_sft.methods import Parameters, make_method
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.objectives import Weighting
from mlx_sft.optimizers import make_optimizer
from mlx_sft.training.attention import composed_attention
from mlx_sft.training.device import BLOCKS, attention_in_blocks, attention_seconds, call_cost
from mlx_sft.training.failures import is_out_of_memory
from mlx_sft.training.layer_counts import LayerCounts
from mlx_sft.training.loss import cross_entropy_sum
from mlx_sft.training.machine import footprint_bytes, this_machine
from mlx_sft.training.memory import Footprint
from mlx_sft.training.recompute import Mode
from mlx_sft.training.shapes import padded_shape
from mlx_sft.training.step import GradientComputer, StepGradient

Answer = tuple[str, bool, dict[str, Any]]
"""What was found, in words; whether it is as expected; and the figures."""


@dataclass(frozen=True)
class Answered:
    """One question and its answer."""

    question: str
    expected: str
    found: str
    as_expected: bool
    figures: dict[str, Any]
    seconds: float

    def line(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def device_check(*, small: bool = False) -> Iterator[Answered]:
    """Every question, asked one after another; one that fails says so and ends nothing.

    Args:
        small: With matrices and models of a size that a CPU computes in a minute.
    """
    machine = this_machine()
    facts = {name: str(value) for name, value in mx.device_info().items()}
    facts["mlx"] = version("mlx")
    yield Answered("which device", "-", f"{machine.name} ({machine.backend})", True, facts, 0.0)
    for question, expected, ask in QUESTIONS:
        started = time.perf_counter()
        try:
            found, holds, figures = ask(small)
        except (RuntimeError, ValueError, MemoryError) as error:
            found, holds, figures = f"it fails: {error}", False, {}
        yield Answered(question, expected, found, holds, figures, round(time.perf_counter() - started, 2))


def report(answers: Sequence[Answered]) -> str:
    """A page of Markdown: what was expected and what was found, and the figures below."""
    rows = [
        f"| {'yes' if one.as_expected else '**no**'} | {one.question} | {one.expected} | {one.found} | {one.seconds:g} |"
        for one in answers
    ]
    details = [
        f"## {one.question}\n\n```json\n{json.dumps(one.figures, indent=1, ensure_ascii=False)}\n```\n"
        for one in answers
        if one.figures
    ]
    unexpected = sum(not one.as_expected for one in answers)
    head = f"# What this device does\n\n{len(answers)} questions, {unexpected} answered otherwise than expected.\n"
    table = "\n".join(["| as expected | question | expected | found | seconds |", "|---|---|---|---|---|", *rows])
    return "\n".join([head, table, "", *details])


def _seconds(compute: Callable[[], Any], times: int = 5) -> float:
    """The median of some computations, after one that is not counted."""
    mx.eval(compute())
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        mx.eval(compute())
        taken.append(time.perf_counter() - started)
    return median(taken)


def _products(small: bool) -> Answer:
    size, figures = (256 if small else 2048), {}
    for dtype in (mx.float32, mx.bfloat16):
        left = mx.random.normal((size, size), dtype)
        figures[str(dtype).rpartition(".")[2]] = round(2 * size**3 / _seconds(partial(mx.matmul, left, left)) / 1e12, 3)
    return ", ".join(f"{name} {speed} TFLOP/s" for name, speed in figures.items()), True, figures


def _float32(_: bool) -> Answer:
    left, right = (np.random.default_rng(seed).normal(size=(256, 256)).astype(np.float32) for seed in (0, 1))
    exact = left.astype(np.float64) @ right.astype(np.float64)
    error = float(np.abs(np.array(mx.array(left) @ mx.array(right)) - exact).max() / np.abs(exact).max())
    return f"an error of {error:.1e} of the largest", error < 1e-5, {"error": error}


def _launches(_: bool) -> Answer:
    one, many = mx.zeros(1), 200

    def chain() -> mx.array:
        x = one
        for _ in range(many):
            x = x + 1
        return x

    back, each = _seconds(lambda: one + 1, 50), _seconds(chain) / many
    figures = {"round_trip_us": round(1e6 * back, 1), "launch_us": round(1e6 * each, 1)}
    return f"{figures['round_trip_us']} µs there and back, {figures['launch_us']} µs an operation", True, figures


def _attention(_: bool) -> Answer:
    """Which gradients there are, and whether they are those of plain operations."""
    refused: dict[str, str] = {}
    wrong = []
    cases: list[tuple[int, int, str | None, bool]] = [(width, 128, "causal", False) for width in (1, 8, 9, 16, 64, 300)]
    cases += [(64, size, "causal", False) for size in (40, 64, 80, 96, 192, 256)]
    cases += [(64, 128, "array", False), (64, 128, None, False), (64, 128, "causal", True)]
    for width, size, mask, sinks in cases:
        name = f"{width} positions, heads of {size}, mask {mask}{', sinks' if sinks else ''}"
        keys = mx.random.split(mx.random.key(0), 3)
        arrays = [mx.random.normal((2, (8, 2, 2)[at], width, size), key=key) for at, key in enumerate(keys)]
        seen = mx.arange(width)[None] <= mx.arange(width)[:, None]
        given_mask, given_sinks = (seen if mask == "array" else mask), (mx.ones(8) if sinks else None)
        further = {"scale": size**-0.5, "mask": given_mask, "sinks": given_sinks}
        gradients = []
        for attention in (composed_attention, mx.fast.scaled_dot_product_attention):

            def value(*given: mx.array, attention: Any = attention, further: Any = further) -> mx.array:
                return mx.square(attention(*given, **further)).sum()

            try:
                found = mx.grad(value, argnums=(0, 1, 2))(*arrays)
                mx.eval(found)
                gradients.append(found)
            except (RuntimeError, ValueError) as error:
                refused[name] = str(error)
        if len(gradients) == 2 and _difference(*gradients) > 1e-3:
            wrong.append(name)
    found = f"{len(refused)} of {len(cases)} refused, {len(wrong)} otherwise than by plain operations"
    return found, not wrong, {"refused": refused, "wrong": wrong}


def _attention_backward(small: bool) -> Answer:
    """Attention's forward and backward pass in milliseconds a row, by length: in MLX's two blocks, and composed of plain operations."""
    figures: dict[str, Any] = {}
    layer = LayerCounts(0, 0, 0, 0, 0, 0, 0, attended=2048, trained=True, heads=16, keys=1024)
    dtype = mx.float32 if small else mx.bfloat16
    for width in (64,) if small else (512, 1024, 2048):
        figure: dict[str, float] = {}
        for block in BLOCKS:
            with attention_in_blocks(block):
                figure[f"blocks of {block}"] = attention_seconds(layer, width, dtype)
        figure["composed"] = attention_seconds(layer, width, dtype, composed_attention)
        figures[str(width)] = {name: round(1e3 * seconds, 2) for name, seconds in figure.items()}
    best = {width: min(figure, key=lambda name: figure[name]) for width, figure in figures.items()}
    found = ", ".join(f"{width} positions: {way} ({figures[width][way]} ms)" for width, way in best.items())
    return f"fastest at {found}", small or "composed" not in best.values(), figures


def _difference(ours: Sequence[mx.array], theirs: Sequence[mx.array]) -> float:
    """The largest of some arrays, relative to the largest number."""
    pairs = [
        (np.array(a.astype(mx.float32)), np.array(b.astype(mx.float32))) for a, b in zip(ours, theirs, strict=True)
    ]
    largest = max(float(np.abs(b).max()) for _, b in pairs) or 1.0
    return max(float(np.abs(a - b).max()) for a, b in pairs) / largest


def _batch(rows: int, width: int, vocabulary: int, seed: int = 0) -> Batch:
    random = np.random.default_rng(seed)
    weights = np.ones(width + 1, np.float32)
    made = [Example("row", random.integers(0, vocabulary, width + 1).astype(np.int32), weights) for _ in range(rows)]
    return collate(made, MicroBatch(tuple(range(rows)), width))


@dataclass(frozen=True)
class _Tiny:
    """The embedded model under LoRA that does something."""

    config: TrainConfig
    split: SplitModel
    method: Any
    parameters: Parameters
    vocabulary: int
    computer: GradientComputer

    @classmethod
    def make(cls, dtype: str = "float32", quantize: str | None = None, mode: Mode = "off") -> _Tiny:
        base, config = load_model("tiny", dtype, quantize=quantize), TrainConfig(data="-", model="tiny")
        method, split, random = make_method(config), SplitModel(base.model), np.random.default_rng(1)
        parameters = {
            name: value + mx.array(random.normal(0, 0.05, value.shape).astype(np.float32))
            for name, value in method.attach(base.model, 0).items()
        }
        vocabulary = int(base.config["vocab_size"])
        computer = GradientComputer(split, method, vocabulary, recompute=mode)
        return cls(config, split, method, parameters, vocabulary, computer)

    def step(self, rows: int, width: int, seed: int = 0) -> StepGradient:
        return self.computer.gradient(self.parameters, [_batch(rows, width, self.vocabulary, seed)])


def _gradients(_: bool) -> Answer:
    """Of a step of the embedded model in every mode, beside the CPU's plain one in float32."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        plain = _Tiny.make().step(3, 48).gradients
        mx.eval(plain)
    finally:
        mx.set_default_device(device)
    figures = {}
    for dtype, quantize, tolerance in (("float32", None, 1e-4), ("bfloat16", None, 6e-2), ("float32", "8", 0.3)):
        for mode in get_args(Mode):
            for compiled in (False, True):
                tiny = _Tiny.make(dtype, quantize, mode)
                tiny.computer.configure(mode, [padded_shape(_batch(3, 48, tiny.vocabulary))] if compiled else [])
                found = tiny.step(3, 48).gradients
                error = _difference(list(found.values()), [plain[name] for name in found])
                name = f"{dtype}{', 8 bits' if quantize else ''}, {mode}{', compiled' if compiled else ''}"
                figures[name] = {"error": error, "holds": error <= tolerance}
    wrong = [name for name, figure in figures.items() if not figure["holds"]]
    return f"{len(figures) - len(wrong)} of {len(figures)} ways agree", not wrong, figures


def _head(small: bool) -> Answer:
    """Loss and gradient of the head in tiles, whole, and by MLX's kernel: milliseconds, and how far apart."""
    positions, hidden, vocabulary = (64, 64, 5000) if small else (512, 1024, 151_936)
    weight = mx.random.normal((vocabulary, hidden), key=mx.random.key(0)) * hidden**-0.5
    states = mx.random.normal((positions, hidden), key=mx.random.key(1))
    targets, weights = mx.arange(positions) * 7919 % vocabulary, mx.ones(positions)
    figures, gradients = dict[str, Any](), []

    def head(_: Any, states: mx.array) -> mx.array:
        logits: mx.array = states @ weight.T
        return logits

    for name, fused in (("whole", False), ("fused", True)):

        def loss(states: mx.array, fused: bool = fused) -> mx.array:
            return cross_entropy_sum(head, {}, states, targets, weights, positions, fused=fused)

        gradient = mx.grad(loss)
        figures[name] = round(1e3 * _seconds(partial(gradient, states)), 2)
        gradients.append([gradient(states)])
    apart = _difference(*gradients)
    figures |= {"apart": apart, "chosen for the embedded model": _Tiny.make().computer.head_way}
    return f"whole {figures['whole']} ms, fused {figures['fused']} ms, {apart:.0e} apart", apart < 1e-4, figures


def _micro_steps(small: bool) -> Answer:
    """Of a model of Qwen3-0.6B's shape with random weights in bfloat16: forward and backward pass, beside mlx-lm's."""
    hidden, inner, layers, heads, vocabulary = (64, 128, 2, 2, 500) if small else (1024, 3072, 28, 16, 151_936)
    shapes = ((2, 16), (1, 40)) if small else ((4, 512), (1, 2048), (16, 64))
    arguments = qwen3.ModelArgs(
        model_type="qwen3", hidden_size=hidden, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=heads,
        num_key_value_heads=heads // 2, head_dim=hidden // heads if small else 128, rms_norm_eps=1e-6, vocab_size=vocabulary,
        max_position_embeddings=40_960, rope_theta=1e6, tie_word_embeddings=True,
    )  # fmt: skip
    figures: dict[str, Any] = {}
    for rows, width in shapes:
        batch, figure = _batch(rows, width, vocabulary), {}
        for name, gradient in (("ours", _ours), ("mlx-lm", _theirs)):
            model = qwen3.Model(arguments)
            model.set_dtype(mx.float32 if small else mx.bfloat16)
            model.freeze()
            compute = gradient(model, batch, vocabulary)
            mx.reset_peak_memory()
            figure[f"{name} ms"] = round(1e3 * _seconds(compute, 3), 1)
            figure[f"{name} peak"] = mx.get_peak_memory()
        figures[f"{rows} x {width}"] = figure
    found = ", ".join(f"{shape}: {one['ours ms']} ms (mlx-lm {one['mlx-lm ms']})" for shape, one in figures.items())
    return found, all(one["ours ms"] <= 1.1 * one["mlx-lm ms"] for one in figures.values()), figures


def _ours(model: Any, batch: Batch, vocabulary: int) -> Callable[[], Any]:
    method = make_method(TrainConfig(data="-"))
    parameters = method.attach(model, 0)
    computer = GradientComputer(SplitModel(model), method, vocabulary)
    if this_machine().compiles:
        computer.configure("off", [padded_shape(batch)])
    weights = (batch.weights / len(batch.weights)).astype(np.float32)
    return lambda: computer.gradient(parameters, [batch], weighting=Weighting([weights], 1.0)).gradients


def _theirs(model: Any, batch: Batch, vocabulary: int) -> Callable[[], Any]:
    settings = {"rank": 16, "scale": 2.0, "dropout": 0.0}
    linear_to_lora_layers(model, len(model.layers), settings)
    model.train()
    rows, width = batch.token_ids.shape
    tokens = mx.array(np.concatenate([batch.token_ids, batch.token_ids[:, :1]], axis=1))
    lengths = mx.array([[0, width]] * rows)
    compute = nn.value_and_grad(model, default_loss)
    step = mx.compile(lambda tokens, lengths: compute(model, tokens, lengths)) if this_machine().compiles else None
    return lambda: step(tokens, lengths) if step else compute(model, tokens, lengths)


def _optimizer(small: bool) -> Answer:
    shapes = {f"layers.{n}.down": (16, 64 if small else 1024) for n in range(20 if small else 392)}
    figures = {}
    for compiled in (False, True):
        parameters: Parameters = {name: mx.random.normal(shape) for name, shape in shapes.items()}
        optimizer = make_optimizer(TrainConfig(data="-"), parameters, lambda _: True, compiled=compiled)

        def update(optimizer: Any = optimizer, parameters: Parameters = parameters) -> list[mx.array]:
            gradients = {name: value * 1.0 for name, value in parameters.items()}
            return list(optimizer.update(parameters, gradients, 1e-3, mx.array(0.5)).values())

        figures["compiled" if compiled else "plain"] = round(1e3 * _seconds(update), 2)
    return ", ".join(f"{name} {ms} ms" for name, ms in figures.items()), True, figures


def _call(small: bool) -> Answer:
    """Of the embedded model, and as a run would measure it."""
    tiny = _Tiny.make("float32" if small else this_machine().dtype)
    cost = call_cost(tiny.computer, tiny.split, tiny.parameters, 64 if small else 2048)
    return f"{cost} tokens", True, {"tokens": cost}


def _mixed(small: bool) -> Answer:
    """Steps of mixed lengths: what MLX's arrays take beside what was predicted, what its cache keeps, what the process is."""
    tiny, machine, random = _Tiny.make(), this_machine(), np.random.default_rng(0)
    footprint = Footprint.of(
        tiny.config, tiny.split, tiny.method, tiny.parameters, tiny.vocabulary,
        head=tiny.computer.head_way, fused=machine.fused,
    )  # fmt: skip
    widths = [8 * int(random.integers(2, 40)) for _ in range(5 if small else 30)]
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for number, width in enumerate(widths):
        tiny.step(2, width, number)
    predicted = footprint.predict("off", 2 * max(widths), width=max(widths))
    taken, expected = mx.get_peak_memory() - before, predicted.kept + predicted.passing
    figures = {
        "taken": taken,
        "predicted": expected,
        "active": mx.get_active_memory(),
        "cache": mx.get_cache_memory(),
        "footprint": footprint_bytes(),
    }
    found = ", ".join(f"{name} {value / 1e6:.0f} MB" for name, value in figures.items() if value is not None)
    return found, taken <= expected, figures


def _out_of_memory(_: bool) -> Answer:
    """An array that cannot be, and a step after it."""
    if this_machine().backend == "cpu":
        return "not asked of a CPU, where the system would end the process", True, {}
    said = ""
    try:
        mx.eval(mx.zeros((2**21, 2**21), mx.float32))
    except (RuntimeError, MemoryError, ValueError) as error:
        said, told = str(error), is_out_of_memory(error)
    if not said:
        return "an array of 16 TB was made", False, {}
    loss = _Tiny.make().step(1, 16).loss
    return f"it says: {said}", told and bool(mx.isfinite(loss).item()), {"understood": told}


QUESTIONS: tuple[tuple[str, str, Callable[[bool], Answer]], ...] = (
    ("how fast are products", "bfloat16 at least as fast as float32 on a GPU", _products),
    ("is float32 float32", "an error below 1e-5: no TF32", _float32),
    ("what does an operation cost", "some microseconds", _launches),
    ("which attention can be differentiated", "what is not refused is that of plain operations", _attention),
    ("how is attention's gradient fastest", "not composed of plain operations", _attention_backward),
    ("are gradients right", "the CPU's in float32 but for rounding, in every mode, compiled or not", _gradients),
    ("which head is fastest", "fused on a GPU, and the same", _head),
    ("what does a micro-step cost", "no more than mlx-lm's", _micro_steps),
    ("what does an update cost", "compiled a fraction of plain on a GPU", _optimizer),
    ("what does one more micro-batch cost", "as much as some ten tokens", _call),
    ("what do steps of mixed lengths take", "no more than was predicted, and a cache of some steps", _mixed),
    ("what happens without memory", "an error that is understood, and a step after it", _out_of_memory),
)
