"""AdamW with bias correction, as `torch.optim.AdamW` (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import mlx.core as mx
import mlx.optimizers as optim
from pydantic import Field

from mlx_sft.optimizers import DecaySettings, Optimizer
from mlx_sft.optimizers.gradients import Arrays

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamWSettings(DecaySettings):
    """Settings of AdamW."""

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """What is added to the root of the second moment."""


class AdamW(Optimizer):
    """The optimizer `adamw`; its state is two moments a parameter."""

    name: ClassVar = "adamw"
    Settings: ClassVar = AdamWSettings
    by_rows: ClassVar = True
    kind: ClassVar[type[optim.AdamW]] = optim.AdamW

    @classmethod
    def make(cls, settings: AdamWSettings, kind: str, *, decayed: bool) -> optim.Optimizer:
        decay = settings.weight_decay if decayed else 0.0
        # MLX leaves bias correction off by default, PyTorch has it on.
        return cls.kind(0.0, list(settings.betas), settings.eps, decay, bias_correction=True)

    def take_up(self, first: Arrays, second: Arrays, steps: int) -> None:
        """Go on with the two moments of another AdamW that has taken so many steps with these parameters."""
        for names, optimizer in self._groups:
            optimizer.state["step"] = mx.array(steps, mx.uint64)
            for name in names:
                optimizer.state[name] = {"m": first[name], "v": second[name]}
