"""What a run does on a GPU, forced on the CPU: it computes the same there, and its recorded graph has no more in it than it must."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest

from mlx_sft import TrainConfig, load_model
from mlx_sft.data.batches import Batch, MicroBatch, collate
from mlx_sft.data.example import Example
from mlx_sft.methods import Parameters, make_method
from mlx_sft.model.head import SplitModel
from mlx_sft.training import loss
from mlx_sft.training.recompute import Mode
from mlx_sft.training.shapes import padded_shape
from mlx_sft.training.step import GradientComputer
from tests.graphs import recorded

pytestmark = pytest.mark.fast

RANDOM = np.random.default_rng(3)
ROWS = [
    Example(
        f"row {length}",
        RANDOM.integers(0, 4000, length).astype(np.int32),
        (RANDOM.random(length) < 0.5).astype(np.float32),
    )
    for length in (33, 25, 29)
]


class Subject:
    """The tiny model under LoRA away from its start, and what computes its gradients."""

    def __init__(self, dtype: str, **options: Any) -> None:
        base = load_model("tiny", dtype)
        method = make_method(TrainConfig(data="-", model="tiny"))
        start = method.attach(base.model, 0)
        random = np.random.default_rng(1)
        self.parameters = {
            name: value + mx.array(random.normal(0, 0.05, value.shape).astype(np.float32))
            for name, value in start.items()
        }
        self.computer = GradientComputer(SplitModel(base.model), method, base.config["vocab_size"], **options)

    def step(self) -> tuple[float, Parameters]:
        found = self.computer.gradient(self.parameters, [batch()])
        return float(found.loss.item()), found.gradients


def batch() -> Batch:
    return collate(ROWS, MicroBatch((0, 1, 2), 32))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Subject]:
    """`on_gpu(dtype, ...)`: a subject that takes the CPU for a GPU, on which MLX computes as ever."""

    def make(dtype: str = "float32", **options: Any) -> Subject:
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        return Subject(dtype, **options)

    return make


def assert_same(ours: tuple[float, Parameters], theirs: tuple[float, Parameters], tolerance: float) -> None:
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    largest = max(mx.abs(gradient).max().item() for gradient in theirs[1].values())
    for name, gradient in theirs[1].items():
        assert mx.abs(ours[1][name] - gradient).max().item() <= tolerance * largest, name


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_step_is_the_same_on_a_gpu(mode: Mode, on_gpu: Callable[..., Subject]) -> None:
    expected = Subject("float32").step()
    subject = on_gpu(recompute=mode)
    assert subject.computer.head_way == "fused"
    assert_same(subject.step(), expected, 1e-5)


def test_a_compiled_step_is_the_same(on_gpu: Callable[..., Subject]) -> None:
    expected = Subject("float32").step()
    assert_same(on_gpu(compiled=[padded_shape(batch())]).step(), expected, 1e-5)


def test_an_evaluation_is_the_same_on_a_gpu(on_gpu: Callable[..., Subject]) -> None:
    plain = Subject("float32")
    expected = plain.computer.evaluate(plain.parameters, [batch()])
    subject = on_gpu()
    found = subject.computer.evaluate(subject.parameters, [batch()])
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert found.token_accuracy == expected.token_accuracy


def test_a_kernel_that_computes_otherwise_is_not_used(
    on_gpu: Callable[..., Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX's own fallback on a CPU sums bfloat16 up as it is: the proof at the start sees it, and tiles are used as everywhere else."""
    subject = on_gpu("bfloat16")
    assert subject.computer.head_way == "tiles"
    own = mx.fast.cross_entropy
    monkeypatch.setattr(mx.fast, "cross_entropy", lambda logits, targets: own(logits, targets) * 1.001)
    assert on_gpu().computer.head_way == "tiles"


def test_a_head_that_is_trained_is_the_same_by_the_kernel() -> None:
    states, weight = (mx.random.normal(shape, key=mx.random.key(n)) for n, shape in enumerate([(7, 5), (11, 5)]))
    targets, weights = mx.array([1, 3, 0, 10, 7, 7, 2]), mx.arange(7) / 7

    def found(weight: mx.array, states: mx.array, *, fused: bool) -> mx.array:
        def head(parameters: Any, states: mx.array) -> mx.array:
            return states @ parameters["weight"].T

        return loss.cross_entropy_sum(head, {"weight": weight}, states, targets, weights, 3, fused=fused)

    for ours, plain in zip(
        *(mx.value_and_grad(found, argnums=(0, 1))(weight, states, fused=fused) for fused in (True, False)), strict=True
    ):
        for one, other in zip(*(part if isinstance(part, tuple) else (part,) for part in (ours, plain)), strict=True):
            np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-5, atol=1e-6)


def graph(subject: Subject, file: Path) -> Counter[str]:
    """The primitives of a micro-step, forward and backward."""
    weights = (batch().weights / 10).astype(np.float32)
    value, gradients = subject.computer.micro_step(subject.parameters, batch(), weights, None)
    return recorded(file, value, *gradients.values())


def test_nothing_is_gathered_or_scattered_for_the_head(on_gpu: Callable[..., Subject], tmp_path: Path) -> None:
    """One gather takes the supervised positions, and its gradient is one scatter; the embedding is another gather."""
    for subject in (on_gpu(), on_gpu("bfloat16")):
        found = graph(subject, tmp_path / "graph.dot")
        assert found["Scatter"] + found["ScatterAxis"] <= 2
        assert found["Gather"] + found["GatherAxis"] <= 4
