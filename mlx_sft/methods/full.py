"""Full fine-tuning: every floating weight, embeddings and head included.

The parameters are float32 masters; the model computes with them in its own precision. Knows nothing of files.
"""

from __future__ import annotations

from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_sft.config import TrainConfig
from mlx_sft.model.head import floating_weights


class Full:
    """The method `full`. Parameters: every floating weight under its MLX name, such as `model.norm.weight`."""

    name: ClassVar = "full"

    def __init__(self) -> None:
        self._dtypes: dict[str, mx.Dtype] = {}

    @classmethod
    def from_config(cls, config: TrainConfig) -> Full:
        return cls()

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

    def changed_shapes(self, parameters: dict[str, mx.array]) -> dict[str, tuple[int, ...]]:
        return {name: value.shape for name, value in parameters.items()}

    def changed_weight(self, name: str, weight: mx.array, parameters: dict[str, mx.array]) -> mx.array:
        return parameters[name]
