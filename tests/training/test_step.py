"""A step's gradient is a matter of its tokens alone: not of the cut, the padding, the compiler, or what is recomputed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_sft import train
from mlx_sft.config import TrainConfig
from mlx_sft.data.batches import JOINED, Batch, MicroBatch, collate, cut, cut_all, round_up
from mlx_sft.data.dataset import Examples
from mlx_sft.errors import UserError
from mlx_sft.methods import Parameters, make_method
from mlx_sft.methods.full import Full
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.objectives import Weighting
from mlx_sft.optimizers import gradients as gradients_module
from mlx_sft.optimizers import make_optimizer
from mlx_sft.optimizers.gradients import clip_scale, global_norm
from mlx_sft.training.checkpoint import dropout_key
from mlx_sft.training.recompute import Mode
from mlx_sft.training.shapes import padded_shape
from mlx_sft.training.step import GradientComputer

MODES: tuple[Mode, ...] = get_args(Mode)
DROPOUT = {"rank": 4, "alpha": 8.0, "dropout": 0.3}


def _lora(**settings: Any) -> Lora:
    return Lora(TrainConfig(data="-", **settings).settings(LoraSettings))


def collated(examples: Examples, micro_batches: list[MicroBatch]) -> list[Batch]:
    return [collate(examples, micro_batch) for micro_batch in micro_batches]


class Subject:
    """A model under a method with parameters that are not at their start, and a gradient_computer for it."""

    def __init__(self, base: Path, method: Lora | Full, **options: object) -> None:
        self.split = SplitModel(load_model(str(base), "float32").model)
        start = method.attach(self.split.model, seed=0)
        random = np.random.default_rng(1)
        self.parameters = {
            name: value + mx.array(random.normal(0, 0.05, value.shape).astype(np.float32))
            for name, value in start.items()
        }
        self.gradient_computer = GradientComputer(self.split, method, vocabulary=264, **options)

    def gradient(
        self, examples: Examples, micro_batches: list[MicroBatch], key: mx.array | None = None
    ) -> tuple[float, Parameters]:
        loss, gradients, _ = self.gradient_computer.gradient(self.parameters, collated(examples, micro_batches), key)
        return loss.item(), gradients


@pytest.fixture
def make_subject(make_base: Callable[..., Path]) -> Callable[..., Subject]:
    """`make_subject(method, family=, tied=, **options of the GradientComputer)`."""

    def make(method: Lora | Full, *, family: str = "qwen3", tied: bool = True, **options: object) -> Subject:
        return Subject(make_base(family, tied=tied), method, **options)

    return make


def _assert_equal(ours: tuple[float, Parameters], theirs: tuple[float, Parameters], tolerance: float = 1e-6) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert ours[1].keys() == theirs[1].keys()
    largest = max(mx.abs(gradient).max().item() for gradient in theirs[1].values())
    assert largest > 1e-3
    for name, gradient in ours[1].items():
        difference = mx.abs(gradient - theirs[1][name]).max().item()
        assert difference <= tolerance * largest, name


def _whole(examples: Examples) -> list[MicroBatch]:
    return [MicroBatch(tuple(range(len(examples))), round_up(int(examples.needed_lengths.max())))]


@pytest.mark.parametrize("method", [_lora(rank=4, alpha=8.0), Full()], ids=["lora", "full"])
def test_every_cut_gives_the_same_step(
    method: Lora | Full, make_subject: Callable[..., Subject], examples: Examples
) -> None:
    subject, lengths = make_subject(method), examples.needed_lengths
    whole = subject.gradient(examples, _whole(examples))
    cuts = [cut(range(5), lengths, budget) for budget in (1, 40, 1000)]
    cuts.append([MicroBatch((4, 1), 40), MicroBatch((0, 3, 2), 64)])
    assert len({len(micro_batches) for micro_batches in cuts}) > 2
    for micro_batches in cuts:
        _assert_equal(subject.gradient(examples, micro_batches), whole)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", [_lora(rank=4, alpha=8.0), Full()], ids=["lora", "full"])
def test_rows_end_to_end_give_the_same_step_and_evaluation(
    method: Lora | Full, mode: Mode, make_subject: Callable[..., Subject], examples: Examples
) -> None:
    whole = make_subject(method).gradient(examples, _whole(examples))
    subject = make_subject(method, recompute=mode)
    assert subject.gradient_computer.keeps_rows_apart(subject.parameters)
    for budget in (1, 60, 1000):
        joined = cut(range(5), examples.needed_lengths, budget, JOINED)
        _assert_equal(subject.gradient(examples, joined), whole)
    _assert_equal(subject.gradient(examples, _whole(examples)), whole)  # and nothing of it is left behind
    evaluations = [
        subject.gradient_computer.evaluate(subject.parameters, [collate(examples, micro) for micro in micro_batches])
        for micro_batches in (_whole(examples), cut_all(examples.needed_lengths, 1000, JOINED))
    ]
    assert evaluations[0].loss == pytest.approx(evaluations[1].loss, rel=1e-6)
    assert evaluations[0].token_accuracy == pytest.approx(evaluations[1].token_accuracy)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", [_lora(rank=4, alpha=8.0), Full()], ids=["lora", "full"])
def test_what_is_recomputed_changes_nothing(
    method: Lora | Full, mode: Mode, make_subject: Callable[..., Subject], examples: Examples
) -> None:
    kept = make_subject(method).gradient(examples, _whole(examples))
    subject = make_subject(method, recompute=mode)
    layers = list(subject.split.layers)
    _assert_equal(subject.gradient(examples, _whole(examples)), kept)
    assert [id(layer) for layer in subject.split.layers] == [id(layer) for layer in layers]


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("method", [_lora(**DROPOUT), Full()], ids=["lora", "full"])
def test_a_compiled_step_is_the_same_padded_positions_included(
    method: Lora | Full, recompute: Mode, make_subject: Callable[..., Subject], examples: Examples
) -> None:
    key = mx.random.key(3) if isinstance(method, Lora) else None
    micro_batches = [MicroBatch((0, 2), 16), MicroBatch((1,), 24)]
    shapes = [padded_shape(collate(examples, micro_batch)) for micro_batch in micro_batches]
    assert [shape[2] for shape in shapes] == [16, 8]  # of 9 and 1 supervised positions
    plain = make_subject(method).gradient(examples, micro_batches, key)
    subject = make_subject(method, recompute=recompute, compiled=shapes)
    for _ in range(2):  # traced, and run again from the trace
        _assert_equal(subject.gradient(examples, micro_batches, key), plain)


def test_a_compiled_step_sees_new_parameters_and_a_new_key(
    make_subject: Callable[..., Subject], examples: Examples
) -> None:
    shapes = [padded_shape(collate(examples, micro_batch)) for micro_batch in _whole(examples)]
    compiled, plain = make_subject(_lora(**DROPOUT), compiled=shapes), make_subject(_lora(**DROPOUT))
    losses = set()
    for step in range(3):
        key = dropout_key(0, step)
        ours, theirs = (subject.gradient(examples, _whole(examples), key) for subject in (compiled, plain))
        _assert_equal(ours, theirs)
        losses.add(ours[0])
        for subject, (_, gradients) in ((compiled, ours), (plain, theirs)):
            subject.parameters = {name: value - 0.1 * gradients[name] for name, value in subject.parameters.items()}
    assert len(losses) == 3


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("target", ["all-linear", "q_proj,lm_head"])
def test_dropout_drops_the_same_where_layers_are_recomputed(
    target: str, mode: Mode, make_subject: Callable[..., Subject], examples: Examples
) -> None:
    settings = DROPOUT | {"target": target}
    options = {"tied": False}
    key = mx.random.key(5)
    kept = make_subject(_lora(**settings), **options).gradient(examples, _whole(examples), key)
    recomputed = make_subject(_lora(**settings), recompute=mode, **options).gradient(examples, _whole(examples), key)
    without = make_subject(_lora(**settings), **options).gradient(examples, _whole(examples))
    _assert_equal(recomputed, kept)
    assert abs(without[0] - kept[0]) > 1e-4


def test_dropout_on_the_head_is_refused(tmp_path: Path, make_base: Callable[..., Path]) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"text": "the cat sat"}\n')
    config = TrainConfig(
        data=str(data),
        model=str(make_base("llama")),
        out=str(tmp_path / "run"),
        target=["q_proj", "lm_head"],
        dropout=0.1,
        quiet=True,
    )
    with pytest.raises(UserError, match="dropout cannot be trained on lm_head"):
        train(config)
    assert not (tmp_path / "run").exists()
    assert train(config.model_copy(update={"dropout": 0.0})).steps == 1


def test_each_step_and_each_micro_batch_drops_others(make_subject: Callable[..., Subject], examples: Examples) -> None:
    subject = make_subject(_lora(**DROPOUT))

    def loss(key: mx.array | None, micro_batches: list[MicroBatch] | None = None) -> float:
        return subject.gradient(examples, micro_batches or _whole(examples), key)[0]

    keys = [dropout_key(seed, step) for seed in (0, 1) for step in (1, 2)]
    assert len({loss(key) for key in keys}) == 4
    assert loss(keys[0]) == loss(dropout_key(0, 1))
    assert loss(None) == loss(None)
    # The same row in both micro-batches: with one mask for both, both would lose the same.
    twice = [MicroBatch((4,), 32)] * 2
    assert loss(keys[0], twice) != pytest.approx(loss(keys[0], twice[:1]), rel=1e-5)


def test_evaluation_is_exact_and_without_dropout(make_subject: Callable[..., Subject], examples: Examples) -> None:
    subject = make_subject(_lora(**DROPOUT))
    subject.gradient(examples, _whole(examples), mx.random.key(0))

    micro_batches = cut_all(examples.needed_lengths, 40)
    assert len(micro_batches) > 2
    ours = subject.gradient_computer.evaluate(subject.parameters, iter(collated(examples, micro_batches)))

    losses, right = [], []
    for example in examples:
        logits = subject.split.model(mx.array(example.token_ids[None]))[0, :-1]
        supervised = mx.array(np.flatnonzero(example.labels[1:] >= 0))
        targets = mx.array(example.labels[1:])[supervised]
        losses += nn.losses.cross_entropy(logits[supervised], targets).tolist()
        right += (logits[supervised].argmax(-1) == targets).tolist()
    assert ours.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert ours.loss == pytest.approx(subject.gradient(examples, _whole(examples))[0], rel=1e-5)
    assert ours.token_accuracy == pytest.approx(np.mean(right))
    assert ours.supervised_tokens == len(losses) == sum(example.supervised_tokens for example in examples)
    assert ours.tokens == sum(map(len, examples))


class InputsInTheHead(nn.Module):
    """Adds something of the inputs to the logits, so that no head can be told from the body."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.model
        self.lm_head = model.lm_head
        self.inputs = mx.random.normal((264, 264), key=mx.random.key(0))

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers

    def __call__(self, token_ids: mx.array) -> mx.array:
        return self.lm_head(self.model(token_ids)) + self.inputs[token_ids]


@pytest.mark.parametrize("recompute", MODES)
def test_a_model_that_cannot_be_split_is_learnt_whole(
    recompute: Mode, make_base: Callable[..., Path], examples: Examples
) -> None:
    model = InputsInTheHead(load_model(str(make_base("llama")), "float32").model)
    model.freeze()
    split, method = SplitModel(model), _lora(rank=4, alpha=8.0, target="q_proj,lm_head")
    parameters = method.attach(model, seed=0)
    parameters = {name: value + 0.05 for name, value in parameters.items()}
    whole = collate(examples, _whole(examples)[0])

    def plain(parameters: Parameters) -> mx.array:
        method.bind(model, parameters)
        logits = model(mx.array(whole.token_ids)).reshape(-1, 264)[mx.array(whole.positions)]
        return nn.losses.cross_entropy(logits, mx.array(whole.targets)).mean()

    expected, gradients = mx.value_and_grad(plain)(parameters)
    gradient_computer = GradientComputer(split, method, vocabulary=264, recompute=recompute)
    micro_batches = cut(range(5), examples.needed_lengths, 40)
    loss, ours, _ = gradient_computer.gradient(parameters, collated(examples, micro_batches))

    assert split.body_name is None
    _assert_equal((loss.item(), ours), (expected.item(), gradients))


def test_each_compiled_shape_is_traced_once_and_its_first_run_timed(
    make_subject: Callable[..., Subject], examples: Examples
) -> None:
    one, other, plain = MicroBatch((0, 2), 16), MicroBatch((1,), 24), MicroBatch((4,), 32)
    shapes = [padded_shape(collate(examples, micro_batch)) for micro_batch in (one, other)]
    subject = make_subject(_lora(rank=4, alpha=8.0), compiled=shapes)
    for micro_batches, traces in (([one, plain], 1), ([plain, one], 1), ([one, other, one], 2), ([other], 2)):
        subject.gradient(examples, micro_batches)
        assert len(subject.gradient_computer.trace_seconds) == traces
    assert min(subject.gradient_computer.trace_seconds) > 0
    subject.gradient_computer.configure("layers", shapes)  # traces of another mode are of no use any more
    subject.gradient(examples, [one])
    assert len(subject.gradient_computer.trace_seconds) == 3


# Memory


def _active_memory() -> int:
    """What is taken now; peaks are measured from now on."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    return mx.get_active_memory()


def _bytes(arrays: Parameters) -> int:
    return sum(array.nbytes for array in arrays.values())


@pytest.fixture
def heavy(make_base: Callable[..., Path], examples: Examples) -> Subject:
    """Every weight of a model whose arrays are many and large beside what a few tokens take."""
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8, "head_dim": 32}
    subject = Subject(make_base("llama", **shape), Full())
    subject.gradient(examples, _whole(examples))  # parameters are there, and the model's own no more
    return subject


def test_a_sum_of_gradients_takes_the_place_of_the_one_before(heavy: Subject, examples: Examples) -> None:
    size = _bytes(heavy.parameters)
    one, *others = [MicroBatch((row,), 24) for row in (0, 1, 2)]

    def above(micro_batches: list[MicroBatch]) -> float:
        before = _active_memory()
        heavy.gradient(examples, micro_batches)
        return (mx.get_peak_memory() - before) / size

    first = above([one])
    assert 1 < first < 1.8
    # A second sum beside the first and the gradient would be one more.
    assert above([one, *others]) < first + 0.8


def test_an_update_takes_parameters_gradients_moments_and_a_part_more(
    heavy: Subject, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients_module, "PART_BYTES", 2**18)
    size = _bytes(heavy.parameters)
    optimizer = make_optimizer(TrainConfig(data="-"), heavy.parameters, lambda name: "norm" not in name)
    mx.eval(optimizer.state)
    for _ in range(2):
        _, gradients = heavy.gradient(examples, _whole(examples))
        before = _active_memory()
        scale = clip_scale(global_norm(gradients), 1.0)
        heavy.parameters = optimizer.update(heavy.parameters, gradients, 1e-3, scale)
        assert mx.get_peak_memory() - before < 0.2 * size
        assert not gradients
    state = optimizer.flat_state()
    assert sum(array.nbytes for array in state.values()) == pytest.approx(2 * size, rel=0.01)
    assert {str(array.dtype) for name, array in state.items() if name[-1] in "mv"} == {"mlx.core.float32"}


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "granite"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_size_of_tiles_leaves_no_trace(
    family: str, tied: bool, make_subject: Callable[..., Subject], examples: Examples
) -> None:
    subject = make_subject(_lora(rank=4), family=family, tied=tied)
    cut_once = cut(range(len(examples)), examples.lengths, 4096)
    assert subject.gradient_computer.tiled_head is not None
    expected, evaluated = None, None
    for columns in (4096, 100, 1):
        subject.gradient_computer.tiled_head.columns = columns
        subject.gradient_computer.configure(subject.gradient_computer.mode)
        found = subject.gradient(examples, cut_once)
        result = subject.gradient_computer.evaluate(subject.parameters, collated(examples, cut_once))
        expected, evaluated = expected or found, evaluated or result
        _assert_equal(found, expected, tolerance=1e-5)
        assert result.loss == pytest.approx(evaluated.loss, rel=1e-5)
        assert result.token_accuracy == pytest.approx(evaluated.token_accuracy, rel=1e-6)
    subject.gradient_computer.tiled_head = None  # the head as a whole
    _assert_equal(subject.gradient(examples, cut_once), expected, tolerance=1e-5)


# Parameters that are rounded once a step


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "settings", [{"alpha": 24.0}, {"dora": True}, {"target": "all-linear,lm_head", "dropout": 0.2}], ids=str
)
def test_rounding_parameters_once_a_step_changes_no_bit(
    dtype: str, settings: dict[str, Any], examples: Examples, make_base: Callable[..., Path]
) -> None:
    base = load_model(str(make_base("qwen3", tied=False)), dtype)
    method = make_method(TrainConfig(data="-", **settings))
    random = np.random.default_rng(1)
    parameters = {
        name: value + mx.array(random.normal(0, 0.05, value.shape).astype(np.float32))
        for name, value in method.attach(base.model, 0).items()
    }
    computer = GradientComputer(SplitModel(base.model), method, base.config["vocab_size"])
    batches = [collate(examples, MicroBatch(rows, 40)) for rows in ((0, 1), (2,))]
    keys = mx.random.split(mx.random.key(7), 3) if method.uses_dropout else [None] * 3
    weights = [batch.weights / 10 for batch in batches]
    expected: Parameters = {}
    for batch, own, key in zip(batches, weights, keys, strict=False):
        _, gradients = computer.micro_step(parameters, batch, own, key)
        expected = {name: expected[name] + g if expected else g for name, g in gradients.items()}
    key = mx.random.key(7) if method.uses_dropout else None
    found = computer.gradient(parameters, batches, key, weighting=Weighting(weights, 1.0)).gradients
    assert {value.dtype for value in found.values()} == {mx.float32}
    for name, gradient in expected.items():
        assert mx.array_equal(found[name], gradient).item(), name


def test_float32_parameters_are_computed_with_as_they_are() -> None:
    base = load_model("tiny", "float32")
    method = make_method(TrainConfig(data="-", model="tiny"))
    parameters = method.attach(base.model, 0)
    assert method.rounded(parameters) is parameters
