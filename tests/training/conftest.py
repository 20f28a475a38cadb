"""A run of ten steps, its twin, and what the twin's script makes of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, export_twin, train
from tests.chats import write_chats
from tests.twins import STEPS, Pair, carry_out


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory, make_base: Callable[..., Path]) -> Pair:
    """Ten steps over four epochs of eleven rows, the last of each smaller, each step in several micro-batches."""
    folder = tmp_path_factory.mktemp("pair")
    settings: dict[str, Any] = {
        "data": str(write_chats(folder / "chats.jsonl", 11, seed=6, turns=2)),
        "model": str(make_base("qwen3", tied=True)),
        "dtype": "float32",
        "rank": 4,
        "alpha": 8.0,
        "max_steps": STEPS,
        "batch_size": 4,
        "micro_batch_tokens": 200,
        "grad_checkpoint": "off",
        "lr": 5e-3,
        "warmup": 0.2,
        "weight_decay": 0.1,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "max_grad_norm": 0.5,
        "seed": 3,
        "save_every": 2,
        "keep": 9,
        "quiet": True,
    }
    run = train(TrainConfig(**settings, out=str(folder / "run"))).run_dir
    return Pair(run, export_twin(run, folder / "twin"), settings)


@pytest.fixture(scope="session")
def trained(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twin after all steps."""
    pytest.importorskip("trl")
    return carry_out(pair.twin, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def half_trained(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twin after half of them."""
    pytest.importorskip("trl")
    return carry_out(pair.twin, tmp_path_factory.mktemp("half"), "--steps", str(STEPS // 2))


@pytest.fixture
def half(half_trained: Path, tmp_path: Path) -> Path:
    """A copy of that, to do something to."""
    return shutil.copytree(half_trained, tmp_path / "half")
