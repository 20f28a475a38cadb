"""A run of ten steps, its TRL export, and what the script in it makes of it on the CPU. `conftest.py` has its fixtures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, export, train
from tests.chats import write_chats

STEPS = 10


@dataclass(frozen=True)
class Pair:
    """A finished run and its TRL export, which nobody has trained."""

    run: Path
    exported: Path
    settings: dict[str, Any]


def export_trl(run: str | Path, to: str | Path, **options: Any) -> Path:
    """The folder of a run's TRL export."""
    return export(run, to, format="trl", **options).path


def carry_out(exported: Path, folder: Path, *options: str) -> Path:
    """A copy of a TRL export in a folder, after its script."""
    copy = shutil.copytree(exported, folder / "trl")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    ended = subprocess.run(
        [sys.executable, "train.py", *options], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == str(copy / "adapter")
    return copy


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
    return Pair(run, export_trl(run, folder / "trl"), settings)


@pytest.fixture(scope="session")
def trained(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TRL export after all steps."""
    pytest.importorskip("trl")
    return carry_out(pair.exported, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def half_trained(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The TRL export after half of them."""
    pytest.importorskip("trl")
    return carry_out(pair.exported, tmp_path_factory.mktemp("half"), "--steps", str(STEPS // 2))


@pytest.fixture
def half(half_trained: Path, tmp_path: Path) -> Path:
    """A copy of that, to do something to."""
    return shutil.copytree(half_trained, tmp_path / "half")
