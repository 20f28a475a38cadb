"""What LoRA makes of the weights of a model: W + scale · B A, of embeddings the same turned, and of a head that is tied to them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_sft.errors import USAGE, UserError
from mlx_sft.methods import Parameters, Rows, WeightEdit
from mlx_sft.methods.lora_settings import HALVES, MAGNITUDE, is_embedding
from mlx_sft.model.head import HEAD_WEIGHT


@dataclass(frozen=True, kw_only=True)
class LowRankUpdate(WeightEdit):
    """W → W + scale · B · A, of a matrix, or of each of a stack; with magnitudes its rows have these norms (DoRA)."""

    lora_A: NDArray[np.float32]
    lora_B: NDArray[np.float32]
    scale: float
    magnitudes: NDArray[np.float32] | None

    def rows(self, base: Rows, start: int, stop: int, expert: int | None = None) -> NDArray[np.float32]:
        lora_A, lora_B = (self.lora_A, self.lora_B) if expert is None else (self.lora_A[expert], self.lora_B[expert])
        update = lora_B[start:stop] @ (lora_A if lora_A.ndim == 2 else lora_A[start:stop])
        update *= np.float32(self.scale)
        update += base(start, stop)
        if self.magnitudes is not None:
            magnitudes = self.magnitudes if expert is None else self.magnitudes[expert]
            norms = np.linalg.norm(update, axis=-1)
            update *= (magnitudes[start:stop] / np.where(norms == 0, 1, norms))[..., None]
        return update


def weight_halves(module: str, parameters: Parameters) -> tuple[mx.array, mx.array]:
    """A and B, whose product B A is of the shape of the module's weight; that of embeddings is turned."""
    lora_A, lora_B = (parameters[f"{module}.{half}"] for half in HALVES)
    return (lora_B.T, lora_A.T) if is_embedding(module) else (lora_A, lora_B)


def as_one_weight(edits: dict[str, WeightEdit]) -> dict[str, WeightEdit]:
    """A head that changes as the embeddings do may be the same tensor as theirs."""
    uses = {
        name: edit
        for name, edit in edits.items()
        if isinstance(edit, LowRankUpdate) and (name == HEAD_WEIGHT or is_embedding(name.removesuffix(".weight")))
    }
    changes = [(edit.scale, edit.lora_A, edit.lora_B) for edit in uses.values()]
    if len(changes) == 2 and all(map(np.array_equal, *changes)):
        return edits | {HEAD_WEIGHT: replace(uses[HEAD_WEIGHT], optional=True)}
    return edits | {name: replace(edit, alone=True) for name, edit in uses.items()}


def scaled_updates(parameters: Parameters, strength: float) -> Parameters:
    """With strength · B; raises `UserError` for DoRA's norms, and for weights and rows that are trained as they are."""
    if other := next((name for name in parameters if name.rpartition(".")[2] not in HALVES), None):
        what = f"{other} was trained as it is, and nothing is added to it that could be scaled"
        if other.endswith(MAGNITUDE):
            what = "DoRA gives the rows of each weight norms of their own, which no strength scales"
        raise UserError(f"--strength: {what}", hint="leave --strength out", exit_code=USAGE)
    return {name: strength * value if name.endswith(HALVES[1]) else value for name, value in parameters.items()}
