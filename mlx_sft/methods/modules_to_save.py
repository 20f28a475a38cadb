"""PEFT's `modules_to_save` ⇄ the weights of modules that are trained in full.

    model.embed_tokens.weight, and no lm_head.weight where both are named: one weight  ⇄  both tensors, and `ensure_weight_tying`

PEFT asks for a tied weight under both names, and takes the embeddings alone for embeddings that are tied no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sft.errors import UserError
from mlx_sft.methods import Parameters
from mlx_sft.methods.also_train import is_whole, tied_weight
from mlx_sft.model.head import HEAD

_EMBEDDING_LAYERS = ("embed_tokens", HEAD)
"""The names by which PEFT knows embeddings and heads."""


def modules_to_save(also: Sequence[str], parameters: Parameters, written: Callable[[str], str]) -> dict[str, Any]:
    """What PEFT's config says of the modules that are trained in full.

    Embeddings and head go by the names that PEFT knows, others by full names, since it takes any module whose name ends so.

    Args:
        also: The names that training was given.
        written: The name of a module in the class that opens the base, by its name here.
    """
    saved = sorted({_short(written(name.rpartition(".")[0])) for name in parameters if is_whole(name)})
    tied = tied_weight(parameters, also) is not None
    return {"modules_to_save": saved or None} | ({"ensure_weight_tying": True} if tied else {})


def saved_weight(name: str, config: dict[str, Any]) -> str | None:
    """The name of a tensor, without what PEFT puts before it, where it is a weight of such a module; None for any other."""
    module = name.rpartition(".")[0]
    saved = config.get("modules_to_save")
    ends = [end for end in saved if isinstance(end, str) and end] if isinstance(saved, list) else []
    if ends and config.get("ensure_weight_tying"):
        ends.append(HEAD)
    return name if is_whole(name) and any(module.endswith(end) for end in ends) else None


def saved_modules(config: dict[str, Any], weights: Parameters, where: Path) -> list[str]:
    """The modules that are trained in full, by the names that training would be given. Of a weight that is tied, `weights` loses the copy.

    Raises:
        UserError: Where a module has no weight in the file.
    """
    modules = {name.rpartition(".")[0] for name in weights}
    for end in config.get("modules_to_save") or []:
        if not any(module.endswith(end) for module in modules):
            raise UserError(f"modules_to_save names {end}, and no weight of it is there", where=str(where))
    head = weights.get(f"{HEAD}.weight")
    if config.get("ensure_weight_tying") and head is not None:
        del weights[f"{HEAD}.weight"]
        tied = tied_weight(weights, [HEAD])
        if tied is None or not mx.array_equal(tied, head):  # of a model that has a head of its own
            weights[f"{HEAD}.weight"] = head
    return sorted(map(_short, modules))


def _short(module: str) -> str:
    end = module.rpartition(".")[2]
    return end if end in _EMBEDDING_LAYERS else module
