"""Stochastic rounding to bfloat16: one of the two neighbours, with their mean at the number itself; for every optimizer."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_sft.config import TrainConfig
from mlx_sft.optimizers import make_optimizer
from mlx_sft.optimizers.gradients import PIECE, Arrays, global_norm, row_pieces
from mlx_sft.optimizers.rounding import random_bits, stochastically_rounded
from mlx_sft.registry import OPTIMIZERS

SHAPES = {"a.weight": (64, 128), "norm.weight": (128,), "experts.weight": (2, 32, 64)}


def rounded(values: np.ndarray, bits: np.ndarray) -> np.ndarray:
    found = stochastically_rounded(mx.array(values), mx.array(bits))
    assert found.dtype == mx.bfloat16
    return np.array(found.astype(mx.float32))


def arrays(seed: int, dtype: mx.Dtype = mx.float32) -> Arrays:
    random = np.random.default_rng(seed)
    return {
        name: mx.array(random.normal(size=shape).astype(np.float32)).astype(dtype) for name, shape in SHAPES.items()
    }


def test_with_the_same_bits_it_is_torchaos_formula() -> None:
    """Away from zero where the random 16 bits are larger than what the lower half of the number leaves of 2^16."""
    random = np.random.default_rng(0)
    values = (random.normal(size=4096) * 10.0 ** random.integers(-30, 30, 4096)).astype(np.float32)
    bits = random.integers(0, 2**16, 4096).astype(np.uint16)
    whole = values.view(np.uint32)
    up = (2**16 - 1 - bits.astype(np.uint32)) < (
        whole & 0xFFFF
    )  # `rand_16bit < x_fraction` of torchao, with the bits turned over
    expected = ((whole & 0xFFFF0000) + np.where(up, 0x10000, 0).astype(np.uint32)).view(np.float32)
    np.testing.assert_array_equal(rounded(values, bits), expected)
    assert 0.4 < up.mean() < 0.6


def test_the_mean_is_the_number_itself_and_nearest_is_not() -> None:
    """All 65,536 random bits once: the mean is exact, for either sign."""
    every = np.arange(2**16, dtype=np.uint16)
    for number in (1.001, -1.001, 3.3e-7, -123.4567):
        value = np.full(2**16, number, np.float32)
        found = rounded(value, every).astype(np.float64)
        spacing = np.ptp(found)
        assert len(set(found.tolist())) == 2
        assert abs(found.mean() - float(value[0])) < spacing * 2**-16
        assert abs(float(mx.array(number).astype(mx.bfloat16).item()) - number) > spacing / 20


def test_what_bfloat16_has_stays_and_so_do_infinity_and_nan() -> None:
    numbers = [1.0, -1.0, 0.0, -0.0, 0.15625, 3.3895313892515355e38, float("inf"), float("-inf"), float("nan")]
    for bits in (0, 1, 2**15, 2**16 - 1):
        found = rounded(np.array(numbers, np.float32), np.full(len(numbers), bits, np.uint16))
        np.testing.assert_array_equal(found, np.array(numbers, np.float32))
        assert np.signbit(found[3])
    all_nan = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], np.uint32).view(np.float32)
    assert np.isnan(rounded(all_nan, np.full(3, 2**16 - 1, np.uint16))).all()


def test_the_bits_are_even_and_follow_from_the_key() -> None:
    bits = np.array(random_bits((1000, 257), mx.random.key(3)))
    assert bits.dtype == np.uint16
    shares = np.array([(bits >> place & 1).mean() for place in range(16)])
    assert np.abs(shares - 0.5).max() < 0.005  # five standard deviations
    assert not np.array_equal(bits[0], bits[1])
    assert np.array_equal(bits, np.array(random_bits((1000, 257), mx.random.key(3))))
    assert not np.array_equal(bits, np.array(random_bits((1000, 257), mx.random.key(4))))


@pytest.mark.parametrize(("name", "compiled"), [*((name, False) for name in OPTIMIZERS.names()), ("adamw", True)])
def test_a_step_in_bfloat16_is_float32s_rounded_to_a_neighbour(name: str, compiled: bool) -> None:
    """From the same numbers: state float32 or 8 bits as ever, each parameter one of the two beside float32's."""
    config, start = TrainConfig(data="x", optimizer=name), arrays(0, mx.bfloat16)
    small = {name: gradient * 1e-2 for name, gradient in arrays(1).items()}
    precise_start = {name: value.astype(mx.float32) for name, value in start.items()}
    precise, coarse = (
        make_optimizer(config, given, lambda _: True, compiled=compiled) for given in (precise_start, start)
    )
    expected = precise.update(precise_start, dict(small), 1e-3, mx.array(0.5))
    found = coarse.update(start, dict(small), 1e-3, mx.array(0.5), mx.random.key(0))
    nearest = make_optimizer(config, start, lambda _: True).update(start, dict(small), 1e-3, mx.array(0.5))
    for part, value in expected.items():
        assert found[part].dtype == nearest[part].dtype == mx.bfloat16
        one, other = np.array(value), np.array(found[part].astype(mx.float32))
        assert (np.abs(one - other) < 2.0**-7 * np.abs(one)).all()
        np.testing.assert_array_equal(
            np.array(nearest[part].astype(mx.float32)), np.array(value.astype(mx.bfloat16).astype(mx.float32))
        )
    moved = np.array((found["a.weight"] != start["a.weight"]).astype(mx.int32)).mean()
    stalled = np.array((nearest["a.weight"] != start["a.weight"]).astype(mx.int32)).mean()
    assert moved > stalled
    states = [optimizer.flat_state() for optimizer in (precise, coarse)]
    assert {key: value.dtype for key, value in states[0].items()} == {
        key: value.dtype for key, value in states[1].items()
    }
    for key, value in states[0].items():
        assert mx.array_equal(value, states[1][key]).item(), key


def test_steps_too_small_for_bfloat16_add_up() -> None:
    """A thousand steps of a hundredth of what lies between two numbers; rounded to nearest, none of them moves anything."""
    config = TrainConfig(data="x", optimizer="sgd")
    found = {}
    for stochastic in (True, False):
        parameters = {"w": mx.ones((4096,), mx.bfloat16)}
        optimizer = make_optimizer(config, parameters, lambda _: True)
        for step in range(1000):
            key = mx.random.key(step) if stochastic else None
            parameters = optimizer.update(parameters, {"w": mx.full((4096,), -1.0)}, 2.0**-7 / 100, None, key)
        found[stochastic] = float(parameters["w"].astype(mx.float32).mean().item())
    assert found[True] == pytest.approx(1 + 1000 * 2.0**-7 / 100, abs=1e-3)
    assert found[False] == 1


# Large arrays, some rows at a time


@pytest.mark.parametrize(
    "shape", [(), (5,), (10 * PIECE,), (151_936, 1024), (32_001, 1000), (128, 2048, 768), (7, 2 * PIECE), (2, 3)]
)
def test_pieces_are_all_rows_in_whole_blocks(shape: tuple[int, ...]) -> None:
    pieces = row_pieces(shape)
    rows, row = (shape[0], int(np.prod(shape[1:]))) if shape else (1, 1)
    assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
    assert pieces[-1].stop == rows
    assert all(piece.start * row % 256 == 0 for piece in pieces)
    sizes = [(piece.stop - piece.start) * row for piece in pieces]
    if rows * row >= 4 * PIECE and row <= PIECE:
        assert PIECE / 2 < min(sizes) <= max(sizes) <= 2 * PIECE


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_a_large_array_is_updated_as_if_it_were_small(
    name: str, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(data="x", optimizer=name, weight_decay=0.1, **({"momentum": 0.9} if name == "sgd" else {}))
    found = []
    for piece in (PIECE, 2048):
        monkeypatch.setattr("mlx_sft.optimizers.gradients.PIECE", piece)
        parameters = arrays(0, dtype)
        optimizer = make_optimizer(config, parameters, lambda _: True)
        for step in (1, 2):
            parameters = optimizer.update(parameters, arrays(step), 1e-3, mx.array(0.5))
        found.append(parameters | optimizer.flat_state())
    assert len(row_pieces(SHAPES["a.weight"])) == 4
    for key, value in found[0].items():
        assert mx.array_equal(value, found[1][key]).item(), key


@pytest.mark.parametrize(("name", "dtype"), [("adamw", mx.float32), ("adamw8bit", mx.bfloat16)])
def test_the_state_of_a_large_array_is_written_in_place(
    name: str, dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is new takes the place of what was; besides, there is what passes of one piece in a hundred."""
    monkeypatch.setattr("mlx_sft.optimizers.gradients.PIECE", 2**14)
    parameters, gradients = {"w": mx.ones((1600, 1024), dtype)}, {"w": mx.ones((1600, 1024), dtype)}
    optimizer = make_optimizer(TrainConfig(data="x", optimizer=name), parameters, lambda _: True)
    mx.eval(parameters, gradients, optimizer.flat_state())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    optimizer.update(parameters, gradients, 1e-3, mx.array(0.5), mx.random.key(0))
    assert mx.get_peak_memory() - before < 0.6 * parameters["w"].nbytes


def test_the_norm_of_a_large_gradient_in_bfloat16_is_that_of_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = arrays(0, mx.bfloat16)
    expected = np.sqrt(
        sum(np.square(np.array(value.astype(mx.float32), np.float64)).sum() for value in gradients.values())
    )
    monkeypatch.setattr("mlx_sft.optimizers.gradients.PIECE", 2048)
    found = global_norm(gradients)
    assert found.dtype == mx.float32
    assert found.item() == pytest.approx(expected, rel=1e-5)
