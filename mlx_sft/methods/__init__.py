"""What is trained. A method attaches to a frozen model, hands out its parameters by name, and binds them for a forward pass.

A further method is one more module here and one more name in `METHODS`.
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
    """What training and conversion need to know of a method."""

    @property
    def name(self) -> str:
        """Its name in the configuration."""

    @classmethod
    def from_config(cls, config: TrainConfig) -> Method:
        """The method as a configuration shapes it."""

    def attach(self, model: nn.Module, seed: int) -> Parameters:
        """Prepare the model and return the parameters as training starts with them."""

    def decayed(self, name: str) -> bool:
        """Whether weight decay applies to this parameter."""

    def changed_shapes(self, parameters: Parameters) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight of the model that the parameters change."""

    def changed_weight(self, name: str, weight: mx.array, parameters: Parameters) -> mx.array:
        """What the parameters make of one of those weights; float32, not yet rounded."""


METHODS: dict[str, type[Method]] = {Lora.name: Lora, Full.name: Full}
"""Every method by its name."""


def make_method(config: TrainConfig) -> Method:
    """The method that a configuration asks for."""
    return METHODS[config.method].from_config(config)


__all__ = ["METHODS", "Binder", "Full", "Lora", "LoraSettings", "Method", "Parameters", "make_method"]
