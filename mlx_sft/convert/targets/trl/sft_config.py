"""A run's settings in TRL's words: arguments of `SFTConfig` with which its steps are ours."""

from __future__ import annotations

import math
from typing import Any

from mlx_sft.config import TrainConfig
from mlx_sft.optimizers.adamw import AdamWSettings

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def sft_arguments(config: TrainConfig, *, total_steps: int, longest: int) -> dict[str, Any]:
    """Arguments of `SFTConfig` for rows that come in order, `batch_size` a step.

    Args:
        config: Of a run, so that nothing in it is left to be chosen.
        total_steps: Optimizer steps.
        longest: Tokens of the longest row.
    """
    adamw = config.settings(AdamWSettings)
    at_once = rows_at_once(config.batch_size, longest, config.micro_batch_tokens or 0)
    return {
        "max_steps": total_steps,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": config.batch_size // at_once,
        "activation_checkpointing": config.grad_checkpoint != "off",
        "optim": "adamw_torch",
        "learning_rate": config.lr,
        "lr_scheduler_type": _SCHEDULES[config.scheduler],
        "warmup_steps": math.ceil(total_steps * config.warmup),
        "adam_beta1": adamw.betas[0],
        "adam_beta2": adamw.betas[1],
        "adam_epsilon": adamw.eps,
        "weight_decay": adamw.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "neftune_noise_alpha": config.neftune_alpha or None,
        "seed": config.seed,
        # The rows are tokenized, cut and in order.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "train_sampling_strategy": "sequential",
        # The weights' own precision, and a loss of the labels alone.
        "bf16": False,
        "fp16": False,
        "router_aux_loss_coef": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }


def rows_at_once(batch_size: int, longest: int, tokens: int) -> int:
    """The largest share of a step, a divisor of its rows, of which so many tokens hold even the longest; at least a row."""
    divisors = (rows for rows in range(1, batch_size + 1) if batch_size % rows == 0)
    return max(rows for rows in divisors if rows == 1 or rows * longest <= tokens)
