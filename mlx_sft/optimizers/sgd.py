"""Stochastic gradient descent, with or without momentum, as `torch.optim.SGD`; weight decay is added to the gradient."""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
import mlx.optimizers as optim
from pydantic import Field, model_validator

from mlx_sft.optimizers import DecaySettings, Optimizer


class SGDSettings(DecaySettings):
    """Settings of SGD."""

    momentum: float = Field(default=0.0, ge=0, lt=1)
    """How much of the update before is kept; 0 keeps none, and needs no memory."""
    nesterov: bool = False
    """Look ahead along the momentum (Nesterov)."""

    @model_validator(mode="after")
    def _agree(self) -> SGDSettings:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: needs a momentum above 0")
        return self


class _SGD(optim.SGD):
    """Without a buffer where there is no momentum."""

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        if self.momentum > 0:
            super().init_single(parameter, state)


class SGD(Optimizer):
    """The optimizer `sgd`; its state is one moment a parameter, or nothing."""

    name: ClassVar = "sgd"
    Settings: ClassVar = SGDSettings
    by_rows: ClassVar = True

    @classmethod
    def make(cls, settings: SGDSettings, kind: str, *, decayed: bool) -> optim.Optimizer:
        decay = settings.weight_decay if decayed else 0.0
        return _SGD(0.0, settings.momentum, decay, nesterov=settings.nesterov)
