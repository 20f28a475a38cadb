"""LoRA: y = W x + scale · B A x, with W frozen (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

DoRA: the rows of V = W + scale · B A are given norms m of their own, y = m / ‖V‖ · V x (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
Names, start and scale are PEFT's, so that the files are. Knows nothing of files or of training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.config import TrainConfig
from mlx_sft.errors import UserError
from mlx_sft.model.linears import EXPERTS, is_quantized, linear_modules, weight_shape
from mlx_sft.model.names import EXPERTS_PART
from mlx_sft.model.quantize import dequantized

HALVES = ("lora_A", "lora_B")
MAGNITUDE = "lora_magnitude_vector"
"""The last parts of a parameter's name."""

_PARTS = (*HALVES, MAGNITUDE)

_ROUTERS = ("gate", "router")
"""What the module beside experts is called that chooses among them."""

GROUPS = {
    "all-linear": (),
    "attention": ("self_attn", "attention", "attn", "self_attention"),
    "qv": ("q_proj", "v_proj"),
}
"""Targets that stand for several modules of the layers: those with one of these parts in their path, or without parts all."""


@dataclass(frozen=True)
class LoraSettings:
    """The shape of an adapter, in PEFT's terms; what it is by default is for `TrainConfig` to say.

    Attributes:
        targets: Module names (`q_proj`, or longer endings of a path), or one of `all-linear`, `attention`, `qv`.
        dora: Whether each row's norm is learnt apart from its direction.
        rank_pattern: The rank of single modules, by such names; the first that fits counts.
        alpha_pattern: The same of alpha.
    """

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    targets: tuple[str, ...]
    init: str
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: TrainConfig) -> LoraSettings:
        targets = (config.target,) if isinstance(config.target, str) else tuple(config.target)
        return cls(
            config.rank,
            config.alpha,
            config.dropout,
            config.rslora,
            targets,
            config.init,
            config.dora,
            config.rank_pattern,
            config.alpha_pattern,
        )

    def rank_of(self, module: str) -> int:
        """The rank of the adapter on a module."""
        return next((rank for name, rank in self.rank_pattern.items() if is_named(module, name)), self.rank)

    def scale_of(self, module: str) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""
        alpha = next((alpha for name, alpha in self.alpha_pattern.items() if is_named(module, name)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def is_named(module: str, name: str) -> bool:
    """Whether a name, or the end of one, is a module's."""
    return module == name or module.endswith(f".{name}")


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank update beside it: [..., in] → [..., out].

    The update is computed in the precision of the input, from float32 parameters.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear = linear
        *experts, out_features, in_features = weight_shape(linear)
        self.lora_A = mx.zeros((*experts, rank, in_features))
        self.lora_B = mx.zeros((*experts, out_features, rank))
        self._scale = scale
        self._dropout = dropout
        self._key: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        down = self._drop(x) @ self.lora_A.T.astype(x.dtype)
        # One pass over the output for the product and the sum.
        return mx.addmm(self.linear(x), self._scale * down, self.lora_B.T.astype(x.dtype))

    def _drop(self, x: mx.array) -> mx.array:
        if self._key is None or self._dropout == 0:
            return x
        kept = mx.random.bernoulli(1 - self._dropout, x.shape, key=self._key)
        return x * (kept.astype(x.dtype) / (1 - self._dropout))


class DoraLinear(LoraLinear):
    """A frozen linear layer whose weight's direction and norms are trained apart: [..., in] → [..., out].

    As in PEFT, no gradient goes through ‖V‖, and dropout is on the input of what the adapter adds.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float) -> None:
        super().__init__(linear, rank, scale, dropout)
        weight = (dequantized(linear) if is_quantized(linear) else linear.weight).astype(mx.float32)
        self._squares = mx.square(weight).sum(axis=1)
        self.lora_magnitude_vector = mx.sqrt(self._squares)

    def __call__(self, x: mx.array) -> mx.array:
        dropped = self._drop(x)
        frozen = self._frozen(dropped)
        scaled = self._scale * (dropped @ self.lora_A.T.astype(x.dtype))
        directed = mx.addmm(frozen, scaled, self.lora_B.T.astype(x.dtype))
        result: mx.array = directed * (self.lora_magnitude_vector / mx.stop_gradient(self._norms())).astype(x.dtype)
        if dropped is not x:
            result = result + self.linear(x) - frozen
        elif "bias" in self.linear:
            result = result + self.linear.bias
        return result

    def _norms(self) -> mx.array:
        """‖V‖ of each row, without V: ‖W‖² + 2 s Σ B ∘ (W Aᵀ) + s² Σ B ∘ (B A Aᵀ)."""
        lora_A, lora_B = self.lora_A, self.lora_B
        mixed = (lora_B * self._frozen(lora_A).astype(mx.float32).T).sum(axis=1)
        updates = (lora_B * (lora_B @ (lora_A @ lora_A.T))).sum(axis=1)
        squares = self._squares + 2 * self._scale * mixed + self._scale**2 * updates
        return mx.where(squares > 0, mx.sqrt(mx.maximum(squares, 0)), 1)  # a row of zeros stays one

    def _frozen(self, x: mx.array) -> mx.array:
        """W x, without the bias."""
        result: mx.array = self.linear(x)
        return result - self.linear.bias if "bias" in self.linear else result


class LoraSwitchLinear(LoraLinear):
    """The linear layers of many experts, each with an update of its own; `indices` says which expert a token goes to."""

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:  # type: ignore[override]
        def product(x: mx.array, weight: mx.array) -> mx.array:
            weight = weight.astype(x.dtype).swapaxes(-1, -2)
            return mx.gather_mm(x, weight, rhs_indices=indices, sorted_indices=sorted_indices)

        update = product(self._scale * product(self._drop(x), self.lora_A), self.lora_B)
        frozen: mx.array = self.linear(x, indices, sorted_indices=sorted_indices)
        return frozen + update


class Lora:
    """The method `lora`.

    Parameters: `<module>.lora_A` [r, in] and `<module>.lora_B` [out, r], of the experts of a layer [experts, r, in] and
    [experts, out, r]. Modules have their names in transformers.
    """

    name: ClassVar = "lora"

    def __init__(self, settings: LoraSettings) -> None:
        self.settings = settings
        self.modules: dict[str, LoraLinear] = {}

    @classmethod
    def from_config(cls, config: TrainConfig) -> Lora:
        return cls(LoraSettings.from_config(config))

    def attach(self, model: nn.Module, seed: int) -> dict[str, mx.array]:
        """Wrap the target modules; A starts random from `seed`, B at zero.

        Raises:
            UserError: If a target names no linear module of the model.
        """
        linears = linear_modules(model)
        chosen = _chosen(list(linears), self.settings.targets)
        widest = max(max(weight_shape(linears[name][1])[-2:]) for name in chosen)
        if (most := max(self.settings.rank_of(name) for name in chosen)) > widest:
            what = f"{most} is more than the widest of these modules has features, {widest}"
            raise UserError(what, where="rank", hint="8 to 64 are usual")
        _check_patterns(self.settings, chosen)
        self.modules = {}
        for name in chosen:
            path, linear = linears[name]
            rank, scale = self.settings.rank_of(name), self.settings.scale_of(name)
            self.modules[name] = self._kind(name, linear)(linear, rank, scale, self.settings.dropout)
            _replace(model, path, self.modules[name])
        parameters = self._initial(seed)
        self.bind(model, parameters)
        return parameters

    def bind(self, model: nn.Module, parameters: dict[str, mx.array], key: mx.array | None = None) -> None:
        keys: list[mx.array | None] = [None] * len(self.modules)
        if key is not None and self.settings.dropout > 0:
            keys = list(mx.random.split(key, len(self.modules)))
        for (path, module), module_key in zip(self.modules.items(), keys, strict=True):
            given = {part: parameters[f"{path}.{part}"] for part in _PARTS if f"{path}.{part}" in parameters}
            if given:  # binding some of them, as a head does, leaves the others' dropout alone
                module.update(given)
                module._key = module_key

    def decayed(self, name: str) -> bool:
        return True

    def changed_shapes(self, parameters: dict[str, mx.array]) -> dict[str, tuple[int, ...]]:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
        pairs = {module: [parameters[f"{module}.{half}"] for half in HALVES] for module in modules}
        return {
            f"{module}.weight": (*lora_B.shape[:-1], lora_A.shape[-1]) for module, (lora_A, lora_B) in pairs.items()
        }

    def changed_weight(self, name: str, weight: mx.array, parameters: dict[str, mx.array]) -> mx.array:
        module = name.removesuffix(".weight")
        lora_A, lora_B = (parameters[f"{module}.{half}"] for half in HALVES)
        changed = weight.astype(mx.float32) + self.settings.scale_of(module) * (lora_B @ lora_A)
        magnitudes = parameters.get(f"{module}.{MAGNITUDE}")
        if magnitudes is None:
            return changed
        norms = mx.linalg.norm(changed, axis=1)
        return changed * (magnitudes / mx.where(norms == 0, 1, norms))[:, None]

    def _kind(self, name: str, linear: nn.Module) -> type[LoraLinear]:
        experts = isinstance(linear, EXPERTS)
        if self.settings.dora and experts:
            what = f"DoRA is not known for experts ({name})"
            raise UserError(what, where="target", hint="leave them out, as with --target attention")
        return LoraSwitchLinear if experts else DoraLinear if self.settings.dora else LoraLinear

    def _initial(self, seed: int) -> dict[str, mx.array]:
        parameters: dict[str, mx.array] = {}
        keys = mx.random.split(mx.random.key(seed), max(len(self.modules), 2))
        for (path, module), key in zip(self.modules.items(), keys, strict=False):
            shape = module.lora_A.shape
            if self.settings.init == "gaussian":
                lora_A = mx.random.normal(shape, scale=1 / shape[-2], key=key)
            else:
                # torch's kaiming_uniform_(a=sqrt(5)), which PEFT calls, is uniform within 1 / sqrt(in).
                bound = 1 / math.sqrt(shape[-1])
                lora_A = mx.random.uniform(-bound, bound, shape, key=key)
            parameters[f"{path}.lora_A"] = lora_A
            parameters[f"{path}.lora_B"] = mx.zeros_like(module.lora_B)
            if isinstance(module, DoraLinear):
                parameters[f"{path}.{MAGNITUDE}"] = module.lora_magnitude_vector
        return parameters


def detach(model: nn.Module) -> dict[str, LoraLinear]:
    """Take every adapter off a model; returns the modules that had one, by their paths."""
    taken = {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear)}
    for path, module in taken.items():
        _replace(model, path, module.linear)
    return taken


def put_back(model: nn.Module, modules: dict[str, LoraLinear]) -> None:
    """The inverse of `detach`."""
    for path, module in modules.items():
        _replace(model, path, module)


def _check_patterns(settings: LoraSettings, chosen: list[str]) -> None:
    """Raise `UserError` for a rank or an alpha of a module that is not trained."""
    for where in ("rank_pattern", "alpha_pattern"):
        for key in getattr(settings, where):
            if not any(is_named(name, key) for name in chosen):
                hint = f"these are: {', '.join(sorted({name.rpartition('.')[2] for name in chosen}))}"
                raise UserError(f"no module that is trained is named {key}", where=where, hint=hint)


def resolve_targets(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """The names in transformers of the modules that targets stand for, in the model's order.

    `all-linear` is every linear module but the output head, as in PEFT, and but the routers that choose experts, which are none there.
    """
    return _chosen(list(linear_modules(model)), targets)


def _chosen(names: list[str], targets: tuple[str, ...]) -> list[str]:
    routed = {name.partition(EXPERTS_PART)[0] for name in names if EXPERTS_PART in name}
    routers = {f"{block}.{router}" for block in routed for router in _ROUTERS}
    inner = [name for name in names if any(part.isdigit() for part in name.split(".")) and name not in routers]
    chosen: set[str] = set()
    for target in targets:
        if target in GROUPS:
            found = [n for n in inner if not GROUPS[target] or set(n.split(".")) & set(GROUPS[target])]
        else:
            found = [n for n in names if is_named(n, target)]
        if not found:
            known = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise UserError(
                f"no linear module of this model is named {target}",
                where="target",
                hint=f"it has {', '.join(known)}",
            )
        chosen.update(found)
    return [name for name in names if name in chosen]


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    owner: Any = model
    for part in parents:
        owner = owner[_key(owner, part)]
    owner[_key(owner, name)] = module


def _key(owner: Any, part: str) -> str | int:
    return int(part) if isinstance(owner, list) else part
