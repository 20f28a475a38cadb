"""What is trained. A method attaches to a frozen model, hands out its parameters by name, and binds them for a forward pass.

A further method is one more module here and one more line in `make_method`.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.config import TrainConfig
from mlx_sft.methods.full import Full
from mlx_sft.methods.lora import Lora, LoraSettings

Parameters = dict[str, mx.array]
"""Trainable float32 arrays by name, flat."""


class Binder(Protocol):
    """What a forward pass needs to know of a method."""

    def bind(self, model: nn.Module, parameters: Parameters, key: mx.array | None = None) -> None:
        """Put parameters (all, or some of them) into the model; a random key switches dropout on."""


class Method(Binder, Protocol):
    """What training needs to know of a method."""

    def attach(self, model: nn.Module, seed: int) -> Parameters:
        """Prepare the model and return the parameters as training starts with them."""

    def decayed(self, name: str) -> bool:
        """Whether weight decay applies to this parameter."""


def make_method(config: TrainConfig) -> Lora | Full:
    """The method that a configuration asks for."""
    if config.method == "full":
        return Full()
    return Lora(LoraSettings.from_config(config))


__all__ = ["Binder", "Full", "Lora", "LoraSettings", "Method", "Parameters", "make_method"]
