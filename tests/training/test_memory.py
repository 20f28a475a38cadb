"""A micro-batch as large as fits, recomputation only where it must be, and footprints near what is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sft.config import TrainConfig
from mlx_sft.data.batches import MicroBatch
from mlx_sft.data.encode import Example
from mlx_sft.methods import make_method
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.training.memory import MOST_TOKENS, Choice, Footprint, ThisMachine, choose, usable_bytes
from mlx_sft.training.step import Learner

GIB = 2**30
FOOTPRINT = Footprint(fixed=1000, per_token=10, per_token_recomputed=2)


def _choose(usable: int, longest: int, tokens: int | None = None, grad_checkpoint: str = "auto") -> Choice:
    return choose(FOOTPRINT, usable, longest, micro_batch_tokens=tokens, grad_checkpoint=grad_checkpoint)


def test_with_room_the_micro_batch_is_as_large_as_pays_off() -> None:
    assert _choose(usable=10**9, longest=100) == Choice(MOST_TOKENS, recompute=False)


def test_the_micro_batch_is_what_fits() -> None:
    assert _choose(usable=1000 + 10 * 300, longest=300) == Choice(300, recompute=False)


def test_layers_are_recomputed_only_where_the_longest_row_would_not_fit() -> None:
    assert _choose(usable=1000 + 10 * 300 - 1, longest=300) == Choice((10 * 300 - 1) // 2, recompute=True)


def test_a_person_decides_over_both() -> None:
    assert _choose(usable=10**9, longest=10, grad_checkpoint="on").recompute
    assert _choose(usable=0, longest=10, grad_checkpoint="off") == Choice(1, recompute=False)
    assert _choose(usable=10**9, longest=10, tokens=77) == Choice(77, recompute=False)
    # What was asked for is what must fit.
    assert _choose(usable=1000 + 10 * 300, longest=10, tokens=301) == Choice(301, recompute=True)


def test_without_room_a_row_at_a_time_is_tried() -> None:
    assert _choose(usable=0, longest=500) == Choice(1, recompute=True)


@pytest.mark.parametrize(
    ("device", "active", "usable"),
    [
        ({"max_recommended_working_set_size": 10 * GIB, "total_memory": 99 * GIB}, 0, 9 * GIB),
        ({"max_recommended_working_set_size": 10 * GIB}, 2 * GIB, 7 * GIB),
        ({"total_memory": 80 * GIB}, 2 * GIB, 38 * GIB),
        ({}, 2 * GIB, 6 * GIB),
        ({"device_name": "cpu", "total_memory": "unknown"}, 2 * GIB, 6 * GIB),
        ({}, 90 * GIB, 0),
    ],
)
def test_a_device_says_what_may_be_taken(device: dict[str, object], active: int, usable: int) -> None:
    assert usable_bytes(device, system=16 * GIB, active=active) == usable


def test_this_machine_has_memory() -> None:
    assert 2**26 < ThisMachine().usable_bytes() < 2**50


def test_what_is_trained_and_how_precisely_decides_the_footprint(make_base: Callable[..., Path]) -> None:
    base = make_base("llama", num_hidden_layers=6)
    full, half = (SplitModel(load_model(str(base), dtype).model) for dtype in ("float32", "bfloat16"))
    assert Footprint.of(full, 2000).fixed - Footprint.of(full, 1000).fixed == 1000 * 24
    assert Footprint.of(full, 1).per_token == pytest.approx(2 * Footprint.of(half, 1).per_token, rel=0.01)
    assert Footprint.of(full, 1).per_token_recomputed < Footprint.of(full, 1).per_token


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_tokens_footprint_is_within_a_factor_of_two_of_what_is_measured(
    family: str, recompute: bool, make_base: Callable[..., Path]
) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "head_dim": 32}
    split = SplitModel(load_model(str(make_base(family, **shape)), "float32").model)
    method = make_method(TrainConfig(data="-", rank=2))
    parameters = method.attach(split.model, seed=0)
    learner = Learner(split, method, vocabulary=264, recompute=recompute)
    width = 32
    token_ids = np.arange(width + 1, dtype=np.int32)
    weights = np.eye(1, width + 1, width, dtype=np.float32)[0]

    def peak(rows: int) -> int:
        micro_batches = [MicroBatch((0,) * rows, width)]
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(learner.gradient(parameters, [Example("row", token_ids, weights)], micro_batches))
        return mx.get_peak_memory()

    measured = (peak(12) - peak(4)) / (8 * width)
    footprint = Footprint.of(split, trainable=1)
    expected = footprint.per_token_recomputed if recompute else footprint.per_token
    assert expected / 2 < measured < expected * 2
