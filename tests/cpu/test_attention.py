"""Attention in blocks is attention: the same numbers and gradients as MLX's own, without the square of scores."""

from __future__ import annotations

import gc
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from mlx_sft.cpu.attention import block_rows, causal_attention

pytestmark = pytest.mark.fast

Attention = Callable[[mx.array, mx.array, mx.array], mx.array]

SCALE = 0.3
D = 8


def _ours(block: int | None = None) -> Attention:
    return lambda queries, keys, values: causal_attention(queries, keys, values, SCALE, block=block)


def _reference(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=SCALE, mask="causal")


def _inputs(
    length: int, *, rows: int = 2, kv_heads: int = 2, group: int = 2, d: int = D, dtype: mx.Dtype = mx.float32
) -> list[mx.array]:
    """Queries, keys, values, and a gradient of the result."""
    heads = [kv_heads * group, kv_heads, kv_heads, kv_heads * group]
    keys = mx.random.split(mx.random.key(length), len(heads))
    return [mx.random.normal((rows, n, length, d), key=key).astype(dtype) for n, key in zip(heads, keys, strict=True)]


def _value_and_gradients(attention: Attention, inputs: list[mx.array]) -> list[mx.array]:
    *primals, cotangent = inputs
    values, gradients = mx.vjp(attention, primals, [cotangent])
    return [*values, *gradients]


def _assert_close(ours: list[mx.array], expected: list[mx.array], tolerance: float = 2e-6) -> None:
    assert [(x.dtype, x.shape) for x in ours] == [(x.dtype, x.shape) for x in expected]
    for result, reference in zip(ours, expected, strict=True):
        exact = np.array(reference.astype(mx.float32))
        difference = np.abs(np.array(result.astype(mx.float32)) - exact).max()
        assert difference <= tolerance * max(1, np.abs(exact).max())


@pytest.mark.parametrize("group", [1, 2, 8])
@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 9, 16, 17, 30])
def test_values_and_gradients_equal_mlx_at_the_edges_of_blocks(length: int, group: int) -> None:
    inputs = _inputs(length, group=group)
    _assert_close(_value_and_gradients(_ours(block=8), inputs), _value_and_gradients(_reference, inputs))


@pytest.mark.parametrize("length", [63, 64, 65, 150])
def test_values_and_gradients_equal_mlx_with_the_block_it_chooses(length: int) -> None:
    inputs = _inputs(length)
    _assert_close(_value_and_gradients(_ours(), inputs), _value_and_gradients(_reference, inputs))


def test_one_row_and_one_head() -> None:
    inputs = _inputs(20, rows=1, kv_heads=1, group=1)
    _assert_close(_value_and_gradients(_ours(block=6), inputs), _value_and_gradients(_reference, inputs))


def test_heads_that_lie_after_positions_in_memory() -> None:
    inputs = [mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2) for x in _inputs(20)]
    _assert_close(_value_and_gradients(_ours(block=6), inputs), _value_and_gradients(_reference, inputs))


@pytest.mark.parametrize("in_front", [1, 6, 40])
def test_keys_in_front_of_all_queries(in_front: int) -> None:
    queries, _, _, cotangent = _inputs(20)
    _, keys, values, _ = _inputs(20 + in_front)
    inputs = [queries, keys, values, cotangent]
    _assert_close(_value_and_gradients(_ours(block=6), inputs), _value_and_gradients(_reference, inputs))


def test_values_wider_than_keys() -> None:
    queries, keys, values, cotangent = _inputs(20)
    wide = [mx.concatenate([x, 2 * x], axis=-1) for x in (values, cotangent)]
    both = [mx.concatenate([x, mx.zeros_like(x)], axis=-1) for x in (queries, keys)]

    ours = _value_and_gradients(_ours(block=6), [queries, keys, *wide])
    result, for_queries, for_keys, for_values = _value_and_gradients(_reference, [*both, *wide])

    _assert_close(ours, [result, for_queries[..., :D], for_keys[..., :D], for_values])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype: mx.Dtype) -> None:
    inputs = _inputs(30, dtype=dtype)
    precise = _value_and_gradients(_ours(block=8), [x.astype(mx.float32) for x in inputs])

    rounded = _value_and_gradients(_ours(block=8), inputs)

    for half, full in zip(rounded, precise, strict=True):
        assert half.dtype == dtype
        assert mx.array_equal(half, full.astype(dtype))


def test_large_logits_neither_overflow_nor_become_nan() -> None:
    queries, keys, values, cotangent = _inputs(20)
    inputs = [300 * queries, 300 * keys, values, cotangent]  # scores up to 10^5, where exp overflows at 89

    ours = _value_and_gradients(_ours(block=6), inputs)

    assert all(mx.isfinite(x).all().item() for x in ours)
    _assert_close(ours[:1], _value_and_gradients(_reference, inputs)[:1], tolerance=1e-3)


def test_the_first_query_sees_one_key() -> None:
    queries, keys, values, cotangent = _inputs(20)

    result, for_queries, _, _ = _value_and_gradients(_ours(block=6), [queries, keys, values, cotangent])

    np.testing.assert_allclose(np.array(result[:, :, 0]), np.array(mx.repeat(values[:, :, 0], 2, axis=1)), rtol=1e-6)
    assert np.abs(np.array(for_queries[:, :, 0])).max() < 1e-6


@pytest.mark.parametrize("position", [5, 6, 7])
def test_nothing_is_seen_ahead_not_even_a_little(position: int) -> None:
    queries, keys, values, cotangent = _inputs(20)
    later = (mx.arange(20) > position)[:, None]
    other_keys, other_values = (mx.where(later, 1e4, x) for x in (keys, values))
    earlier_only = mx.where(later, 0.0, cotangent)

    plain, _, for_keys, for_values = _value_and_gradients(_ours(block=6), [queries, keys, values, earlier_only])
    changed = _ours(block=6)(queries, other_keys, other_values)

    assert mx.array_equal(plain[:, :, : position + 1], changed[:, :, : position + 1])
    assert not mx.array_equal(plain[:, :, position + 1 :], changed[:, :, position + 1 :])
    for gradient in (for_keys, for_values):
        assert not gradient[:, :, position + 1 :].any().item()
        assert gradient[:, :, position].any().item()


def test_the_same_under_value_and_grad_checkpoint_and_compile() -> None:
    *inputs, weights = _inputs(12)

    def loss(attention: Attention) -> Callable[..., mx.array]:
        # Not the inputs themselves: the gradient has to go on through what attention was given.
        return lambda queries, keys, values: (attention(2 * queries, mx.sin(keys), values * values) * weights).sum()

    def computed(function: Callable[..., mx.array]) -> list[mx.array]:
        value, gradients = mx.value_and_grad(function, argnums=(0, 1, 2))(*inputs)
        return [value, *gradients]

    expected = computed(loss(_reference))
    ours = loss(_ours(block=6))
    compiled = mx.compile(mx.value_and_grad(mx.checkpoint(ours), argnums=(0, 1, 2)))

    _assert_close(computed(ours), expected)
    _assert_close(computed(mx.checkpoint(ours)), expected)
    for _ in range(2):
        value, gradients = compiled(*inputs)
        _assert_close([value, *gradients], expected)


def test_a_gradient_of_one_input_alone() -> None:
    queries, keys, values, cotangent = _inputs(20)

    def loss(attention: Attention) -> Callable[[mx.array], mx.array]:
        return lambda values: (attention(queries, keys, values) * cotangent).sum()

    _assert_close([mx.grad(loss(_ours(block=6)))(values)], [mx.grad(loss(_reference))(values)])


def _peak(length: int, kv_heads: int) -> int:
    """Bytes of forward and backward at their highest, above the inputs."""
    inputs = _inputs(length, rows=1, kv_heads=kv_heads, group=2 // kv_heads)
    mx.eval(inputs)
    gc.collect()  # of the tests before, or it would go while this is measured
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(_value_and_gradients(_ours(block=16), inputs))
    return mx.get_peak_memory() - before


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_memory_grows_with_the_length_not_with_its_square(kv_heads: int) -> None:
    short, long = _peak(512, kv_heads), _peak(2048, kv_heads)
    square = 4 * 2 * 2048**2

    assert long < 6 * short  # the square would be 16
    assert long < square / 8


def test_the_product_that_follows_reads_the_result_without_a_copy() -> None:
    for length in (20, 150):
        inputs = _inputs(length)[:3]
        result = _ours()(*inputs)
        mx.eval(result)
        mx.synchronize()
        before = mx.get_active_memory()
        joined = result.swapaxes(1, 2).reshape(2, length, -1)
        mx.eval(joined)
        assert mx.get_active_memory() <= before


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((8, 16, 1), 1),
        ((8, 16, 64), 64),
        ((8, 16, 65), 33),  # 33 + 32, not 64 + 1
        ((8, 16, 104), 52),
        ((1, 16, 2048), 64),
        ((1, 16, 4096), 48),  # 12 MiB
        ((64, 32, 32768), 32),
    ],
)
def test_blocks_are_even_and_bounded(shape: tuple[int, int, int], size: int) -> None:
    assert block_rows(*shape) == size
