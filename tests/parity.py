"""How what is computed here is compared with what PyTorch computes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlx_sft.data.batches import PADDED, Layout, collate, cut
from mlx_sft.data.dataset import Examples
from mlx_sft.methods import Method, Parameters
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.training.recompute import Mode
from mlx_sft.training.shapes import padded_shape
from mlx_sft.training.step import GradientComputer

TRL_ON_A_CPU = {
    "max_grad_norm": 1.0,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
}
"""Arguments of TRL's configurations, for steps that are looked at one by one."""


def assert_close(ours: object, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    """The largest difference is small against the largest value."""
    expected = theirs.detach().numpy()
    np.testing.assert_allclose(np.array(ours), expected, rtol=0, atol=tolerance * np.abs(expected).max())


def loss_and_gradients(
    base: Path,
    method: Method,
    parameters: Parameters | None,
    examples: Examples,
    *,
    mode: Mode = "off",
    compiled: bool = False,
    token_budget: int = 40,
    layout: Layout = PADDED,
) -> Any:
    """By the code that training runs, in several micro-batches."""
    split = SplitModel(load_model(str(base), "float32").model)
    start = method.attach(split.model, seed=0)
    micro_batches = cut(range(len(examples)), examples.needed_lengths, token_budget, layout)
    assert len(micro_batches) > 1 or token_budget > 40
    batches = [collate(examples, micro_batch) for micro_batch in micro_batches]
    shapes = [padded_shape(batch) for batch in batches] if compiled else []
    computer = GradientComputer(split, method, 264, recompute=mode, compiled=shapes)
    return computer.gradient(parameters or start, batches)[:2]


def losses_of_steps(
    model: torch.nn.Module,
    loss_of: Callable[[], torch.Tensor],
    steps: int,
    *,
    lr: float,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """The loss before each of so many full-batch steps of PyTorch's AdamW, with a decay of 0.1 but of biases, or of another optimizer.

    Gradients are clipped at 1.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    trainable = list(named.values())
    biases = [parameter for name, parameter in named.items() if "bias" in name]
    others = [parameter for name, parameter in named.items() if "bias" not in name]
    groups = [{"params": others}, {"params": biases, "weight_decay": 0.0}]
    optimizer = optimizer or torch.optim.AdamW(groups, lr=lr, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def loss_of_rows(model: torch.nn.Module, rows: Sequence[dict[str, list[int]]]) -> torch.Tensor:
    """The loss of rows of `input_ids` and `labels`, padded on the right, as transformers computes it."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = [torch.tensor(row["input_ids"]) for row in rows]
    labels = [torch.tensor(row["labels"]) for row in rows]
    mask = pad([torch.ones(len(row), dtype=torch.long) for row in ids], batch_first=True)
    return model(
        input_ids=pad(ids, batch_first=True),
        attention_mask=mask,
        labels=pad(labels, batch_first=True, padding_value=-100),
    ).loss


def losses_of_run(run_dir: Path) -> list[float]:
    """What a run wrote of each step."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


def told_by_peft(model: torch.nn.Module, tokenizer: Any, asked: list[int], most: int) -> str:
    """What PEFT generates greedily, without its cache, with which tokens from the third on are others than its own logits say."""
    ids = torch.tensor([asked])
    told = model.generate(input_ids=ids, max_new_tokens=most, do_sample=False, eos_token_id=[257], use_cache=False)
    return tokenizer.decode(told[0, len(asked) :], skip_special_tokens=True)
