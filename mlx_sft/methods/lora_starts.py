"""Starts and rates of LoRA. With PiSSA and OLoRA, A and B start from factors of the weight, and the model as the base all the same.

    PiSSA  W = U S Vᵀ   B₀ = U_r √(S_r / scale)   A₀ = √(S_r / scale) V_rᵀ   (Meng et al. 2024, https://arxiv.org/abs/2404.02948)
    OLoRA  W = Q R      B₀ = Q_r                  A₀ = R_r                   (Büyükakyüz 2024, https://arxiv.org/abs/2406.01775)

    y = W x + scale · (B A − B₀ A₀) x  =  W x + scale · [B, −B₀] [A; A₀] x

PEFT takes scale · B₀ A₀ out of W. Here W stays as it is, quantized or not, and modules compute with both pairs side by side: an adapter of
twice the rank on the base itself, in which form the result is written too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_sft.errors import UserError
from mlx_sft.methods import Parameters
from mlx_sft.methods.full import is_decayed
from mlx_sft.methods.lora_layers import LoraLinear
from mlx_sft.methods.lora_settings import HALVES, MAGNITUDE, LoraSettings, is_embedding, is_lora
from mlx_sft.model.linears import is_quantized
from mlx_sft.model.quantize import plain_weight

_EMBEDDING_LR = 1e-6
"""PEFT's learning rate of adapters on embeddings."""

_START = "_start"
"""What a half that training starts with is called after, in a checkpoint: `<module>.lora_A_start`."""


def started(
    settings: LoraSettings,
    module: str,
    shapes: Sequence[tuple[int, ...]],
    weight: mx.array | None,
    key: mx.array,
) -> Parameters:
    """A and B of a module as training starts with them, by name.

    Args:
        shapes: Of both, as the module computes with them.
        weight: The module's; None where the shapes alone matter.
        key: What A is drawn from, where it is random.
    """
    shape_of_A, shape_of_B = shapes
    rank = settings.rank_of(module)
    if settings.factored and weight is not None:
        lora_A, lora_B = factors(weight, rank, settings.scale_of(module), settings.init)
    elif settings.factored:
        lora_A, lora_B = mx.zeros((*shape_of_A[:-2], rank, shape_of_A[-1])), mx.zeros((*shape_of_B[:-1], rank))
    elif settings.init == "gaussian":
        lora_A, lora_B = mx.random.normal(shape_of_A, scale=1 / rank, key=key), mx.zeros(shape_of_B)
    else:
        # torch's kaiming_uniform_(a=sqrt(5)), which PEFT calls, is uniform within 1 / sqrt(in).
        bound = 1 / math.sqrt(shape_of_A[-1])
        lora_A, lora_B = mx.random.uniform(-bound, bound, shape_of_A, key=key), mx.zeros(shape_of_B)
    return {f"{module}.{half}": value for half, value in zip(HALVES, (lora_A, lora_B), strict=True)}


def start_in_peft(
    settings: LoraSettings, linears: Mapping[str, tuple[str, Any]], trained: Parameters, where: Path, *, known: bool
) -> Parameters:
    """What PEFT took out of a base for an adapter: the halves that training started with, by name.

    Args:
        linears: The modules of the base, by name.
        known: Whether they have weights, and not shapes alone.

    Raises:
        UserError: If it cannot be computed from this base as PEFT computed it.
    """
    start: Parameters = {}
    for module in dict.fromkeys(name.rpartition(".")[0] for name in trained if is_lora(name)):
        linear = linears[module][1] if module in linears else None
        if is_embedding(module) or is_quantized(linear):
            what = f"PEFT took the start of this adapter out of the base, which cannot be repeated for {module}"
            why = "is of embeddings" if is_embedding(module) else "is quantized here"
            raise UserError(f"{what}: it {why}", where=str(where), hint="convert it in PEFT, or merge it there")
        shapes = tuple(trained[f"{module}.{half}"].shape for half in HALVES)
        start |= started(
            settings, module, shapes, plain_weight(linear) if known and linear is not None else None, mx.random.key(0)
        )
    return start


def rate_of(settings: LoraSettings, name: str, peak: float) -> float:
    """The learning rate of a parameter in LoRA+, as PEFT's `create_loraplus_optimizer` has it (Hayou et al. 2024).

    https://arxiv.org/abs/2402.12354
    """
    ratio, (module, _, part) = settings.lora_plus_ratio, name.rpartition(".")
    if ratio is None:
        return peak
    if part in HALVES and is_embedding(module):
        return settings.lora_plus_embedding_lr or _EMBEDDING_LR
    # Vectors, which are magnitudes, norms and biases, as B.
    return ratio * peak if part in ("lora_B", MAGNITUDE) or not is_decayed(name) else peak


def factors(weight: mx.array, rank: int, scale: float, init: str) -> tuple[mx.array, mx.array]:
    """A₀ [r, in] and B₀ [out, r] of a weight [out, in], or of each of a stack of experts; float32."""
    if weight.ndim > 2:
        pairs = [factors(one, rank, scale, init) for one in weight]
        return mx.stack([lora_A for lora_A, _ in pairs]), mx.stack([lora_B for _, lora_B in pairs])
    numbers = np.array(weight.astype(mx.float32))
    lora_A, lora_B = _of_qr(numbers, rank) if init == "olora" else _of_svd(numbers, rank, scale)
    return mx.array(lora_A.astype(np.float32)), mx.array(lora_B.astype(np.float32))


def _of_qr(weight: NDArray[np.float32], rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    q, r = np.linalg.qr(weight)
    return r[:rank], q[:, :rank]


def _of_svd(weight: NDArray[np.float32], rank: int, scale: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """By the eigenvectors of the smaller of W Wᵀ and Wᵀ W in float64, in less than half the time of a decomposition of W."""
    if weight.shape[0] > weight.shape[1]:
        lora_A, lora_B = _of_svd(weight.T, rank, scale)
        return lora_B.T, lora_A.T
    precise = weight.astype(np.float64)
    squares, vectors = np.linalg.eigh(precise @ precise.T)
    left = vectors[:, ::-1][:, :rank]
    roots = np.sqrt(np.sqrt(np.maximum(squares[::-1][:rank], 0)) / scale)
    inverse = np.divide(1, scale * roots, out=np.zeros_like(roots), where=roots > 0)  # √(S / scale) / S
    return inverse[:, None] * (left.T @ precise), left * roots


def copies(halves: Parameters) -> Parameters:
    """Arrays of their own, since in a compiled step the parameters are its arguments, and the start is none; evaluated."""
    return {name: mx.array(np.array(half)) for name, half in halves.items()}


def fixed_names(start: Parameters) -> Parameters:
    """Halves that training starts with, by the names that a checkpoint has for them."""
    return {f"{name}{_START}": half for name, half in start.items()}


def split_kept(kept: Parameters) -> tuple[Parameters, Parameters]:
    """The parameters of what a checkpoint keeps, and the halves that training starts with."""
    start = {name.removesuffix(_START): value for name, value in kept.items() if name.endswith(_START)}
    return {name: value for name, value in kept.items() if not name.endswith(_START)}, start


def with_start(module: LoraLinear, name: str, value: mx.array, start: Parameters) -> mx.array:
    """What a module computes with: [A; A₀] or [B, −B₀], in the precision of A or B; a parameter without such a start as it is."""
    if name not in start:
        return value
    fixed, half = start[name], name.rpartition(".")[2]
    return _beside(half, value, fixed if value.dtype == mx.float32 else module.rounded(half, fixed, value.dtype))


def _beside(half: str, value: mx.array, start: mx.array) -> mx.array:
    if half == HALVES[0]:
        return mx.concatenate([value, start], axis=-2)
    return mx.concatenate([value, -start], axis=-1)


def as_plain(settings: LoraSettings, parameters: Parameters, start: Parameters) -> tuple[LoraSettings, Parameters]:
    """The same adapter as PEFT has it on the base as it is: where it has such a start, of twice the rank and the same scale."""
    if not settings.factored:
        return settings, parameters
    times = math.sqrt(2) if settings.rslora else 2.0
    changes = {
        "init": "kaiming",
        "rank": 2 * settings.rank,
        "alpha": times * settings.alpha,
        "rank_pattern": {name: 2 * rank for name, rank in settings.rank_pattern.items()},
        "alpha_pattern": {name: times * alpha for name, alpha in settings.alpha_pattern.items()},
    }
    halves = {
        name: _beside(name.rpartition(".")[2], value, start[name]) if name in start else value
        for name, value in parameters.items()
    }
    return settings.model_copy(update=changes), halves
