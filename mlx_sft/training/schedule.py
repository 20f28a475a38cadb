"""The course of the learning rate."""

from __future__ import annotations

import math

from mlx_sft.config import TrainConfig


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
