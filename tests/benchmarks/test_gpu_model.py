"""The model of a GPU: what it counts, against counts by hand and against the graphs that MLX itself compiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

from benchmarks.gpu_graph import record
from benchmarks.gpu_kernels import VIEWS, Kernel, fused, kernels, total
from benchmarks.gpu_model import BANDWIDTHS, Chip, Step, kernels_of, mlx_lms, ours, points, tables, taken_for_gpu
from benchmarks.workload import QWEN3_600M
from mlx_sft.training.recompute import Mode
from tests.graphs import recorded

pytestmark = pytest.mark.fast

SMALL = QWEN3_600M | {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 640,
}
ROWS, WIDTH = 2, 16


def only(found: list[Kernel], name: str) -> Kernel:
    (kernel,) = (kernel for kernel in found if kernel.name == name)
    return kernel


def counted(function: Any, *arguments: mx.array) -> list[Kernel]:
    return kernels(fused(record(function, *arguments)))


def test_a_product_is_counted_as_by_hand() -> None:
    (product,) = counted(lambda x, w: x @ w.T, mx.zeros((5, 7), mx.bfloat16), mx.zeros((3, 7), mx.bfloat16))
    assert (product.launches, product.flops) == (1, 2 * 5 * 7 * 3)
    assert (product.read, product.written) == (2 * (5 * 7 + 3 * 7), 2 * 5 * 3)


def test_operations_element_by_element_are_one_kernel() -> None:
    (kernel,) = counted(lambda x, y: mx.exp(x * y) + 1, mx.zeros((4, 6)), mx.zeros((6,)))
    assert (kernel.name, kernel.launches, kernel.flops) == ("Compiled", 1, 0)
    assert (kernel.read, kernel.written) == (4 * (24 + 6 + 1), 4 * 24)


def test_kernels_and_their_gradients_are_one_node_each() -> None:
    def loss(x: mx.array) -> mx.array:
        turned = mx.fast.rope(mx.fast.rms_norm(x, mx.ones(8), 1e-6), 8, traditional=False, base=1.0, scale=1, offset=0)
        attended = mx.fast.scaled_dot_product_attention(turned, turned, turned, scale=1.0, mask="causal")
        return mx.fast.cross_entropy(attended.reshape(-1, 8), mx.zeros(10, mx.int32)).sum()

    found = counted(mx.grad(loss), mx.zeros((1, 2, 5, 8)))
    for name in ("RMSNorm", "RoPE", "ScaledDotProductAttention", "CrossEntropy"):
        assert only(found, name).launches == 1
        assert only(found, f"{name}VJP").moved >= only(found, name).moved / 2
    assert only(found, "ScaledDotProductAttention").flops == 2 * 2 * (2 * 5 * 8) * 5 // 2
    assert not {"Sin", "Cos", "Scan"} & {kernel.name for kernel in found}


def test_a_checkpoint_computes_again_what_its_gradient_reads() -> None:
    w = mx.zeros((4, 4))

    def inner(x: mx.array) -> mx.array:
        return mx.exp(x @ w) @ w

    def products(function: Any) -> int:
        step = mx.value_and_grad(lambda x: function(x).sum())
        return sum(kernel.name == "Matmul" for kernel in counted(step, mx.zeros((3, 4))))

    assert products(inner) == 4
    assert products(lambda x: mx.checkpoint(inner)(x)) == 5  # the first one again, whose exponential was not kept
    assert (
        products(lambda x: mx.checkpoint(lambda x: mx.checkpoint(inner)(x))(x)) == 7
    )  # the outer copy waits for the inner results


def steps() -> dict[str, Step]:
    mine = {mode: ours(SMALL, ROWS, WIDTH, 0.5, mode) for mode in get_args(Mode)}
    return mine | {f"mlx-lm, {on}": mlx_lms(SMALL, ROWS, WIDTH, checkpoint=on) for on in (False, True)}


@pytest.mark.parametrize("name", [*get_args(Mode), "mlx-lm, False", "mlx-lm, True"])
def test_as_many_kernels_as_in_the_graph_that_mlx_compiles(name: str, tmp_path: Path) -> None:
    """Of the plain operations that a CPU has in the place of MLX's kernels: the rules of fusing are MLX's, and so is what is recomputed."""
    function, given = steps()[name]
    counted = sum(node.name not in VIEWS for node in fused(record(function, *given, kernels=False)).nodes)
    mx.eval(given)
    with taken_for_gpu():
        results = mx.compile(function)(*given) if name.startswith("mlx-lm") else function(*given)
    compiled = recorded(tmp_path / "graph.dot", *(array for _, array in tree_flatten(results)))
    expected = sum(count for kind, count in compiled.items() if kind not in {*VIEWS, "CustomTransforms"})
    assert counted == pytest.approx(expected, rel=0.01)


def test_ours_starts_moves_and_computes_less_than_mlx_lms_where_part_is_supervised() -> None:
    mine, theirs = (
        kernels_of(ours(SMALL, ROWS, WIDTH, 0.4, "off")),
        kernels_of(mlx_lms(SMALL, ROWS, WIDTH, checkpoint=False)),
    )
    assert total(mine).launches < total(theirs).launches
    assert total(mine).moved < total(theirs).moved
    assert total(mine).flops < total(theirs).flops


def test_the_models_code_and_mlxs_namespace_are_as_they_were_before() -> None:
    names = [(mx, "checkpoint"), (mx, "custom_function"), (mx, "default_device")]
    names += [(mx.fast, name) for name in ("rms_norm", "rope", "scaled_dot_product_attention", "cross_entropy")]
    before = [getattr(owner, name) for owner, name in names] + [qwen3.TransformerBlock.__call__]
    kernels_of(mlx_lms(SMALL, ROWS, WIDTH, checkpoint=True))
    kernels_of(ours(SMALL, ROWS, WIDTH, 1.0, "light"))
    with pytest.raises(RuntimeError, match="on purpose"):
        record(stopped, mx.zeros(3))
    assert [getattr(owner, name) for owner, name in names] + [qwen3.TransformerBlock.__call__] == before


def stopped(_: mx.array) -> mx.array:
    raise RuntimeError("on purpose")


def test_seconds_are_the_longer_of_moving_and_computing_and_the_launches() -> None:
    chip = Chip("-", bandwidth=100.0, flops=1000.0)
    moving, computing = Kernel("a", 2, 150, 50, 10), Kernel("b", 1, 10, 0, 5000)
    assert chip.seconds([moving, computing], launch=0.5) == pytest.approx((2 + 2 * 0.5) + (5 + 0.5))
    assert all(Chip.named(name).flops > 1e12 for name in BANDWIDTHS)


def test_a_table_has_every_chip_and_trainer() -> None:
    text = tables(points(SMALL, [(ROWS, WIDTH)], [1.0], launch=0.0))
    assert all(f"| {chip} |" in text for chip in BANDWIDTHS)
    assert np.all([name in text for name in ("| ours |", "| ours, layers |", "| mlx-lm |", "--grad-checkpoint |")])


def test_a_primitive_without_a_known_cost_is_named() -> None:
    with pytest.raises(ValueError, match="Sort"):
        counted(lambda x: mx.sort(x), mx.zeros(4))
