"""Adafactor: a second moment of rows and columns instead of numbers (Shazeer & Stern 2018, https://arxiv.org/abs/1804.04235).

As transformers' `Adafactor` with `relative_step=False`: the learning rate is the schedule's.
"""

from __future__ import annotations

from typing import ClassVar

import mlx.optimizers as optim
from pydantic import Field

from mlx_sft.optimizers import DecaySettings, Optimizer


class AdafactorSettings(DecaySettings):
    """Settings of Adafactor."""

    clip_threshold: float = Field(default=1.0, gt=0)
    """Largest root mean square of an update before the learning rate."""
    decay_rate: float = Field(default=-0.8, lt=0)
    """The second moment's decay rate at step t is 1 - t to this power."""
    beta1: float = Field(default=0.0, ge=0, lt=1)
    """Decay rate of a first moment; 0 keeps none, and needs no memory."""
    scale_parameter: bool = False
    """Multiply the learning rate by the root mean square of the parameter."""


class Adafactor(Optimizer):
    """The optimizer `adafactor`; its state is a number for each row and column of a matrix."""

    name: ClassVar = "adafactor"
    Settings: ClassVar = AdafactorSettings

    @classmethod
    def make(cls, settings: AdafactorSettings, kind: str, *, decayed: bool) -> optim.Optimizer:
        return optim.Adafactor(
            0.0,
            clip_threshold=settings.clip_threshold,
            decay_rate=settings.decay_rate,
            beta_1=settings.beta1 or None,
            weight_decay=settings.weight_decay if decayed else 0.0,
            scale_parameter=settings.scale_parameter,
            relative_step=False,
        )
