"""LoRA: y = W x + scale · B A x, with W frozen (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Names, start and scale are PEFT's, so that the files are. Knows nothing of files or of training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.config import TrainConfig
from mlx_sft.errors import UserError

HALVES = ("lora_A", "lora_B")
"""The last part of a parameter's name."""

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
    """

    rank: int
    alpha: float
    dropout: float
    rslora: bool
    targets: tuple[str, ...]
    init: str

    @classmethod
    def from_config(cls, config: TrainConfig) -> LoraSettings:
        targets = (config.target,) if isinstance(config.target, str) else tuple(config.target)
        return cls(config.rank, config.alpha, config.dropout, config.rslora, targets, config.init)

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, https://arxiv.org/abs/2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank update beside it: [..., in] → [..., out].

    The update is computed in the precision of the input, from float32 parameters.
    """

    def __init__(self, linear: nn.Linear, settings: LoraSettings) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear = linear
        out_features, in_features = linear.weight.shape
        self.lora_A = mx.zeros((settings.rank, in_features))
        self.lora_B = mx.zeros((out_features, settings.rank))
        self._scale = settings.scale
        self._dropout = settings.dropout
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


class Lora:
    """The method `lora`. Parameters: `<module>.lora_A` [r, in] and `<module>.lora_B` [out, r]."""

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
        paths = resolve_targets(model, self.settings.targets)
        linears = dict(_linears(model))
        widest = max(max(linears[path].weight.shape) for path in paths)
        if self.settings.rank > widest:
            what = f"{self.settings.rank} is more than the widest of these modules has features, {widest}"
            raise UserError(what, where="rank", hint="8 to 64 are usual")
        self.modules = {path: LoraLinear(linears[path], self.settings) for path in paths}
        for path, module in self.modules.items():
            _replace(model, path, module)
        parameters = self._initial(seed)
        self.bind(model, parameters)
        return parameters

    def bind(self, model: nn.Module, parameters: dict[str, mx.array], key: mx.array | None = None) -> None:
        keys: list[mx.array | None] = [None] * len(self.modules)
        if key is not None and self.settings.dropout > 0:
            keys = list(mx.random.split(key, len(self.modules)))
        for (path, module), module_key in zip(self.modules.items(), keys, strict=True):
            given = {half: parameters[f"{path}.{half}"] for half in HALVES if f"{path}.{half}" in parameters}
            if given:  # binding some of them, as a head does, leaves the others' dropout alone
                module.update(given)
                module._key = module_key

    def decayed(self, name: str) -> bool:
        return True

    def changed_shapes(self, parameters: dict[str, mx.array]) -> dict[str, tuple[int, ...]]:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
        pairs = {module: [parameters[f"{module}.{half}"] for half in HALVES] for module in modules}
        return {f"{module}.weight": (lora_B.shape[0], lora_A.shape[1]) for module, (lora_A, lora_B) in pairs.items()}

    def changed_weight(self, name: str, weight: mx.array, parameters: dict[str, mx.array]) -> mx.array:
        lora_A, lora_B = (parameters[f"{name.removesuffix('.weight')}.{half}"] for half in HALVES)
        return weight.astype(mx.float32) + self.settings.scale * (lora_B @ lora_A)

    def _initial(self, seed: int) -> dict[str, mx.array]:
        parameters: dict[str, mx.array] = {}
        keys = mx.random.split(mx.random.key(seed), max(len(self.modules), 2))
        for (path, module), key in zip(self.modules.items(), keys, strict=False):
            shape = module.lora_A.shape
            if self.settings.init == "gaussian":
                lora_A = mx.random.normal(shape, scale=1 / self.settings.rank, key=key)
            else:
                # torch's kaiming_uniform_(a=sqrt(5)), which PEFT calls, is uniform within 1 / sqrt(in).
                bound = 1 / math.sqrt(shape[1])
                lora_A = mx.random.uniform(-bound, bound, shape, key=key)
            parameters[f"{path}.lora_A"] = lora_A
            parameters[f"{path}.lora_B"] = mx.zeros_like(module.lora_B)
        return parameters


def resolve_targets(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """The paths of the modules that targets stand for, in the model's order.

    `all-linear` is, as in PEFT, every linear module but the output head.
    """
    paths = [path for path, _ in _linears(model)]
    inner = [path for path in paths if any(part.isdigit() for part in path.split("."))]
    chosen: set[str] = set()
    for target in targets:
        if target in GROUPS:
            found = [p for p in inner if not GROUPS[target] or set(p.split(".")) & set(GROUPS[target])]
        else:
            found = [p for p in paths if p == target or p.endswith(f".{target}")]
        if not found:
            names = sorted({p.rsplit(".", 1)[-1] for p in paths})
            raise UserError(
                f"no linear module of this model is named {target}",
                where="target",
                hint=f"it has {', '.join(names)}",
            )
        chosen.update(found)
    return [path for path in paths if path in chosen]


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    found = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    yield from sorted(found.items(), key=lambda item: _natural(item[0]))


def _natural(path: str) -> list[tuple[int, str]]:
    """`layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    owner: Any = model
    for part in parents:
        owner = owner[_key(owner, part)]
    owner[_key(owner, name)] = module


def _key(owner: Any, part: str) -> str | int:
    return int(part) if isinstance(owner, list) else part
