"""What is asked of a trainer, under the names of transformers' `TrainingArguments`, which TRL and Unsloth share. Knows no trainer."""

from __future__ import annotations

from typing import Any

from benchmarks.task import Task


def training_arguments(task: Task) -> dict[str, Any]:
    return {
        "per_device_train_batch_size": task.rows_at_once,
        "gradient_accumulation_steps": task.accumulation,
        "max_steps": task.steps,
        "learning_rate": task.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "gradient_checkpointing": task.grad_checkpoint,
        "logging_steps": 1,
        "seed": task.seed,
    }
