"""The steps of a run, and the learning rate of each."""

from __future__ import annotations

import math

import numpy as np

from mlx_sft.config import TrainConfig
from mlx_sft.data.prepare import PreparedData
from mlx_sft.data.steps import Plan, Portion
from mlx_sft.registry import OBJECTIVES

_ROWS_SEEN, _MOST_EPOCHS = 300, 10
"""What `epochs: auto` stands for: docs/decisions.md has what was measured."""


def epochs_of(config: TrainConfig, data: PreparedData) -> int:
    """The number of passes over this data, for which the configuration may say `auto`."""
    if config.epochs != "auto":
        return config.epochs
    rows = max(1, len(np.unique(data.train.rows)))
    return min(_MOST_EPOCHS, max(1, _ROWS_SEEN // rows))


def planned_steps(config: TrainConfig, data: PreparedData) -> Plan:
    """The steps of a run on this data."""
    together: list[list[int]] | None = None
    counts = [examples for examples, _ in data.mixture]
    if OBJECTIVES[config.objective].compares:
        together = data.train.by_row()
        of_source = np.searchsorted(np.cumsum(counts), [examples[0] for examples in together], side="right")
        counts = np.bincount(of_source, minlength=len(counts)).tolist()
    elif data.train.own < len(data.train):
        together = [[row, data.train.own + row] for row in range(data.train.own)]
    weights = [weight for _, weight in data.mixture]
    return Plan(
        sum(counts),
        batch_size=config.batch_size,
        epochs=epochs_of(config, data),
        max_steps=config.max_steps,
        seed=config.seed,
        shuffle=config.shuffle,
        mixture=[Portion(rows, weight) for rows, weight in zip(counts, weights, strict=True) if weight is not None],
        together=together,
    )


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of a step (from 1), as transformers' `get_*_schedule_with_warmup`, whose steps count from 0."""
    done = step - 1
    warmup_steps = math.ceil(total_steps * config.warmup)
    if done < warmup_steps:
        return config.lr * done / warmup_steps
    if config.scheduler == "constant":
        return config.lr
    progress = (done - warmup_steps) / max(1, total_steps - warmup_steps)
    if config.scheduler == "linear":
        return config.lr * max(0.0, 1.0 - progress)
    return config.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
