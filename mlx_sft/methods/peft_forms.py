"""What PEFT writes beside the matrices of linear modules, and what it is here.

embed_tokens.lora_embedding_A [r, vocabulary], .lora_embedding_B [width, r]      an adapter on embeddings
embed_tokens.base_layer.weight                                                   the base's own weight, which PEFT saves beside it
experts.base_layer.lora_A [experts · r, in], .lora_B [out, r · experts]          adapters on `target_parameters`: on the weights
experts.lora_A, .lora_B                                                          of all experts of a layer at once
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.errors import UserError
from mlx_sft.methods import Parameters
from mlx_sft.methods.lora_settings import HALVES, LoraSettings, is_embedding
from mlx_sft.methods.peft_rules import renamed
from mlx_sft.model.head import HEAD
from mlx_sft.model.linears import linear_modules
from mlx_sft.model.names import EXPERTS_PART
from mlx_sft.model.weights import Checkpoint
from mlx_sft.safetensors_file import STORED_AS, StoredTensor, read_float32

_COPY, _NESTED, _OF_EMBEDDINGS = ".base_layer.weight", ".base_layer", "lora_embedding_"

_PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
"""Those of a layer's experts, in the order in which the class has them: PEFT puts the adapter on a later one around the others."""

_PARTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
"""The modules here that hold such a parameter, by the names that they have in one family or another."""

_TAKES_TURNS = frozenset({"gpt_oss"})
"""Families in which the rows of `gate_up_proj` are of a gate and of an up projection by turns, and not one half of each."""

_MOVE_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
"""Beginnings of `init_lora_weights` with which PEFT takes from the base what the adapter starts with."""


def refuse_moved_base(config: Mapping[str, Any], where: Path, but: Collection[str] = ()) -> None:
    """Raise `UserError` for an adapter that belongs to a base that PEFT has changed: with the base as it is, it is another model.

    Args:
        but: Starts with which it is known what was changed.
    """
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVE_THE_BASE) and start not in but:
        raise UserError(
            f'init_lora_weights is "{start}": PEFT took the start of this adapter out of the base, so that it fits the base that was left, '
            "and not the model that it names",
            where=str(where),
            hint="save it in PEFT as plain LoRA: before training save_pretrained(START), after it "
            "save_pretrained(DIR, path_initial_model_for_weight_conversion=START), and give DIR; a merged model is as good",
        )


def stored_name(name: str) -> str:
    """`model.embed_tokens.lora_A` → PEFT's `model.embed_tokens.lora_embedding_A`; any other name as it is."""
    module, _, half = name.rpartition(".")
    of_embedding = half in HALVES and is_embedding(module)
    return f"{module}.{_OF_EMBEDDINGS}{half[-1]}" if of_embedding else name


def plain_name(name: str) -> str:
    """The inverse of `stored_name`."""
    module, _, half = name.rpartition(".")
    return f"{module}.lora_{half[-1]}" if half in (f"{_OF_EMBEDDINGS}A", f"{_OF_EMBEDDINGS}B") else name


def copied_module(name: str) -> str | None:
    """The module whose weight in the base a tensor is said to be a copy of, by the tensor's name; None where it is no copy."""
    if name.endswith(_COPY):
        return name.removesuffix(_COPY)
    module, _, part = name.rpartition(".")
    return module if part == "weight" and (is_embedding(module) or module == HEAD) else None


def refuse_other_copies(
    copies: Mapping[str, mx.array], weights: Mapping[str, mx.array], where: Path, *, rounded: bool = False
) -> None:
    """Raise `UserError` for a copy that is not the weight of the base.

    Args:
        copies: By the names of modules.
        weights: Those of the base.
        rounded: Whether the base was quantized since, so that they can only be near each other.
    """
    for module, copy in copies.items():
        weight = weights.get(module)
        if weight is None or weight.shape != copy.shape or not (_near if rounded else _same)(weight, copy):
            raise UserError(
                f"it holds a weight of its own for {module}, which is not that of this base",
                where=str(where),
                hint="it was trained, or the vocabulary was resized; with PEFT name the module in modules_to_save, or merge the adapter",
            )


def _same(one: mx.array, other: mx.array) -> bool:
    """Whether two weights are equal in the coarser of their precisions."""
    coarse = next((kind for kind in (mx.bfloat16, mx.float16) if kind in (one.dtype, other.dtype)), mx.float32)
    return bool(mx.allclose(one.astype(coarse), other.astype(coarse), rtol=0, atol=1e-6).item())


def _near(one: mx.array, other: mx.array) -> bool:
    difference = mx.abs(one.astype(mx.float32) - other.astype(mx.float32)).mean()
    return bool((difference <= _QUANTIZED * mx.abs(other.astype(mx.float32)).mean()).item())


_QUANTIZED = 0.25
"""How far quantizing to 4 bits moves the numbers of a weight at most, in parts of their mean: a tenth where they are random."""


def read_copy(tensor: StoredTensor) -> mx.array:
    """A copy, in the precision in which it is stored."""
    value = mx.array(read_float32(tensor))
    return value.astype(getattr(mx, STORED_AS[tensor.dtype].name))


def check_copies(copies: Mapping[str, mx.array], base: Path, where: Path) -> list[str]:
    """Compare the copies of a base's weights that PEFT saved in an adapter with a checkpoint folder.

    Returns:
        The modules that could not be compared, because the base is quantized or its weights are not here.

    Raises:
        UserError: For one that is another weight.
    """
    named: Mapping[str, StoredTensor] = {}
    if copies:
        with suppress(UserError):
            named = Checkpoint.open(base).named
    embeddings = next((tensor for name, tensor in named.items() if is_embedding(name.removesuffix(".weight"))), None)
    weights = {}
    for module in copies:
        stored = named.get(f"{module}.weight") or (embeddings if module == HEAD else None)
        if stored is not None and stored.dtype in STORED_AS:
            weights[module] = read_copy(stored)
    refuse_other_copies({name: copies[name] for name in weights}, weights, where)
    return [module for module in copies if module not in weights]


# --- adapters on parameters -----------------------------------------------------------------------------------------------------------


def target_parameters(config: Mapping[str, Any], where: Path) -> list[str]:
    """What the config names; raises `UserError` for anything but names."""
    named = config.get("target_parameters") or []
    if not isinstance(named, list) or not all(isinstance(name, str) and name for name in named):
        raise UserError("target_parameters is no list of names", where=str(where))
    return named


def of_parameter(name: str, named: list[str], where: Path) -> str:
    """`model.layers.0.mlp.experts.base_layer.lora_A` → `model.layers.0.mlp.experts.gate_up_proj.lora_A`; any other name as it is.

    Args:
        name: Of a tensor, without what PEFT puts before and after it.
        named: `target_parameters`.

    Raises:
        UserError: Where it cannot be told which parameter the adapter is on.
    """
    path, _, half = name.rpartition(".")
    module = path
    while module.endswith(_NESTED):
        module = module.removesuffix(_NESTED)
    depth = (len(path) - len(module)) // len(_NESTED)
    ends = {end.rpartition(".")[2] for end in named if f".{module}.{end.rpartition('.')[2]}".endswith(f".{end}")}
    if not ends or ends == {"weight"}:  # of a router: a matrix as any
        return name
    nested = [part for part in _PARAMETERS if part in ends]
    if set(nested) != ends or depth >= len(nested):
        what = f"{name} is on one of the parameters {', '.join(sorted(ends))}, and not known on which"
        raise UserError(what, where=str(where), hint=_MERGE)
    return f"{module}.{nested[len(nested) - 1 - depth]}.{half}"


_MERGE = "merge it with PEFT's merge_and_unload, and take the merged model"


def is_on_parameter(name: str) -> bool:
    """Whether `of_parameter` gave a name: that of all experts' matrices at once, without the number of one."""
    module = name.rpartition(".")[0]
    return EXPERTS_PART in module and module.rpartition(EXPERTS_PART)[2] in _PARAMETERS


def stacked(name: str, value: mx.array, rank: int, where: Path) -> mx.array:
    """lora_A [experts · r, in] → [experts, r, in] and lora_B [out, r · experts] → [experts, out, r].

    Raises:
        UserError: If it is not of this rank.
    """
    is_first = name.endswith(HALVES[0])
    if value.ndim != 2 or value.shape[0 if is_first else 1] % rank:
        raise UserError(f"{name} is {list(value.shape)}, and no experts of rank {rank}", where=str(where))
    if is_first:
        return value.reshape(-1, rank, value.shape[1])
    return value.reshape(value.shape[0], rank, -1).transpose(2, 0, 1)


def on_modules(
    model: nn.Module, settings: LoraSettings, parameters: Parameters, of_experts: Collection[str]
) -> tuple[LoraSettings, Parameters, str]:
    """Put what is on parameters of experts on the modules that hold them in a model of mlx-lm's; what the model has not, stays as it is.

    Args:
        of_experts: The names of those parameters, among the names of modules.

    Returns:
        The settings that name the modules, and their parameters; and a parameter whose gates and up projections had one A in common, each
        of which has its own now, empty where there is none.
    """
    family = str(getattr(model, "model_type", ""))
    known: dict[str, str] = {}
    for name in linear_modules(model):
        block, experts, part = name.rpartition(EXPERTS_PART)
        if experts:
            known[f"{renamed(family, block + experts[:-1])}.{part}"] = name
    found: Parameters = {}
    origins: dict[str, str] = {}
    shared = ""
    for name, value in parameters.items():
        module, _, half = name.rpartition(".")
        block, _, parameter = module.rpartition(".")
        parts = next(
            (p for p in _PARTS.get(parameter, ((parameter,),)) if all(f"{block}.{one}" in known for one in p)), None
        )
        if module not in of_experts or parts is None:
            found[name] = value
            origins[module] = module
            continue
        shared = module if len(parts) > 1 else shared
        for number, part in enumerate(parts):
            ours = known[f"{block}.{part}"]
            origins[ours] = module
            found[f"{ours}.{half}"] = value if half == HALVES[0] else _rows(value, number, len(parts), family)
    ranks = {ours: settings.rank_of(theirs) for ours, theirs in origins.items()}
    alphas = {ours: settings.alpha_of(theirs) for ours, theirs in origins.items()}
    own = {
        "target": sorted(origins),
        "layers": None,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != settings.rank},
        "alpha_pattern": {name: alpha for name, alpha in alphas.items() if alpha != settings.alpha},
    }
    return settings.model_copy(update=own), found, shared


def _rows(lora_B: mx.array, number: int, parts: int, family: str) -> mx.array:
    """The rows [experts, out / parts, r] of one of the parts of a parameter."""
    if family in _TAKES_TURNS:
        return lora_B[:, number::parts]
    rows = lora_B.shape[1] // parts
    return lora_B[:, number * rows : (number + 1) * rows]
