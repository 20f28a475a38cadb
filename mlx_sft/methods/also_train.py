"""Modules that are trained in full beside adapters: `--also-train embed_tokens,lm_head`, PEFT's `modules_to_save`.

    frozen module, quantized or not ─► a copy in its place, of plain numbers ─► its weights are trained as they are, in float32

Where a model ties its head to its embeddings both names must be given, because they are one weight. PEFT takes one name alone for a copy
of the embeddings under a head that stays as it was; then the model is tied no more. In its files a tied weight is there under both names:

    model.embed_tokens.weight, and no lm_head.weight where both are named: one weight  ⇄  both tensors, and `ensure_weight_tying`
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from numpy.typing import NDArray

from mlx_sft.errors import USAGE, UserError
from mlx_sft.methods import Parameters, Rows, WeightEdit
from mlx_sft.methods.lora_settings import DELTA, HALVES, MAGNITUDE, is_embedding, is_named
from mlx_sft.model.head import HEAD, HEAD_WEIGHT, tied_embedding
from mlx_sft.model.linears import is_experts, is_quantized
from mlx_sft.model.names import transformers_name
from mlx_sft.model.quantize import dequantized
from mlx_sft.model.vocabulary import EMBEDDINGS

ORIGINAL = "_original"
"""The attribute of a copy that is the module in whose place it is."""

Place = tuple[nn.Module, str, mx.Dtype]
"""Where a parameter is in a model: a module, the name of its weight there, and the precision in which it is bound."""


@dataclass(frozen=True, kw_only=True)
class NewWeight(WeightEdit):
    """W → the trained weight."""

    trained: NDArray[np.float32]

    def rows(self, base: Rows, start: int, stop: int, expert: int | None = None) -> NDArray[np.float32]:
        return self.trained[start:stop]


def attach_whole(model: nn.Module, dtype: mx.Dtype, names: Iterable[str]) -> dict[str, Place]:
    """Put copies in the place of modules that are trained in full; raises `UserError` for a name that there is no such module of.

    Args:
        dtype: The model's precision.
        names: Module names, or the ends of them.

    Returns:
        The place of each parameter: `<module>.weight`, and `.bias` where it has one.
    """
    places: dict[str, Place] = {}
    for name, path, module in whole_modules(model, names):
        copy = plain_copy(module, dtype)
        vars(copy)[ORIGINAL] = module
        vars(copy)["_no_grad"] = set()
        model.update_modules(tree_unflatten([(path, copy)]))
        places |= {f"{name}.{part}": (copy, part, value.dtype) for part, value in copy.items()}
    return places


def is_whole(name: str) -> bool:
    """Whether a parameter is a weight of the model, and no part of an adapter."""
    return name.rpartition(".")[2] not in (*HALVES, MAGNITUDE, DELTA)


def whole_modules(model: nn.Module, names: Iterable[str]) -> list[tuple[str, str, Any]]:
    """The modules that are named: their names in transformers, paths and selves, in the model's order.

    Raises:
        UserError: For a name of no module with weights of its own, and for one of two names of a weight.
    """
    names = list(names)
    every = [(transformers_name(path), path, module) for path, module in model.named_modules() if _has_weights(module)]
    tied = tied_embedding(model)
    for name in names:
        if not any(is_named(module, name) for module, _, _ in every) and not (tied and name == HEAD):
            known = ", ".join(sorted({module.rpartition(".")[2] for module, _, _ in every}))
            what = f"no module of this model that can be trained in full is named {name}"
            raise UserError(what, where="also_train", hint=f"it has {known}", exit_code=USAGE)
    found = [one for one in every if any(is_named(one[0], name) for name in names)]
    if tied is not None and (HEAD in names) is not any(name == tied for name, _, _ in found):
        short = tied.rpartition(".")[2]
        what = f"this model has one weight for {short} and {HEAD}, and not both are named"
        hint = f"give --also-train {short},{HEAD}, which trains that weight"
        raise UserError(what, where="also_train", hint=hint, exit_code=USAGE)
    return found


def new_weights(parameters: Parameters, also: Iterable[str]) -> dict[str, WeightEdit]:
    """What becomes of the weights of such modules; `also` are the names that were given."""
    edits: dict[str, WeightEdit] = {}
    for name, value in parameters.items():
        if is_whole(name):
            edits[name] = NewWeight(shape=value.shape, trained=np.array(value, np.float32))
    if (tied := tied_weight(parameters, also)) is not None:  # a checkpoint may store a tied head besides the embeddings
        edits[HEAD_WEIGHT] = NewWeight(shape=tied.shape, optional=True, trained=np.array(tied, np.float32))
    return edits


def tied_weight(parameters: Parameters, also: Iterable[str]) -> mx.array | None:
    """The weight of embeddings and head, where these are one that is trained; None where they are not."""
    if HEAD not in also or HEAD_WEIGHT in parameters:
        return None
    weights = {name.removesuffix(".weight"): value for name, value in parameters.items() if name.endswith(".weight")}
    embeddings = [value for name, value in weights.items() if is_embedding(name)]
    return embeddings[0] if len(embeddings) == 1 else None


_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    nn.QuantizedEmbedding: nn.Embedding,
    nn.QuantizedLinear: nn.Linear,
}


def _has_weights(module: Any) -> bool:
    """Whether a module has weights, that are matrices or of each feature, and no modules inside."""
    if is_experts(module) or module.children():
        return False
    weight = module.get("weight")
    return isinstance(weight, mx.array) and weight.ndim <= 2


def plain_copy(module: Any, dtype: mx.Dtype, part: Callable[[mx.array], mx.array] = lambda array: array) -> nn.Module:
    """A module of the same kind with this part of the weights' rows; a quantized one becomes one of numbers of this precision."""
    kind: Any = _PLAIN.get(type(module), type(module))
    copy: nn.Module = kind.__new__(kind)
    nn.Module.__init__(copy)
    vars(copy).update(vars(module))
    for name, value in module.items():
        if not (is_quantized(module) and name in ("weight", "scales", "biases")):
            copy[name] = part(value)
    if is_quantized(module):
        copy.weight = dequantized(module, part).astype(dtype)  # mxfp4 gives bfloat16
    return copy


# PEFT's files


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
    head = weights.get(HEAD_WEIGHT)
    if config.get("ensure_weight_tying") and head is not None:
        del weights[HEAD_WEIGHT]
        tied = tied_weight(weights, [HEAD])
        if tied is None or not mx.array_equal(tied, head):  # of a model that has a head of its own
            weights[HEAD_WEIGHT] = head
    return sorted(map(_short, modules))


def _short(module: str) -> str:
    end = module.rpartition(".")[2]
    return end if end in (EMBEDDINGS, HEAD) else module
