"""PiSSA and OLoRA start as PEFT starts them, on a base that stays as it is; LoRA+ has the rates of PEFT's optimizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from safetensors.numpy import load_file

from mlx_sft import export, load_run, train
from mlx_sft.config import TrainConfig
from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Example
from mlx_sft.errors import UserError
from mlx_sft.load import load_adapter
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.methods.peft_files import our_name
from mlx_sft.model.load import load_model
from tests.parity import assert_close, loss_and_gradients, losses_of_steps

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
]

STARTS = ["pissa", "olora"]
ROWS = [
    {"input_ids": list(range(9, 9 + length)), "labels": [-100] * 2 + list(range(11, 9 + length))}
    for length in (7, 12, 5, 9)
]


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    return {
        "rank": 4, "alpha": 6, "target": "all-linear", "dtype": "float32", "batch_size": 4, "lr": 3e-3, "scheduler": "constant",
        "warmup": 0, "max_steps": 10, "weight_decay": 0.1, "max_grad_norm": 1.0, "out": str(tmp_path / "run"),
    }  # fmt: skip


def _losses(run_dir: Path) -> list[float]:
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


def _loss(model: torch.nn.Module) -> torch.Tensor:
    pad = torch.nn.utils.rnn.pad_sequence
    ids, labels = ([torch.tensor(row[key]) for row in ROWS] for key in ("input_ids", "labels"))
    mask = pad([torch.ones(len(row), dtype=torch.long) for row in ids], batch_first=True)
    padded = pad(labels, batch_first=True, padding_value=-100)
    return model(input_ids=pad(ids, batch_first=True), attention_mask=mask, labels=padded).loss


def _theirs(model: torch.nn.Module, **settings: Any) -> torch.nn.Module:
    config = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**config | settings))


def _examples() -> Examples:
    masks = [np.array([label != -100 for label in row["labels"]], np.float32) for row in ROWS]
    ids = [np.array(row["input_ids"], np.int32) for row in ROWS]
    return Examples.of(Example(f"row {n}", row, mask) for n, (row, mask) in enumerate(zip(ids, masks, strict=True)))


@pytest.mark.parametrize(
    ("family", "start", "settings", "peft_settings"),
    [
        ("qwen3", "pissa", {}, {}),
        ("qwen3", "olora", {}, {}),
        ("llama", "pissa", {"rslora": True}, {"use_rslora": True}),
        ("llama", "olora", {"dora": True}, {"use_dora": True}),
        ("gemma3_text", "pissa", {"dora": True}, {"use_dora": True}),
        ("gemma3_text", "olora", {}, {}),
    ],
)
def test_a_run_is_that_of_peft_and_opens_there_on_the_base_as_it_is(
    family: str, start: str, settings: dict[str, Any], peft_settings: dict[str, Any], given: dict[str, Any],
    make_base: Callable[..., Path], torch_model: Callable, torch_logits: Callable, mlx_logits: Callable, token_ids: list,
    tmp_path: Path,
) -> None:  # fmt: skip
    base = make_base(family, tied=family.startswith("gemma"))
    theirs = _theirs(torch_model(base), init_lora_weights=start, **peft_settings)
    expected = losses_of_steps(theirs, lambda: _loss(theirs), 10, lr=3e-3)
    run = train(TrainConfig(**given | settings | {"model": str(base), "init": start}), data=ROWS)
    np.testing.assert_allclose(_losses(run.run_dir), expected, atol=1e-4)
    assert expected[-1] < expected[0] - 0.1
    export(run.run_dir, tmp_path / "peft", format="peft")
    ours = mlx_logits(load_run(run.run_dir).model, token_ids)
    opened = peft.PeftModel.from_pretrained(torch_model(base), tmp_path / "peft").eval()
    assert_close(ours, torch.tensor(torch_logits(opened, token_ids)))
    assert_close(ours, torch.tensor(torch_logits(theirs.eval(), token_ids)), 1e-3)
    merged = load_model(str(export(run.run_dir, tmp_path / "merged").path), "float32")
    assert_close(mlx_logits(merged.model, token_ids), torch.tensor(np.array(ours)))
