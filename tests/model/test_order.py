"""The order of a computation: no more is held at once than must be."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_sft.model.order import after

pytestmark = pytest.mark.fast

ROWS, COLUMNS, BLOCKS = 256, 1024, 16


def test_blocks_one_after_another_hold_one_block_and_change_no_value() -> None:
    x = mx.random.normal((ROWS,), key=mx.random.key(0))
    mx.eval(x)
    alone, together = _peak(x, in_order=True), _peak(x, in_order=False)
    block = 4 * ROWS * COLUMNS
    assert alone[1] < 6 * block
    assert together[1] > 8 * block, "MLX orders blocks by itself: `after` is no longer needed"
    assert alone[0] == together[0]


def test_before_the_first_result_there_is_nothing_to_wait_for() -> None:
    x = mx.array([1.0, 2.0])
    assert after([], x).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_what_waits_keeps_its_gradient(factor: float) -> None:
    gradient = mx.grad(lambda x: (factor * after([x.sum()], x)).sum())(mx.array([1.0, 2.0]))
    assert gradient.tolist() == [factor, factor]


def _peak(x: mx.array, *, in_order: bool) -> tuple[float, int]:
    """A sum over blocks, and the bytes above what there was before."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    results: list[mx.array] = []
    for i in range(BLOCKS):
        start = after(results[-1:], x) if in_order else x
        block = mx.broadcast_to(start[:, None], (ROWS, COLUMNS)) * (1 + mx.arange(COLUMNS) * i)
        results.append((mx.sin(block) @ mx.ones((COLUMNS, 1))).sum())
    total = sum(results, mx.array(0.0)).item()
    return total, mx.get_peak_memory() - before
