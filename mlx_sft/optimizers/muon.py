"""Muon: a momentum made orthogonal by five Newton-Schulz iterations (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

    W ← (1 − lr · decay) W − lr · √max(1, rows / columns) · NS₅(momentum)

As `torch.optim.Muon`, in float32 where that iterates in bfloat16. It is for the matrices between embeddings and head; these and what is
no matrix go by AdamW, with the same learning rate.
"""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
import mlx.optimizers as optim
from pydantic import Field

from mlx_sft.model.head import EMBEDDING_NAMES, HEAD
from mlx_sft.optimizers import DecaySettings, Optimizer

_MATRIX, _OTHER = "matrix", "other"
_OUTSIDE = tuple(f"{name}.weight" for name in (*EMBEDDING_NAMES, HEAD))
"""How the names of embeddings and heads end."""

_VECTORS = (".bias", ".lora_magnitude_vector")
"""How the names of vectors end, of which there may be one for each expert or each layer."""


class MuonSettings(DecaySettings):
    """Settings of Muon."""

    momentum: float = Field(default=0.95, ge=0, lt=1)
    """How much of the momentum is kept from step to step."""
    nesterov: bool = True
    """Look ahead along the momentum (Nesterov)."""


class _Muon(optim.Muon):
    """With weight decay beside the gradient instead of in it, and each expert's matrix by itself."""

    def __init__(self, momentum: float, nesterov: bool, decay: float) -> None:
        super().__init__(0.0, momentum, weight_decay=0.0, nesterov=nesterov)
        self._decay = decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        if parameter.ndim > 2:
            states: list[dict[str, Any]] = [{"v": momentum} for momentum in state["v"]]
            experts = zip(gradient, parameter, states, strict=True)
            updated = mx.stack([self.apply_single(*expert) for expert in experts])
            state["v"] = mx.stack([one["v"] for one in states])
            return updated
        decayed = parameter * (1 - self.learning_rate * self._decay) if self._decay else parameter
        moved: mx.array = super().apply_single(gradient, decayed, state)
        return moved


class Muon(Optimizer):
    """The optimizer `muon`; its state is one moment a number of a matrix, and two of the others."""

    name: ClassVar = "muon"
    Settings: ClassVar = MuonSettings

    @classmethod
    def make(cls, settings: MuonSettings, kind: str, *, decayed: bool) -> optim.Optimizer:
        decay = settings.weight_decay if decayed else 0.0
        if kind == _OTHER:
            return optim.AdamW(0.0, weight_decay=decay, bias_correction=True)
        return _Muon(settings.momentum, settings.nesterov, decay)

    @classmethod
    def kind_of(cls, name: str, shape: tuple[int, ...]) -> str:
        return _MATRIX if len(shape) > 1 and not name.endswith(_OUTSIDE + _VECTORS) else _OTHER
