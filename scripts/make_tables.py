"""Write the tables of docs/ that the code decides: what fits on which Mac, and what settings of other trainers are called here.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `--check` writes nothing and fails where one on disk is not what the
code says. The sizes of the models are those of the configurations that Qwen has published; no file of a model is needed.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_sft.common_settings import option_name
from mlx_sft.config import TrainConfig
from mlx_sft.other_names import OTHER_NAMES, suggestion
from mlx_sft.training.fitting import QWEN3, qwen3_config
from mlx_sft.training.plan import NO_DATA, RunPlan

DOCS = Path(__file__).parents[1] / "docs"
TABLE = re.compile(r"(<!-- table: ([a-z-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

# --- what fits ---------------------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, `--quantize 4`": {"quantize": "4"},
    "full, light": {
        "method": "full",
        "optimizer": "adamw8bit",
        "master_dtype": "bfloat16",
        "batch_size": 1,
    },
}
MEMORIES = (8, 16, 32, 64)
LONG = 32_768
"""Rows that are longer are not told apart."""


def what_fits() -> str:
    """For each model, way of training and Mac, the longest row that fits."""
    head = ["model", "way", *(f"{memory} GB" for memory in MEMORIES)]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * len(MEMORIES)]
    with tempfile.TemporaryDirectory() as folder:
        for name in QWEN3:
            model = f"Qwen3-{name}"
            path = Path(folder, model)
            path.mkdir()
            (path / "config.json").write_text(json.dumps(qwen3_config(name)))
            for way, settings in WAYS.items():
                config = TrainConfig(model=str(path), data=[NO_DATA], max_length=1024, dtype="bfloat16", **settings)
                longest = {
                    fits["gigabytes"]: max(fits["longest_row"].values())
                    for fits in RunPlan(config, "16GB").common_macs()
                }
                if any(longest[memory] for memory in MEMORIES):
                    cells = [model, way, *(_tokens(longest[memory]) for memory in MEMORIES)]
                    lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _tokens(longest: int) -> str:
    """Rounded down, since a few tokens decide nothing; nothing below 128, which no chat needs."""
    if longest >= LONG:
        return "any"
    return f"{longest // 100 * 100:,}" if longest >= 128 else "no"


# --- other trainers -----------------------------------------------------------------------------------------------------------

TRAINERS = {
    "mlx-lm": "adapter_path fine_tune_type grad_accumulation_steps iters learning_rate lora_parameters mask_prompt max_seq_length "
    "num_layers resume_adapter_file steps_per_eval steps_per_report train",
    "TRL": "assistant_only_loss bf16 dataset_name eval_dataset eval_steps fp16 gradient_accumulation_steps gradient_checkpointing "
    "learning_rate logging_steps lora_alpha lora_dropout lora_r lora_target_modules lr_scheduler_type model_name_or_path "
    "neftune_noise_alpha num_train_epochs optim output_dir per_device_train_batch_size resume_from_checkpoint save_steps "
    "save_total_limit use_dora use_rslora warmup_ratio warmup_steps",
    "Unsloth": "bf16 fp16 gradient_accumulation_steps learning_rate load_in_4bit load_in_8bit lora_alpha lora_dropout "
    "lr_scheduler_type max_seq_length model_name num_train_epochs optim output_dir per_device_train_batch_size r target_modules "
    "use_rslora warmup_steps",
    "axolotl": "base_model bf16 datasets early_stopping_patience eval_steps fp16 gradient_accumulation_steps gradient_checkpointing "
    "learning_rate load_in_4bit load_in_8bit logging_steps lora_alpha lora_dropout lora_r lora_target_modules lr_scheduler "
    "micro_batch_size num_epochs optim output_dir resume_from_checkpoint save_steps save_total_limit sequence_len train_on_inputs "
    "val_set_size warmup_ratio warmup_steps",
}
"""Which of the names that are understood are whose; `other` names are some further trainer's, or an older version's."""


def names_of(trainer: str) -> Callable[[], str]:
    """The table of one trainer; of those names that belong to none of them for `other`."""
    known = {name for names in TRAINERS.values() for name in names.split()}
    names = TRAINERS[trainer].split() if trainer in TRAINERS else sorted(set(OTHER_NAMES) - known)

    def table() -> str:
        lines = ["| there | here |", "|---|---|"]
        for name in sorted(names):
            text = suggestion(name, option_name)
            assert text, f"{name} is not among OTHER_NAMES"
            text = text.replace("`mlx-sft train`", "mlx-sft train").replace("|", "\\|")
            text = re.sub(
                r"--[a-z][a-z-]*(?: (?:lora|full|on|bfloat16|float16|hf:owner/name|last:16|4|8)\b)?", r"`\g<0>`", text
            )
            lines.append(f"| `{name}` | {text.removeprefix('write ')} |")
        return "\n".join(lines) + "\n"

    return table


# --- the pages ------------------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], str]] = {
    "what-fits": what_fits,
    **{f"names-{trainer.lower()}": names_of(trainer) for trainer in (*TRAINERS, "other")},
}


def written(text: str) -> str:
    """A page with each table as the code says it is."""
    return TABLE.sub(lambda found: found[1] + "\n" + TABLES[found[2]]() + "\n" + found[4], text)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the tables of docs/ that the code decides.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a table is stale")
    check = parser.parse_args().check
    stale = False
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        now = written(text)
        if now == text:
            continue
        stale = True
        if check:
            print(f"docs/{page.relative_to(DOCS)} has a table that is not what the code says", file=sys.stderr)
        else:
            page.write_text(now, encoding="utf-8", newline="\n")
    if check and stale:
        print("hint: make docs", file=sys.stderr)
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
