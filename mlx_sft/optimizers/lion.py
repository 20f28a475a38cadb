"""Lion: the sign of a momentum (Chen et al. 2023, https://arxiv.org/abs/2302.06675).

    w ← (1 − lr · decay) w − lr · sign(β₁ m + (1 − β₁) g),    m ← β₂ m + (1 − β₂) g

Every number moves by the whole learning rate, which the authors take 3 to 10 times smaller than AdamW's.
"""

from __future__ import annotations

from typing import ClassVar

import mlx.optimizers as optim

from mlx_sft.optimizers import DecaySettings, Optimizer
from mlx_sft.optimizers.adamw import Beta


class LionSettings(DecaySettings):
    """Settings of Lion."""

    betas: tuple[Beta, Beta] = (0.9, 0.99)
    """Decay rates of the momentum: in the update, and from step to step."""


class Lion(Optimizer):
    """The optimizer `lion`; its state is one moment a parameter."""

    name: ClassVar = "lion"
    Settings: ClassVar = LionSettings
    by_rows: ClassVar = True

    @classmethod
    def make(cls, settings: LionSettings, kind: str, *, decayed: bool) -> optim.Optimizer:
        return optim.Lion(0.0, list(settings.betas), settings.weight_decay if decayed else 0.0)
