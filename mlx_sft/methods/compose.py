"""Several adapters of one base → one. The adapters' own names and shapes must agree; the base itself need not be there.

With weights w and scales s, the update of each module is Σ w s B A: exactly so for `cat`, as near as a rank allows for `svd`. `linear` adds
up the matrices, Σ √(w s) A and Σ √(w s) B, as PEFT does: it has products of one adapter's B with another's A besides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_sft.errors import USAGE, UserError
from mlx_sft.methods import Parameters
from mlx_sft.methods.lora import Lora
from mlx_sft.methods.lora_settings import HALVES, LoraSettings
from mlx_sft.methods.peft_base import peft_base
from mlx_sft.methods.peft_files import refuse_losses, write_adapter
from mlx_sft.methods.peft_forms import check_copies
from mlx_sft.methods.results import adapter_folder
from mlx_sft.model.load import local_checkpoint
from mlx_sft.model.outline import outline
from mlx_sft.writing import free_folder, write_folder

Method = Literal["linear", "cat", "svd"]
Array = NDArray[np.float32]


Part = tuple[float, Array, Array]
"""(f, A, B): one module's update by one adapter, f · B A, with A [..., r, in] and B [..., out, r]."""


@dataclass(frozen=True)
class _Weighted:
    """An adapter, and how much of it is taken."""

    name: str
    weight: float
    settings: LoraSettings
    parameters: Parameters
    base_model: str
    begins: str | None

    def part(self, module: str) -> Part | None:
        if f"{module}.lora_A" not in self.parameters:
            return None
        lora_A, lora_B = (np.array(self.parameters[f"{module}.{half}"], np.float32) for half in HALVES)
        return self.weight * self.settings.scale_of(module), lora_A, lora_B


def merge_adapters(adapters: Sequence[str], to: str | Path, *, method: Method = "cat", rank: int | None = None) -> Path:
    """Write one adapter, in PEFT's files, in place of several.

    Args:
        adapters: Adapter folders of PEFT's or mlx-lm's, or runs, each with its weight: `A:0.7`; 1 where there is none.
        to: The folder to write.
        method: `cat` (the exact sum, whose rank is the sum of theirs), `svd` or `linear` (equal ranks).
        rank: Of the result, for `svd`; the largest of theirs where not given.

    Raises:
        UserError: If adapters do not fit each other, naming what differs, or PEFT would lose a part of the result.
    """
    read = [_read(adapter) for adapter in adapters]
    _check_agreement(read, method, rank)
    modules = list(dict.fromkeys(name.rpartition(".")[0] for one in read for name in one.parameters))
    if rank is not None:
        _refuse_rank(rank, read, modules)
    largest = rank or max(one.settings.rank_of(module) for one in read for module in modules)
    compose: dict[str, Callable[[list[Part]], tuple[Array, Array]]] = {
        "linear": linear,
        "cat": cat,
        "svd": lambda parts: svd(parts, largest),
    }
    parameters: Parameters = {}
    for module in modules:
        parts = [part for one in read if (part := one.part(module)) is not None]
        try:
            composed = compose[method](parts)
        except ValueError as error:
            what = f"the adapters have matrices of different shapes on {module} ({error})"
            raise UserError(what, hint="compose adapters of one base and, for linear, of one rank") from error
        for half, value in zip(HALVES, composed, strict=True):
            parameters[f"{module}.{half}"] = mx.array(value)
    settings = _settings(parameters, modules)
    target = free_folder(to)
    with write_folder(target, parents=True) as temporary:
        write_adapter(temporary, settings, parameters, read[0].base_model, begins=read[0].begins)
        _refuse_losses(temporary, read[0].base_model)
    return target


def _refuse_rank(rank: int, adapters: list[_Weighted], modules: list[str]) -> None:
    """Raise `UserError` for a rank that no sum of these adapters has: what is above it would be zeros."""
    parts = ([part for one in adapters if (part := one.part(module)) is not None] for module in modules)
    most = max(
        min(sum(lora_A.shape[-2] for _, lora_A, _ in of_module), first.shape[-1], last.shape[-2])
        for of_module in parts
        for _, first, last in of_module[:1]
    )
    if rank > most:
        what = f"--rank {rank} is more than the sum of these adapters has, which is at most {most}"
        raise UserError(what, hint="give a smaller one, or leave --rank out", exit_code=USAGE)


def _refuse_losses(folder: Path, base_model: str) -> None:
    """Raise `UserError` for a result of which PEFT would lose a part; where the base is not on this disk, that is not seen."""
    base = peft_base(base_model)
    if base is not None and base.modules:
        what = "PEFT would not open the result as the sum of these adapters"
        hint = "look at each with `mlx-sft adapters check`; where PEFT cannot have it, merge each run into a checkpoint of its own"
        refuse_losses(folder, base, what, where=base_model, hint=hint)


def linear(parts: list[Part]) -> tuple[Array, Array]:
    """Σ √|f| sign(f) A and Σ √|f| B, as PEFT's `add_weighted_adapter`."""
    lora_A = np.stack([math.copysign(math.sqrt(abs(factor)), factor) * lora_A for factor, lora_A, _ in parts])
    lora_B = np.stack([math.sqrt(abs(factor)) * lora_B for factor, _, lora_B in parts])
    return lora_A.sum(axis=0), lora_B.sum(axis=0)


def cat(parts: list[Part]) -> tuple[Array, Array]:
    """[f₁ A₁; f₂ A₂; ...] and [B₁ B₂ ...], whose product is Σ f B A."""
    lora_A = np.concatenate([factor * lora_A for factor, lora_A, _ in parts], axis=-2)
    return lora_A, np.concatenate([lora_B for _, _, lora_B in parts], axis=-1)


def svd(parts: list[Part], rank: int) -> tuple[Array, Array]:
    """The best approximation of Σ f B A by a product of this rank (Eckart and Young 1936); B holds the singular values."""
    lora_A, lora_B = cat(parts)
    # Of a product of thin matrices: the singular values are those of the small one between their orthogonal parts.
    left, left_rest = np.linalg.qr(lora_B)
    right, right_rest = np.linalg.qr(lora_A.swapaxes(-1, -2))
    inner, values, outer = np.linalg.svd(left_rest @ right_rest.swapaxes(-1, -2))
    kept = min(rank, values.shape[-1])
    new_B = (left @ inner[..., :kept]) * values[..., None, :kept]
    new_A = outer[..., :kept, :] @ right.swapaxes(-1, -2)
    missing = rank - kept
    pad_A = [(0, 0)] * (new_A.ndim - 2) + [(0, missing), (0, 0)]
    pad_B = [(0, 0)] * (new_B.ndim - 2) + [(0, 0), (0, missing)]
    return np.pad(new_A, pad_A), np.pad(new_B, pad_B)


def _read(adapter: str) -> _Weighted:
    name, colon, weight = adapter.rpartition(":")
    try:
        name, factor = (name, float(weight)) if colon else (adapter, 1.0)
    except ValueError:
        name, factor = adapter, 1.0  # a colon of the name's own
    if not math.isfinite(factor):
        raise UserError(f"the weight of {name} is {factor}", hint="write A:0.7", exit_code=USAGE)
    folder = adapter_folder(name, _STEP)
    method, parameters = Lora.read_plain(folder)
    base = Lora.base_model(folder)
    if method.needs_model(parameters):
        if (checkpoint := local_checkpoint(base)) is None:
            what = "what it changes is only clear on its base, which is not on this disk"
            raise UserError(
                what, where=name, hint="compose where the base is, or merge each into a checkpoint of its own"
            )
        check_copies(method.base_copies, checkpoint, folder)
        parameters = method.of_model(outline(checkpoint, "float32").model, parameters, folder)
    settings = method.settings
    if settings.also_train:
        what = f"it has {', '.join(settings.also_train)} trained in full, which cannot be added up"
        raise UserError(what, where=name, hint="merge each into a checkpoint of its own")
    if settings.train_new_tokens:
        what = "it has rows of new tokens, which cannot be added up"
        raise UserError(what, where=name, hint="merge each into a checkpoint of its own")
    if settings.dora:
        raise UserError(
            "adapters of DoRA cannot be added up", where=name, hint="merge each into a checkpoint of its own"
        )
    return _Weighted(name, factor, settings, parameters, base, method.names_begin)


_STEP = "export a step with --format peft and --step best, last, or"


def _check_agreement(adapters: list[_Weighted], way: Method, rank: int | None) -> None:
    if len(adapters) < 2:
        raise UserError("one adapter alone is composed already", hint="give two or more: A:0.7 B:0.3", exit_code=USAGE)
    if rank is not None and way != "svd":
        raise UserError(f"--method {way} decides the rank itself", hint="give --method svd", exit_code=USAGE)
    first = adapters[0]
    for other in adapters[1:]:
        if other.base_model != first.base_model:
            raise UserError(
                f"it belongs to {other.base_model or 'an unnamed base'}, and {first.name} to {first.base_model or 'an unnamed base'}",
                where=other.name,
                hint="only adapters of one base can be composed",
            )


def _settings(parameters: Parameters, modules: list[str]) -> LoraSettings:
    """All scales are in the matrices: alpha is the rank, also where a module has one of its own."""
    ranks = {module: int(parameters[f"{module}.lora_A"].shape[-2]) for module in modules}
    usual = max(ranks.values(), key=list(ranks.values()).count)
    own = {module: rank for module, rank in ranks.items() if rank != usual}
    return LoraSettings(
        rank=usual,
        alpha=float(usual),
        dropout=0.0,
        rslora=False,
        target=modules,
        init="kaiming",
        rank_pattern=own,
        alpha_pattern={module: float(rank) for module, rank in own.items()},
    )
