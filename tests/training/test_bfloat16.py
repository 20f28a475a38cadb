"""bfloat16, as on a GPU: its error against float32 is not above PyTorch's own bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mlx_sft import TrainConfig, load_model
from mlx_sft.data.batches import MicroBatch, collate
from mlx_sft.data.dataset import Examples
from mlx_sft.methods import make_method
from mlx_sft.model.head import SplitModel
from mlx_sft.training.shapes import padded_shape
from mlx_sft.training.step import GradientComputer

Found = tuple[float, dict[str, np.ndarray]]
"""A loss and its gradients."""


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("compiled", [False, True])
def test_its_error_is_not_above_pytorchs(
    family: str,
    compiled: bool,
    make_base: Callable[..., Path],
    torch_loss: Callable[..., torch.Tensor],
    examples: Examples,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = make_base(family, num_hidden_layers=4)

    def theirs(dtype: torch.dtype) -> Found:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).to(dtype)  # both from the same weights
        loss = torch_loss(model, list(examples))
        loss.backward()
        return float(loss.detach()), {
            name: parameter.grad.float().numpy()
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    def ours() -> Found:
        loaded = load_model(str(base), "bfloat16")
        method = make_method(TrainConfig(data="-", model=str(base), method="full"))
        start = method.attach(loaded.model, 0)
        batch = collate(examples, MicroBatch(tuple(range(len(examples))), int(max(examples.needed_lengths))))
        shapes = [padded_shape(batch)] if compiled else []
        computer = GradientComputer(SplitModel(loaded.model), method, loaded.config["vocab_size"], compiled=shapes)
        found = computer.gradient(start, [batch])
        return float(found.loss.item()), {
            name: np.array(value.astype(mx.float32)) for name, value in found.gradients.items()
        }

    truth, reference = theirs(torch.float32), theirs(torch.bfloat16)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    found = ours()
    assert found[1].keys() == truth[1].keys()
    assert 0 < _apart(found[1], truth[1]) <= 1.1 * _apart(reference[1], truth[1])
    assert abs(found[0] - truth[0]) <= 1.1 * abs(reference[0] - truth[0])


def _apart(gradients: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> float:
    """The norm of the difference of all of them."""
    return float(np.sqrt(sum(np.square(gradients[name] - value).sum() for name, value in truth.items())))
