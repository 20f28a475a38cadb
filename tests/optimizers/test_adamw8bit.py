"""AdamW in 8 bits is AdamW whose moments are rounded, after each step, to the nearest value of the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sft import train
from mlx_sft.config import TrainConfig
from mlx_sft.optimizers import Optimizer, make_optimizer
from mlx_sft.optimizers.adamw8bit import BLOCK, AdamW8bit, table
from mlx_sft.optimizers.gradients import Arrays
from mlx_sft.run_folder import RunFolder
from mlx_sft.safetensors_file import open_safetensors

SHAPES = {"a.weight": (64, 128), "stack.weight": (3, 32, 64), "odd.weight": (65, 129), "small.weight": (16, 16)}
IN_BLOCKS = {"a.weight", "stack.weight"}


def arrays(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: (scale * random.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def to_mlx(found: dict[str, np.ndarray]) -> Arrays:
    return {name: mx.array(array) for name, array in found.items()}


def made(name: str = "adamw8bit") -> Optimizer:
    config = TrainConfig(data="x.jsonl", optimizer=name, weight_decay=0.1, betas=(0.8, 0.95))
    return make_optimizer(config, to_mlx(arrays(0)), lambda name: True)


def rounded(moment: np.ndarray, *, signed: bool) -> np.ndarray:
    blocks = moment.reshape(-1, BLOCK).astype(np.float64)
    largest = np.abs(blocks).max(axis=1, keepdims=True).clip(1e-12)
    nearest = np.abs((blocks / largest)[..., None] - table(signed=signed)).argmin(axis=-1)
    return (table(signed=signed)[nearest] * largest).reshape(moment.shape)


def test_a_trajectory_is_that_of_rounded_moments() -> None:
    """As written down once more here. torchao 0.18's `AdamW8bit` differs from ours by 3e-6 after 20 steps of the rate 1e-2."""
    optimizer, parameters, expected = made(), to_mlx(arrays(0)), arrays(0)
    moments = {name: (np.zeros(shape), np.zeros(shape)) for name, shape in SHAPES.items()}
    for step in range(1, 7):
        gradients = arrays(step, 10.0 ** -(step % 4))
        parameters = optimizer.update(parameters, to_mlx(gradients), 1e-2)
        for name, gradient in gradients.items():
            first, second = (0.8 * moments[name][0] + 0.2 * gradient, 0.95 * moments[name][1] + 0.05 * gradient**2)
            change = first / (1 - 0.8**step) / (np.sqrt(second / (1 - 0.95**step)) + 1e-8)
            expected[name] = expected[name] * (1 - 1e-2 * 0.1) - 1e-2 * change
            if name in IN_BLOCKS:
                first, second = rounded(first, signed=True), rounded(second, signed=False)
            moments[name] = (first, second)
    for name, value in parameters.items():
        # A number that lies between two values, but for its last bit, may be rounded to the other one.
        apart = np.abs(np.array(value) - expected[name]) > 1e-5
        assert apart.mean() < 1e-3, name


@pytest.mark.parametrize("signed", [True, False])
def test_the_table_has_256_values_and_a_value_comes_back_as_itself(signed: bool) -> None:
    values = table(signed=signed)
    assert (len(set(values.tolist())), values[-1], 0 in values) == (256, 1, True)
    assert values[0] == (pytest.approx(-0.9929687) if signed else 0)
    kept = AdamW8bit.make(AdamW8bit.Settings(), "", decayed=True).tables["m" if signed else "v"]
    codes, largest = kept.encoded(mx.array(3 * values))
    assert codes.tolist() == [list(range(BLOCK))]
    np.testing.assert_allclose(np.array(kept.decoded(codes, largest))[0], 3 * values, rtol=1e-6)


def test_its_state_is_a_quarter_of_adamws() -> None:
    large = {"weight": (1024, 1024)}
    eight, whole = (make.state_bytes(make.Settings(), large) for make in (AdamW8bit, type(made("adamw"))))
    assert (eight, whole) == (1024 * 1024 * 2 + 1024 * 1024 // BLOCK * 4 * 2, 1024 * 1024 * 8)
    optimizer = made()
    kept = {name: {kind: value.dtype for kind, value in state.items()} for name, state in optimizer.state[0].items()
            if isinstance(state, dict)}  # fmt: skip
    assert {name for name, kinds in kept.items() if mx.uint8 in kinds.values()} == IN_BLOCKS


def test_it_goes_on_with_the_moments_of_another_adamw() -> None:
    before, parameters = made("adamw"), to_mlx(arrays(0))
    for step in (1, 2):
        parameters = before.update(parameters, to_mlx(arrays(step)), 1e-2)
    moments = {name: state for name, state in before.state[0].items() if isinstance(state, dict)}
    eight = made()
    eight.take_up({n: s["m"] for n, s in moments.items()}, {n: s["v"] for n, s in moments.items()}, 2)
    one, two = (optimizer.update(dict(parameters), to_mlx(arrays(3)), 1e-2) for optimizer in (before, eight))
    for name in SHAPES:
        np.testing.assert_allclose(np.array(one[name]), np.array(two[name]), atol=2e-3)


def test_a_run_goes_on_to_the_same_bytes(make_base: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(5, 15 + n)), "labels": list(range(5, 15 + n))} for n in range(6)]
    settings = {
        "model": str(make_base()), "method": "full", "optimizer": "adamw8bit", "dtype": "float32", "scheduler": "constant",
        "warmup": 0, "lr": 1e-3, "batch_size": 2, "save_every": 2, "quiet": True,
    }  # fmt: skip
    whole = train(TrainConfig(**settings, max_steps=4, out=str(tmp_path / "whole")), data=rows).run_dir
    part = train(TrainConfig(**settings, max_steps=2, out=str(tmp_path / "part")), data=rows).run_dir
    train(TrainConfig(resume=str(part), max_steps=4), data=rows)
    for name in ("parameters", "optimizer"):
        one, two = (RunFolder(run).checkpoint(4) / f"{name}.safetensors" for run in (whole, part))
        assert one.read_bytes() == two.read_bytes()
    stored = open_safetensors(RunFolder(part).checkpoint(4) / "optimizer.safetensors").tensors
    assert {tensor.dtype for tensor in stored} == {"U8", "F32", "U64"}
