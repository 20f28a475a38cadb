"""How what is computed here is compared with what PyTorch computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlx_sft.data.batches import collate, cut
from mlx_sft.data.dataset import Examples
from mlx_sft.methods import Method, Parameters
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.training.recompute import Mode
from mlx_sft.training.shapes import padded_shape
from mlx_sft.training.step import GradientComputer


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
) -> Any:
    """By the code that training runs, in several micro-batches."""
    split = SplitModel(load_model(str(base), "float32").model)
    start = method.attach(split.model, seed=0)
    micro_batches = cut(range(len(examples)), examples.needed_lengths, token_budget=token_budget)
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
    """The loss before each of so many full-batch steps, of PyTorch's AdamW with a decay of 0.1 or another; gradients are clipped at 1."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trainable, lr=lr, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses
