"""The model card of a run: what it is, what it was trained on, how it did. Knows nothing of how it was trained."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import yaml

from mlx_sft.config import TrainConfig
from mlx_sft.console import printable
from mlx_sft.data.report import DataReport
from mlx_sft.training.checkpoint import Progress


def model_card(config: TrainConfig, base: dict[str, Any], report: DataReport, progress: Progress) -> str:
    """The run's `README.md`, with the metadata that the Hub reads. It holds no row of the data."""
    metadata: dict[str, Any] = {
        "library_name": "peft" if config.method == "lora" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "sft", config.method],
    }
    name = Path(config.model).name if Path(config.model).is_absolute() else config.model
    if name == config.model:  # a path means nothing to others, and tells of the machine
        metadata["base_model"] = name
    method = "every weight"
    if config.method == "lora":
        target = config.target if isinstance(config.target, str) else ", ".join(config.target)
        method = f"LoRA, rank {config.rank}, alpha {config.alpha:g}, on {target}"
    validation = "none"
    if progress.best_loss is not None:
        validation = f"loss {progress.best_loss:.4f} at step {progress.best_step}, the best"
    facts = {
        "Base model": f"{name} ({base['model_type']})",
        "Method": method,
        "Steps": f"{progress.step} of {config.batch_size} conversations, learning rate {config.lr:g} "
        f"({config.scheduler}), seed {config.seed}",
        "Training rows": f"{report.train.rows:,}, {report.train.tokens:,} tokens, "
        f"{report.train.supervised_tokens:,} of them supervised",
        "Validation": validation,
    }
    table = "\n".join(f"| {fact} | {_cell(value)} |" for fact, value in facts.items())
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False)}---

# A fine-tuned {_cell(name)}

| | |
|---|---|
{table}

Made with mlx-sft; `config.yaml` repeats the run. For transformers, vLLM and others:

    mlx-sft export --run . --to merged
"""


def _cell(value: str) -> str:
    """A value as a table shows it: names may be anyone's."""
    return html.escape(" ".join(printable(value).split()), quote=False).replace("|", "\\|")
