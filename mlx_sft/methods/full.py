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
from mlx_sft.model.names import transformers_name


class Full:
    """The method `full`. Parameters: every floating weight under its name in transformers, such as `model.norm.weight`."""

    name: ClassVar = "full"

    def __init__(self) -> None:
        self._places: dict[str, tuple[str, mx.Dtype]] = {}

    @classmethod
    def from_config(cls, config: TrainConfig) -> Full:
        return cls()

    def attach(self, model: nn.Module, seed: int) -> dict[str, mx.array]:
        """Return float32 masters of the weights; nothing here is random."""
        model.unfreeze()
        weights = floating_weights(model)
        self._places = {transformers_name(path): (path, weight.dtype) for path, weight in weights.items()}
        return {transformers_name(path): weight.astype(mx.float32) for path, weight in weights.items()}

    def bind(self, model: nn.Module, parameters: dict[str, mx.array], key: mx.array | None = None) -> None:
        places = [(*self._places[name], value) for name, value in parameters.items()]
        model.update(tree_unflatten([(path, value.astype(dtype)) for path, dtype, value in places]))

    def decayed(self, name: str) -> bool:
        """As transformers' Trainer: weight decay for matrices, not for norms and biases."""
        return not (name.endswith(".bias") or "norm" in name.lower())

    def changed_shapes(self, parameters: dict[str, mx.array]) -> dict[str, tuple[int, ...]]:
        return {name: value.shape for name, value in parameters.items()}

    def changed_weight(self, name: str, weight: mx.array, parameters: dict[str, mx.array]) -> mx.array:
        return parameters[name]
