"""A preference run is the one that TRL's `DPOTrainer` makes with PEFT: losses, rewards, gradient norms and adapters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from mlx_sft import train
from mlx_sft.config import TrainConfig
from mlx_sft.methods.lora import LoraSettings
from mlx_sft.methods.peft_files import our_name, write_adapter
from tests.preferences import as_trl_texts, preferences

datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

STEPS, FEW_STEPS = 10, 4
ROWS = preferences(6)
AS_IN_TRL = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def _theirs(
    base: Path, start: Path, folder: Path, tokenizer: Any, steps: int, **settings: Any
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """TRL's records of all steps, and the adapter that it ends with, by our names."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = trl.DPOTrainer(
        model=peft.PeftModel.from_pretrained(model, start, is_trainable=True),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(as_trl_texts(ROWS)),
        args=trl.DPOConfig(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=len(ROWS),
            learning_rate=5e-3,
            lr_scheduler_type="linear",
            warmup_steps=2,
            max_grad_norm=1.0,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        ),
    )
    trainer.train()
    adapter = {
        our_name(name.replace(".default", "")): value.detach().numpy()
        for name, value in trainer.model.named_parameters()
        if ".default" in name
    }
    return [record for record in trainer.state.log_history if "loss" in record], adapter


@pytest.mark.parametrize(
    ("family", "from_sft", "ours", "theirs"),
    [
        ("qwen3", True, {}, {}),
        ("qwen3", False, {"dpo_beta": 0.5}, {"beta": 0.5}),
        (
            "llama",
            True,
            {"dpo_beta": 0.3, "sft_weight": 0.2},
            {"beta": 0.3, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
        ),
        ("qwen3", True, {"dpo_loss": "hinge"}, {"loss_type": ["hinge"]}),
        ("qwen3", True, {"dpo_loss": "ipo"}, {"loss_type": ["ipo"]}),
        (
            "qwen3",
            True,
            {"dpo_loss": "robust", "label_smoothing": 0.1},
            {"loss_type": ["robust"], "label_smoothing": 0.1},
        ),
        ("qwen3", True, {"dpo_loss": "sigmoid_norm"}, {"loss_type": ["sigmoid_norm"]}),
        ("qwen3", True, {"dpo_loss": "apo_zero"}, {"loss_type": ["apo_zero"]}),
        ("qwen3", True, {"dpo_loss": "apo_down"}, {"loss_type": ["apo_down"]}),
    ],
)
def test_a_run_is_trls(
    family: str,
    from_sft: bool,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    make_base: Callable[..., Path],
    make_adapter: Callable[..., dict[str, mx.array]],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    steps = FEW_STEPS if "dpo_loss" in ours else STEPS
    base, start, shape = make_base(family), tmp_path / "start", LoraSettings(rank=4, alpha=8.0)
    parameters = make_adapter(base, shape)
    if not from_sft:
        parameters = {name: mx.zeros_like(value) if "lora_B" in name else value for name, value in parameters.items()}
    write_adapter(start, shape, parameters, str(base))
    config = TrainConfig(
        model=str(base), init_adapter=str(start), objective="dpo", out=str(tmp_path / "run"), dtype="float32", batch_size=len(ROWS),
        micro_batch_tokens=150, max_steps=steps, lr=5e-3, scheduler="linear",
        warmup=2 / steps, max_grad_norm=1.0, weight_decay=0.0, shuffle=False, quiet=True,
        **ours,
    )  # fmt: skip
    result = train(config, data=ROWS)
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    expected, adapter = _theirs(base, start, tmp_path / "trl", tokenizer, steps, **theirs)
    assert len(records) == len(expected) == steps
    assert all(record["micro_batches"] > 1 for record in records), "nothing was cut"
    for record, their in zip(records, expected, strict=True):
        for name in ("loss", "grad_norm", *AS_IN_TRL):
            assert record[name] == pytest.approx(their[name], rel=1e-4, abs=2e-5), (record["step"], name)
    assert records[-1]["rewards/margins"] > records[0]["rewards/margins"] + 0.01
    ended = {our_name(name): value for name, value in _adapter(result.run_dir).items()}
    assert ended.keys() == adapter.keys()
    for name, value in ended.items():
        moved = np.linalg.norm(value - np.array(parameters[name]))
        assert np.linalg.norm(value - adapter[name]) < 1e-4 * moved, name


def _adapter(run: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return load_file(run / "adapter" / "adapter_model.safetensors")
