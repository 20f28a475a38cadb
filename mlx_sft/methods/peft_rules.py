"""What PEFT makes of an adapter's files: the modules that its settings name, and the place of each of its tensors.

These are the rules of PEFT 0.21 with transformers 5, as tables; the tests compare them with both. PEFT says nothing where a tensor has no
place in the model, or a module gets an adapter that the file has no tensors for: it goes on without.

    target_modules    a name stands for every module whose path ends with it
    experts           in the families of `_PUT_TOGETHER`, `experts.0.gate_proj`, ... become one adapter on the parameter
                      `experts.gate_up_proj`, and every other target with such a last part is taken for them; in other families they
                      have no place
    names             are changed as transformers changes those of a checkpoint
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from mlx_sft.errors import UserError
from mlx_sft.methods.layers import layer_number
from mlx_sft.methods.lora_settings import LoraSettings, is_named
from mlx_sft.model.names import EXPERTS_PART, Opening, split_expert

LONGEST_NAME, MOST_FEATURES = 300, 2**31
"""Of a module: more has none, and no adapter may make it look so."""

_OF_EXPERTS = {
    "qwen2_moe": {"gate": "gate.weight", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"},
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
}  # fmt: skip
"""By kind of family: the last part of a target → the parameter that PEFT puts its adapter on."""

_PUT_TOGETHER = {
    "qwen2_moe": (
        "afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite",
        "glm_moe_dsa", "longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "solar_open",
    ),
    "mixtral": ("minimax", "minimax_m2", "mixtral"),
}  # fmt: skip
"""The families in which PEFT puts the experts of a layer together. Qwen 2 MoE, after which it names the first kind, is not one."""

_MIXTRAL = ((r"\.block_sparse_moe\.", ".mlp."),)

_RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": _MIXTRAL,
    "minimax": _MIXTRAL,
    "minimax_m2": _MIXTRAL,
    "kimi_linear": (
        (r"self_attn\.f_a_proj\.", "self_attn.forget_gate.f_a_proj."),
        (r"self_attn\.f_b_proj\.", "self_attn.forget_gate.f_b_proj."),
        *_MIXTRAL,
    ),
    "phimoe": (*_MIXTRAL, (r"\.gate\.weight", ".router.weight")),
    "nemotron_h": ((r"backbone\.", "model."),),
    "laguna": ((r"mlp\.shared_expert\.", "mlp.shared_experts."),),
    "bailing_hybrid": (
        (r"^model\.word_embeddings\.", "model.embed_tokens."),
        (r"\.attention\.", ".self_attn."),
        (r"self_attn\.f_proj\.", "self_attn.forget_gate.f_proj."),
        (r"\.self_attn\.dense\.", ".self_attn.o_proj."),
    ),
    "exaone": (
        (r"^transformer\.wte\.", "model.embed_tokens."),
        (r"^transformer\.h\.", "model.layers."),
        (r"^transformer\.ln_f\.", "model.norm."),
        (r"\.attn\.attention\.", ".self_attn."),
        (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
        (r"\.ln_1\.", ".input_layernorm."),
        (r"\.ln_2\.", ".post_attention_layernorm."),
        (r"\.mlp\.c_fc_0\.", ".mlp.gate_proj."),
        (r"\.mlp\.c_fc_1\.", ".mlp.up_proj."),
        (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
    ),
}
"""By family: what transformers 5 changes in the names of modules when it reads a checkpoint, one after another."""

_MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
_NOT_IN_MAMBA = ("out_proj", "conv1d")
"""Modules on which PEFT puts no adapter in these families."""

ROUTERS = ("gate", "router")
"""What the module beside experts is called that chooses among them."""

_MOST_REPETITIONS = 3
"""In a pattern of names that is a regular expression: more of them, or one of a group, could take longer than a life."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PeftBase:
    """A base model as PEFT finds it.

    Attributes:
        opening: The class that opens it; None where that is not known.
        modules: The name in that class of everything that has one but experts, the modules that hold others included; empty where they are
            not known.
        experts: The names in that class of the modules that hold the experts of a layer.
    """

    opening: Opening | None
    modules: frozenset[str] = field(default=frozenset())
    experts: frozenset[str] = field(default=frozenset())

    @property
    def family(self) -> str:
        return self.opening.family if self.opening else ""

    def name(self, name: str) -> str:
        """The name in an adapter's file of what is called `name` here."""
        return self.opening.name(name) if self.opening else name

    def module(self, name: str) -> str:
        """The name in transformers' class of a module, by its name here."""
        return renamed(self.family, self.name(name))

    def place(self, name: str) -> str:
        """Where PEFT has to put the adapter on a module: a module, or a parameter that holds the weights of several."""
        before, experts, part = name.rpartition(EXPERTS_PART)
        if experts:
            return f"{self.module(before + experts[:-1])}.{_of_experts(self.family).get(part, part)}"
        module = self.module(name)
        return f"{module}.weight" if self._is_router(module) else module

    def attached(
        self, targets: Iterable[str], layers: Collection[int] | None = None, on_parameters: Iterable[str] = ()
    ) -> set[str]:
        """Where PEFT puts an adapter, given its `target_modules`, `layers_to_transform`, which it asks of no module that is named
        in full, and of no parameter, and `target_parameters`."""
        names, parameters = set(targets), set(on_parameters)
        for target in tuple(names):
            for part, parameter in _of_experts(self.family).items():
                if is_named(target, part):
                    names.discard(target)
                    parameters.add(parameter)
        modules = {module for module in self.modules if ends_with(module, names)}
        if layers is not None:
            modules = {module for module in modules if module in names or layer_number(module) in layers}
        weights = {module for module in self.modules if ends_with(f"{module}.weight", parameters)}
        modules |= {module for module in weights if not self._is_router(module)}
        return modules | {parameter for parameter in self._parameters() if ends_with(parameter, parameters)}

    def _parameters(self) -> Iterator[str]:
        """The parameters on which PEFT puts adapters in the place of modules."""
        for block in self.experts:
            yield from (f"{block}.gate_up_proj", f"{block}.down_proj")
        yield from (f"{module}.weight" for module in self.modules if self._is_router(module))

    def _is_router(self, module: str) -> bool:
        """Whether it chooses among experts: transformers 5 has no linear module there."""
        block, _, part = module.rpartition(".")
        return part in ROUTERS and f"{block}.experts" in self.experts


def renamed(family: str, name: str) -> str:
    """The name that transformers 5 gives a module whose name in the checkpoint is `name`."""
    name = f"{name}.weight"
    for pattern, replacement in _RENAMED.get(family, ()):
        name = re.sub(pattern, replacement, name, count=1)
    return name.removesuffix(".weight")


def _of_experts(family: str) -> Mapping[str, str]:
    kind = next((kind for kind, families in _PUT_TOGETHER.items() if family in families), None)
    return _OF_EXPERTS[kind] if kind else {}


def ends_with(module: str, names: Collection[str]) -> bool:
    """Whether one of these names, or paths, is the end of a module's."""
    return any(end in names for end in endings(module))


def endings(module: str) -> Iterator[str]:
    """`mlp.up_proj` → `mlp.up_proj`, `up_proj`."""
    parts = module.split(".")
    return (".".join(parts[start:]) for start in range(len(parts)))


# --- the settings that name what was trained --------------------------------------------------------------------------------------


def target_modules(base: PeftBase, trained: Sequence[str], layers: Collection[int] | None = None) -> list[str]:
    """Names with which PEFT puts an adapter on every module that was trained, and on no other: the shortest that do.

    Where the base's modules are not known, they are whole; where no names do, as in a family whose experts have no place, short.

    Args:
        trained: The modules, by their names here.
        layers: `layers_to_transform`.
    """
    experts = {name for name in trained if EXPERTS_PART in name}
    # Of experts the last part alone: they have numbers in a file, or are put together in the model.
    whole = {name.rpartition(".")[2] for name in experts}
    whole |= {base.module(name) for name in trained if name not in experts}
    if not base.modules:
        return sorted(whole)
    last = {name.rpartition(".")[2] for name in whole}
    within = {in_a_layer(name) for name in whole}
    places = {base.place(name) for name in trained}
    return sorted(next((names for names in (last, within, whole) if base.attached(names, layers) == places), last))


def for_each_expert(name: str) -> str:
    """A name of experts' modules together, as PEFT's expression for each of them."""
    before, experts, after = f".{name}".rpartition(EXPERTS_PART)
    return name if not experts else f"{before}{experts}".removeprefix(".") + rf"\d+.{after}"


def targets_in_file(config: Mapping[str, Any], modules: Mapping[str, str], layers: str | None) -> list[str]:
    """The inverse, for reading. Names of what the file has: where the config's list says all of it, in each of these layers alike, else
    module by module.

    The list may name more in the model than what was trained, as `out_proj` does where attention and convolution both have one; so a
    name is taken with what stands before it in a layer.
    """
    whole = sorted({together(module) for module in modules})
    names = config.get("target_modules")
    partial = (config.get("layers_to_transform") is not None and layers is None) or config.get("exclude_modules")
    if (
        partial
        or any(EXPERTS_PART in module for module in whole)
        or not isinstance(names, list)
        or not all(isinstance(name, str) for name in names)
    ):
        return whole
    named: dict[str, list[str]] = {name: [] for name in names}
    for ours, theirs in modules.items():
        for name in filter(named.__contains__, endings(theirs)):
            named[name].append(ours)
    if not all(named.values()) or {module for fit in named.values() for module in fit} != modules.keys():
        return whole
    within = ((in_a_layer(module), module, name) for name, fit in named.items() for module in fit)
    return sorted({short if is_named(short, name) else module for short, module, name in within})


def in_a_layer(module: str) -> str:
    """`model.layers.3.self_attn.q_proj` → `self_attn.q_proj`; the whole name of what is in no layer."""
    return re.split(r"\.\d+\.", module, maxsplit=1)[-1]


# --- values of single modules, `rank_pattern` and `alpha_pattern` -----------------------------------------------------------------


def of_modules(values: dict[str, T], name: str, modules: dict[str, str], where: str) -> dict[str, T]:
    """Values of single modules by the ends of their names; where PEFT has regular expressions, by the names that these fit.

    Args:
        values: As the config has them.
        name: The setting, for a message.
        modules: The modules, each expert's apart, and their names in the file.
        where: The file, for a message.
    """
    patterns = {compiled(key, name, where): value for key, value in values.items()}
    if all(re.fullmatch(r"[\w.-]+", key) for key in values):
        fitting = {key: [ours for ours, theirs in modules.items() if is_named(theirs, key)] for key in values}
        if all(is_named(together(module), key) for key, fit in fitting.items() for module in fit):
            return {key: value for key, value in values.items() if fitting[key]}
    found = (
        (ours, next((v for p, v in patterns.items() if p.fullmatch(theirs)), None)) for ours, theirs in modules.items()
    )
    return {together(module): value for module, value in found if value is not None}


def compiled(key: str, name: str, where: str, *, ends: bool = True) -> re.Pattern[str]:
    """As PEFT matches it: a regular expression for the end of a module's name, or for all of it; raises `UserError` for one that is not
    to be tried."""
    repetitions = len(re.findall(r"[*+?{]", key))
    if len(key) > LONGEST_NAME or repetitions > _MOST_REPETITIONS or re.search(r"\)[*+?{]", key):
        raise UserError(f"{name} has {key[:LONGEST_NAME]!r}, which may take too long to match", where=where)
    try:
        return re.compile(rf"(.*\.)?({key})" if ends else key)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{name} has {key!r}, which is no regular expression ({error})", where=where) from error


def together(module: str) -> str:
    """The name of an expert's module without its number; any other as it is."""
    found = split_expert(module)
    return found[0] if found else module


# --- what PEFT loses --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loss:
    """What PEFT makes otherwise than it was trained.

    Attributes:
        why: A sentence, with {} for the module.
        module: Its name here, or in transformers where it has none here.
    """

    why: str
    module: str

    def __str__(self) -> str:
        return self.why.format(self.module)


def losses(base: PeftBase, settings: LoraSettings, trained: Sequence[str], config: Mapping[str, Any]) -> Iterator[Loss]:
    """What PEFT makes otherwise than it was trained, module by module.

    Args:
        base: With its modules.
        settings: With which the modules were trained.
        trained: Them, by their names here.
        config: `adapter_config.json`.
    """
    config = _UNSAID | {name: value for name, value in config.items() if value is not None}
    places: dict[str, list[str]] = {}
    for name in trained:
        places.setdefault(base.place(name), []).append(name)
    attached = _attached(base, config)
    if attached is None:
        attached = set(places)
    for place, names in places.items():
        why = ""
        if place not in attached:
            why = "PEFT has no place for the adapter on {}"
        elif (block := _fused_in(base, place, names)) and (len(names) < 2 or f"{block}.down_proj" not in attached):
            why = "PEFT takes the adapter on {} only together with those on all the experts' projections"
        else:
            why = _otherwise(base, settings, place, names, config)
        if why:
            yield from (Loss(why, name) for name in names)
    yield from (
        Loss("PEFT would put an adapter on {}, which has none here", place)
        for place in sorted(attached - places.keys())
    )


_UNSAID: dict[str, Any] = {
    "target_modules": [], "target_parameters": [], "exclude_modules": [], "layers_to_transform": None, "layers_pattern": [],
    "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False,
}  # fmt: skip
"""What PEFT takes for a setting that a config does not say."""


def _attached(base: PeftBase, config: Mapping[str, Any]) -> set[str] | None:
    """Where PEFT puts adapters; None where its expression for names is not to be tried, or stands for all linear modules."""
    targets, excluded = config["target_modules"], config["exclude_modules"]
    found: set[str] = set()
    if isinstance(targets, str):
        if targets.lower() == "all-linear" or (expression := _expression(targets)) is None:
            return None
        found = {module for module in base.modules if expression.fullmatch(module)}
        experts = _of_experts(base.family)
        blocks = [f"{block}." for block in base.experts] + [f"{module.rpartition('.')[0]}." for module in base.modules]
        targets = [part for part in experts if any(expression.fullmatch(block + part) for block in blocks)]
        found = {module for module in found if module.rpartition(".")[2] not in experts}
    layers = config["layers_to_transform"]
    found |= base.attached(targets, [layers] if isinstance(layers, int) else layers, config["target_parameters"])
    if isinstance(excluded, str):
        expression = _expression(excluded)
        return {one for one in found if expression is None or not expression.fullmatch(one)}
    return {one for one in found if not ends_with(one, excluded)}


def _expression(text: str) -> re.Pattern[str] | None:
    with suppress(UserError):
        return compiled(text, "target_modules", "", ends=False)
    return None


def _fused_in(base: PeftBase, place: str, names: Sequence[str]) -> str:
    """The experts' module whose gates and up projections a place holds, of which PEFT keeps the adapter inside of that on the down
    projections; empty for any other place, and for an adapter that is on the parameter itself."""
    block, _, parameter = place.rpartition(".")
    is_itself = names[0].endswith(f".{parameter}")
    return block if block in base.experts and parameter == "gate_up_proj" and not is_itself else ""


def _otherwise(base: PeftBase, settings: LoraSettings, place: str, names: list[str], config: Mapping[str, Any]) -> str:
    """What differs where a place is found; empty where nothing does."""
    is_parameter = place not in base.modules
    if base.family in _MAMBA and place.rpartition(".")[2] in _NOT_IN_MAMBA:
        return f"PEFT puts no adapter on {{}} in models of type {base.family}"
    if is_parameter and settings.dropout:
        return "PEFT takes no dropout on {}"
    if is_parameter and settings.dora:
        return "PEFT takes no DoRA on {}: transformers 5 has a parameter there, and no linear module"
    number = len(names) if is_parameter else 1
    rank = _of_pattern(config["rank_pattern"], place, number * config["r"])
    alpha = _of_pattern(config["alpha_pattern"], place, number * config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
    if rank != sum(map(settings.rank_of, names)):
        return "PEFT gives {} another rank"
    if any(not math.isclose(scale, settings.scale_of(name), rel_tol=1e-6) for name in names):
        return f"PEFT multiplies what {{}} adds with {scale:g} in the place of {settings.scale_of(names[0]):g}"
    return ""


def _of_pattern(values: Mapping[str, float], place: str, otherwise: float) -> float:
    """The value of the first expression that fits the end of a name."""
    return next((value for key, value in values.items() if re.match(rf"(.*\.)?({key})$", place)), otherwise)
