"""What settings are called in other trainers (TRL and transformers, mlx-lm, Unsloth, axolotl), and what does the same here.

They are understood as suggestions alone: some count in other units, so that a value taken over unseen would be another one.
"""

from __future__ import annotations

from collections.abc import Callable
from string import Formatter

_BATCH = "{batch_size} is the conversations of an optimizer step; memory decides the micro-batches"
_ANSWERS = "leave it out: only the assistant's turns are supervised; see {train_on}"

OTHER_NAMES = {
    "adapter_path": "write {out}",
    "assistant_only_loss": _ANSWERS,
    "base_model": "write {model}",
    "batch": "write {batch_size}",
    "bf16": "write {dtype} bfloat16",
    "cutoff_len": "write {max_length}",
    "dataset": "write {data}",
    "dataset_name": "write {data} hf:owner/name",
    "datasets": "write {data}",
    "early_stopping_patience": "write {early_stop}",
    "eval_dataset": "write {valid}",
    "eval_steps": "write {eval_every}",
    "fine_tune_type": "write {method} lora or {method} full; for DoRA {dora}",
    "fp16": "write {dtype} float16",
    "grad_accumulation_steps": _BATCH,
    "gradient_accumulation_steps": _BATCH,
    "gradient_checkpointing": "write {grad_checkpoint} on",
    "iters": "write {max_steps}, which counts optimizer steps, or {epochs}",
    "learning_rate": "write {lr}",
    "load_in_4bit": "write {quantize} 4",
    "load_in_8bit": "write {quantize} 8",
    "logging_steps": "leave it out: every step is in metrics.jsonl",
    "lora_alpha": "write {alpha}",
    "lora_dropout": "write {dropout}",
    "lora_parameters": "write {rank}, {alpha} (mlx-lm's scale times the rank) and {dropout} by themselves",
    "lora_r": "write {rank}",
    "lora_rank": "write {rank}",
    "lora_target_modules": "write {target}",
    "lr_scheduler": "write {scheduler}",
    "lr_scheduler_type": "write {scheduler}",
    "mask_prompt": _ANSWERS,
    "max_seq_len": "write {max_length}",
    "max_seq_length": "write {max_length}",
    "micro_batch_size": _BATCH,
    "model_name": "write {model}",
    "model_name_or_path": "write {model}",
    "neftune_noise_alpha": "write {neftune_alpha}",
    "num_epochs": "write {epochs}",
    "num_layers": "write {layers} last:16 for the last 16",
    "num_train_epochs": "write {epochs}",
    "optim": "write {optimizer}",
    "output_dir": "write {out}",
    "per_device_train_batch_size": _BATCH,
    "r": "write {rank}",
    "resume_adapter_file": "write {resume} with the run folder, or {init_adapter} with an adapter folder",
    "resume_from_checkpoint": "write {resume} with the run folder",
    "save_steps": "write {save_every}",
    "save_total_limit": "write {keep}",
    "sequence_len": "write {max_length}",
    "steps": "write {max_steps}, which counts optimizer steps, or {epochs}",
    "steps_per_eval": "write {eval_every}",
    "steps_per_report": "leave it out: every step is in metrics.jsonl",
    "target_modules": "write {target}",
    "train": "leave it out: `mlx-sft train` trains",
    "train_on_inputs": _ANSWERS,
    "use_dora": "write {dora}",
    "use_rslora": "write {rslora}",
    "val_set_size": "write {valid_fraction}",
    "warmup_ratio": "write {warmup}",
    "warmup_steps": "write {warmup}, which is a share of the steps",
}
"""What to do instead, with the names of settings in braces."""


def suggestion(name: str, written: Callable[[str], str | None]) -> str:
    """What to do instead of a setting that has this name in another trainer; an empty string where none is known.

    Args:
        name: As it was given: `learning_rate`, `--learning-rate`.
        written: How a setting is written where this name stood; None where there is no such setting.
    """
    text = OTHER_NAMES.get(name.lstrip("-").replace("-", "_").lower(), "")
    names = {field: written(field) for _, field, _, _ in Formatter().parse(text) if field}
    return text.format_map(names) if None not in names.values() else ""
