"""Full fine-tuning: every floating weight, embeddings and head included.

The parameters are float32 masters; the model computes with them in its own precision. Knows nothing of files.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_sft.model.head import floating_weights


class Full:
    """The method `full`. Parameters: every floating weight under its MLX name, such as `model.norm.weight`."""

    def __init__(self) -> None:
        self._dtypes: dict[str, mx.Dtype] = {}

    def attach(self, model: nn.Module, seed: int) -> dict[str, mx.array]:
        """Return float32 masters of the weights; nothing here is random."""
        model.unfreeze()
        weights = floating_weights(model)
        self._dtypes = {name: weight.dtype for name, weight in weights.items()}
        return {name: weight.astype(mx.float32) for name, weight in weights.items()}

    def bind(self, model: nn.Module, parameters: dict[str, mx.array], key: mx.array | None = None) -> None:
        cast = [(name, value.astype(self._dtypes[name])) for name, value in parameters.items()]
        model.update(tree_unflatten(cast))

    def decayed(self, name: str) -> bool:
        """As transformers' Trainer: weight decay for matrices, not for norms and biases."""
        return not (name.endswith(".bias") or "norm" in name.lower())
