"""Modules that are trained in full beside adapters: `--also-train embed_tokens,lm_head`, PEFT's `modules_to_save`.

    frozen module, quantized or not ─► a copy in its place, of plain numbers ─► its weights are trained as they are, in float32

Where a model ties its head to its embeddings both names must be given, because they are one weight. PEFT takes one name alone for a copy
of the embeddings under a head that stays as it was; then the model is tied no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from numpy.typing import NDArray

from mlx_sft.errors import USAGE, UserError
from mlx_sft.methods import Parameters, Rows, WeightEdit
from mlx_sft.methods.lora_settings import DELTA, HALVES, MAGNITUDE, is_embedding, is_named
from mlx_sft.model.head import HEAD, tied_embedding
from mlx_sft.model.linears import is_experts, is_quantized
from mlx_sft.model.names import transformers_name
from mlx_sft.model.quantize import dequantized

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
        edits[f"{HEAD}.weight"] = NewWeight(shape=tied.shape, optional=True, trained=np.array(tied, np.float32))
    return edits


def tied_weight(parameters: Parameters, also: Iterable[str]) -> mx.array | None:
    """The weight of embeddings and head, where these are one that is trained; None where they are not."""
    if HEAD not in also or f"{HEAD}.weight" in parameters:
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
