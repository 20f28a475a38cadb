"""A run's settings in TRL's words: arguments of `SFTConfig` or `DPOConfig` with which its steps are ours."""

from __future__ import annotations

import math
from typing import Any

from mlx_sft.config import TrainConfig
from mlx_sft.objectives.dpo import DPOSettings
from mlx_sft.optimizers.adamw import AdamWSettings

_SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def sft_arguments(config: TrainConfig, *, total_steps: int, longest: int) -> dict[str, Any]:
    """Arguments of `SFTConfig` for rows that come in order, `batch_size` a step.

    Args:
        config: Of a run, so that nothing in it is left to be chosen.
        total_steps: Optimizer steps.
        longest: Tokens of the longest row.
    """
    at_once = rows_at_once(config.batch_size, longest, config.micro_batch_tokens or 0)
    return _arguments(config, total_steps) | {
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": config.batch_size // at_once,
        "neftune_noise_alpha": config.neftune_alpha or None,
        # The rows are tokenized, cut and in order.
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "train_sampling_strategy": "sequential",
    }


def dpo_arguments(config: TrainConfig, *, total_steps: int, longest: int) -> dict[str, Any]:
    """Arguments of `DPOConfig` for pairs that come in steps of their own, each computed at once."""
    settings = config.settings(DPOSettings)
    both = {"loss_type": [settings.dpo_loss, "sft"], "loss_weights": [1.0, settings.sft_weight]}
    return _arguments(config, total_steps) | {
        "per_device_train_batch_size": config.batch_size,
        **(both if settings.sft_weight else {"loss_type": [settings.dpo_loss]}),
        "beta": settings.dpo_beta,
        "label_smoothing": settings.label_smoothing,
        "disable_dropout": False,  # the script has switched off what the run does not drop
        "remove_unused_columns": False,
    }


def _arguments(config: TrainConfig, total_steps: int) -> dict[str, Any]:
    """What both have in common."""
    adamw = config.settings(AdamWSettings)
    return {
        "max_steps": total_steps,
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
        "seed": config.seed,
        "max_length": None,
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
