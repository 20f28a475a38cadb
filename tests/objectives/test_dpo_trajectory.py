"""A preference run is the one that TRL's `DPOTrainer` makes with PEFT: losses, rewards, gradient norms and adapters."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from mlx_sft import train
from mlx_sft.config import TrainConfig
from mlx_sft.data.batches import Batch
from mlx_sft.methods.lora import LoraSettings
from mlx_sft.methods.peft_files import our_name, write_adapter
from mlx_sft.objectives.dpo import DPO, LOSSES, DPOSettings
from tests.parity import TRL_ON_A_CPU
from tests.preferences import as_trl_texts, preferences

datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

STEPS = 10
ROWS = preferences(6)
SIDES = ("chosen", "rejected")
AS_IN_TRL = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def _theirs(
    base: Path, start: Path, folder: Path, tokenizer: Any, **settings: Any
) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """TRL's records of all steps, and the adapter that it ends with, by our names."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = trl.DPOTrainer(
        model=peft.PeftModel.from_pretrained(model, start, is_trainable=True),
        processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(as_trl_texts(ROWS)),
        args=trl.DPOConfig(
            output_dir=str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=len(ROWS),
            learning_rate=5e-3,
            lr_scheduler_type="linear",
            warmup_steps=2,
            **TRL_ON_A_CPU,
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
    base, start, shape = make_base(family), tmp_path / "start", LoraSettings(rank=4, alpha=8.0)
    parameters = make_adapter(base, shape)
    if not from_sft:
        parameters = {name: mx.zeros_like(value) if "lora_B" in name else value for name, value in parameters.items()}
    write_adapter(start, shape, parameters, str(base))
    config = TrainConfig(
        model=str(base), init_adapter=str(start), objective="dpo", out=str(tmp_path / "run"), dtype="float32", batch_size=len(ROWS),
        micro_batch_tokens=150, max_steps=STEPS, lr=5e-3, scheduler="linear",
        warmup=0.2, max_grad_norm=1.0, weight_decay=0.0, shuffle=False, quiet=True,
        **ours,
    )  # fmt: skip
    result = train(config, data=ROWS)
    records = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    expected, adapter = _theirs(base, start, tmp_path / "trl", tokenizer, **theirs)
    assert len(records) == len(expected) == STEPS
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


@pytest.mark.parametrize("sft_weight", [0.0, 0.4])
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.reference])
def test_weights_loss_and_metrics_of_a_step_are_trls(name: str, sft_weight: float) -> None:
    """Of log-probabilities at random, which TRL's own code is given as those of a model."""
    random, pairs, width = np.random.default_rng(3), 5, 9
    smoothing = 0.2 if name == "robust" else 0.0
    mask = np.arange(width) >= random.integers(1, 4, (2 * pairs, 1))
    mask &= np.arange(width) < random.integers(5, width + 1, (2 * pairs, 1))
    log_probs = torch.tensor(-random.exponential(2, (2 * pairs, width - 1)) * mask[:, 1:], requires_grad=True)
    reference = (log_probs.detach().numpy() + random.normal(0, 0.5, log_probs.shape) * mask[:, 1:]).sum(1)
    zeros, ids = torch.zeros_like(log_probs), torch.zeros(mask.shape, dtype=torch.long)
    outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    same = lambda value: value  # noqa: E731
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False, beta=0.3, label_smoothing=smoothing,
        loss_types=[name, "sft"], loss_weights=[1.0, sft_weight],
    )  # fmt: skip
    inputs = {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": torch.tensor(mask).long()}
    inputs |= {
        f"ref_{side}_logps": torch.tensor(part) for side, part in zip(SIDES, np.split(reference, 2), strict=True)
    }
    loss = trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    loss.backward()

    rows, columns = np.nonzero(mask[:, 1:])
    numbers = tuple(range(pairs))
    batch = Batch(
        ids.numpy().astype(np.int32), rows * width + columns, np.zeros(len(rows), np.int32), np.ones(len(rows), np.float32), 1, 1,
        examples=tuple(2 * i for i in numbers) + tuple(2 * i + 1 for i in numbers), data_rows=numbers * 2, reference=reference,
    )  # fmt: skip
    given = {"dpo_loss": name, "dpo_beta": 0.3, "label_smoothing": smoothing, "sft_weight": sft_weight}
    found = DPO(DPOSettings(**given)).weigh([batch], [log_probs.detach().numpy()[rows, columns]])
    assert found.loss == pytest.approx(loss.item(), rel=1e-6)
    gradient = log_probs.grad.numpy()[rows, columns]  # type: ignore[union-attr]
    np.testing.assert_allclose(-found.weights[0] / found.normalizer, gradient, rtol=1e-5, atol=1e-8)
    for metric in AS_IN_TRL:
        assert found.metrics[metric] == pytest.approx(trainer._metrics["train"][metric][0], rel=1e-6)
