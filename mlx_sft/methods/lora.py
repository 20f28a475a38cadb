"""LoRA: y = W x + scale · B A x, with W frozen (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

DoRA: the rows of V = W + scale · B A are given norms m of their own, y = m / ‖V‖ · V x (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
Names, start and scale are PEFT's, and so are the files (`peft_files`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from mlx_sft.errors import USAGE, UserError
from mlx_sft.methods import Method, Parameters, Rows, WeightEdit, mlx_lm_files
from mlx_sft.methods.also_train import (
    WholeModules,
    forget_originals,
    is_whole,
    new_weights,
    put_back,
    tied_weight,
    whole_modules,
)
from mlx_sft.methods.full import is_decayed
from mlx_sft.methods.layers import in_layers
from mlx_sft.methods.lora_layers import DoraLinear, LoraLinear, LoraSwitchLinear
from mlx_sft.methods.lora_settings import GROUPS, HALVES, MAGNITUDE, LoraSettings, is_lora, is_named
from mlx_sft.methods.peft_files import CONFIG, base_model_name, names_begin, read_adapter, write_adapter
from mlx_sft.methods.peft_rules import in_a_layer
from mlx_sft.methods.token_rows import TokenRows, TrainedRows, changed_rows, on_model, row_edits, weights_of_rows
from mlx_sft.model.head import HEAD, embedding_names, floating_weights
from mlx_sft.model.linears import is_experts, is_joined, linear_modules, weight_shape
from mlx_sft.model.names import EXPERTS_PART
from mlx_sft.model.vocabulary import EMBEDDINGS

_PARTS = (*HALVES, MAGNITUDE)

_ROUTERS = ("gate", "router")
"""What the module beside experts is called that chooses among them."""


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
            norms = np.linalg.norm(update, axis=1)
            update *= (self.magnitudes[start:stop] / np.where(norms == 0, 1, norms))[:, None]
        return update


class Lora(Method):
    """The method `lora`.

    Parameters: `<module>.lora_A` [r, in] and `<module>.lora_B` [out, r], of the experts of a layer [experts, r, in] and
    [experts, out, r]; with DoRA `<module>.lora_magnitude_vector` [out]. Modules have their names in transformers.
    """

    name: ClassVar = "lora"
    Settings: ClassVar = LoraSettings
    mergeable: ClassVar = True
    mlx_lm: ClassVar = mlx_lm_files
    peft: ClassVar = True
    starts_in_trl: ClassVar = True
    settings: LoraSettings

    def __init__(self, settings: LoraSettings | None = None) -> None:
        super().__init__(settings)
        self.modules: dict[str, LoraLinear] = {}
        self._whole = WholeModules()
        self._rows = TrainedRows()
        self._dtype = mx.float32
        """Of the model."""
        self._begins: str | None = None
        """How names begin in the file that it was read from."""

    @property
    def uses_dropout(self) -> bool:
        return self.settings.dropout > 0

    def for_new_tokens(self, token_ids: Sequence[int], *, from_adapter: bool) -> dict[str, Any]:
        asked, also = self.settings.train_new_tokens, {name.rpartition(".")[2] for name in self.settings.also_train}
        if asked is True and not token_ids:
            what = "--train-new-tokens, and there are no new tokens"
            raise UserError(what, where="train_new_tokens", hint="name them with --add-tokens FILE", exit_code=USAGE)
        if asked is True:
            return {"train_new_tokens": {role: list(token_ids) for role in (EMBEDDINGS, HEAD)}}
        if token_ids and not (asked or from_adapter or also & {name.rpartition(".")[2] for name in embedding_names()}):
            what = "nothing would train the embeddings of the new tokens, so that they would mean nothing"
            hint = f"give --train-new-tokens, or --also-train {EMBEDDINGS},{HEAD}"
            raise UserError(what, where="add_tokens", hint=hint, exit_code=USAGE)
        return {}

    def attach(self, model: nn.Module, seed: int) -> Parameters:
        """Wrap the target modules; A starts random from `seed`, B at zero.

        Raises:
            UserError: If a target names no linear module of the model.
        """
        self._dtype = next(iter(floating_weights(model).values())).dtype
        linears = linear_modules(model)
        chosen = _adapted(model, self.settings)
        widest = max(max(weight_shape(linears[name][1])[-2:]) for name in chosen)
        if (most := max(self.settings.rank_of(name) for name in chosen)) > widest:
            what = f"{most} is more than the widest of these modules has features, {widest}"
            raise UserError(what, where="rank", hint="8 to 64 are usual")
        _check_patterns(self.settings, chosen)
        in_full = [name for name, _, _ in whole_modules(model, self.settings.also_train)]
        stated = on_model(model, self.settings.token_rows, in_full) or False
        self.settings = self.settings.model_copy(update={"train_new_tokens": stated})
        self.modules = {}
        for name in chosen:
            path, linear = linears[name]
            rank, scale = self.settings.rank_of(name), self.settings.scale_of(name)
            self.modules[name] = self._kind(name, linear)(linear, rank, scale, self.settings.dropout)
            _replace(model, path, self.modules[name])
        whole = self._whole.attach(model, self._dtype, self.settings.also_train, _replace)
        whole |= self._rows.attach(model, self._dtype, self.settings.token_rows, _replace)
        # Whole weights first: MLX computes gradients in this order, and those of embeddings last would find all others still there.
        parameters = whole | self._initial(seed)
        self.bind(model, parameters)
        return parameters

    def bind(self, model: nn.Module, parameters: Parameters, key: mx.array | None = None) -> None:
        keys: list[mx.array | None] = [None] * len(self.modules)
        if key is not None and self.settings.dropout > 0:
            keys = list(mx.random.split(key, len(self.modules)))
        for (path, module), module_key in zip(self.modules.items(), keys, strict=True):
            given = {part: parameters[f"{path}.{part}"] for part in _PARTS if f"{path}.{part}" in parameters}
            if given:  # binding some of them, as a head does, leaves the others' dropout alone
                module.update(given)
                module.drop_with(module_key)
        self._whole.bind(parameters)
        self._rows.bind(parameters)

    def rounded(self, parameters: Parameters) -> Parameters:
        if self._dtype == mx.float32:
            return parameters
        return {
            name: self._of(name).rounded(name.rpartition(".")[2], value, self._dtype) if is_lora(name) else value
            for name, value in parameters.items()
        }

    def unrounded(self, gradients: Parameters) -> Parameters:
        if self._dtype == mx.float32:
            return gradients
        return {
            name: self._of(name).unrounded(name.rpartition(".")[2], value) if is_lora(name) else value
            for name, value in gradients.items()
        }

    def _of(self, parameter: str) -> LoraLinear:
        return self.modules[parameter.rpartition(".")[0]]

    @staticmethod
    def detach(model: nn.Module) -> Callable[[], None]:
        taken = {path: module for path, module in model.named_modules() if isinstance(module, LoraLinear | TokenRows)}
        for path, module in taken.items():
            _replace(model, path, module.frozen if isinstance(module, TokenRows) else module.linear)
        put_whole_back = put_back(model, _replace)

        def again() -> None:
            for path, module in taken.items():
                _replace(model, path, module)
            put_whole_back()

        return again

    def release(self, model: nn.Module) -> None:
        forget_originals(model)

    def changed_shapes(self, parameters: Parameters) -> Mapping[str, tuple[int, ...] | None]:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in parameters if is_lora(name))
        pairs = {module: [parameters[f"{module}.{half}"] for half in HALVES] for module in modules}
        return (
            {f"{module}.weight": (*lora_B.shape[:-1], lora_A.shape[-1]) for module, (lora_A, lora_B) in pairs.items()}
            | {name: value.shape for name, value in parameters.items() if is_whole(name)}
            | dict.fromkeys(weights_of_rows(parameters))
        )

    def changed_weight(self, name: str, weight: mx.array, parameters: Parameters) -> mx.array:
        if name in parameters:
            return parameters[name]
        if name in weights_of_rows(parameters):
            return changed_rows(weight, name, parameters, self.settings.token_rows)
        module = name.removesuffix(".weight")
        lora_A, lora_B = (parameters[f"{module}.{half}"] for half in HALVES)
        changed = weight.astype(mx.float32) + self.settings.scale_of(module) * (lora_B @ lora_A)
        magnitudes = parameters.get(f"{module}.{MAGNITUDE}")
        if magnitudes is None:
            return changed
        norms = mx.linalg.norm(changed, axis=1)
        return changed * (magnitudes / mx.where(norms == 0, 1, norms))[:, None]

    @classmethod
    def edits(cls, folder: Path) -> dict[str, WeightEdit]:
        method, parameters = cls.read(folder)
        edits = new_weights(parameters, method.settings.also_train)
        tied = isinstance(method.settings.train_new_tokens, list)
        edits |= row_edits(parameters, method.settings.token_rows, tied=tied)
        for name, shape in method.changed_shapes(parameters).items():
            if name in edits:
                continue
            module = name.removesuffix(".weight")
            lora_A, lora_B = (np.array(parameters[f"{module}.{half}"], np.float32) for half in HALVES)
            norms = parameters.get(f"{module}.{MAGNITUDE}")
            magnitudes = None if norms is None else np.array(norms, np.float32)
            scale = method.settings.scale_of(module)
            edits[name] = LowRankUpdate(shape=shape, lora_A=lora_A, lora_B=lora_B, scale=scale, magnitudes=magnitudes)
        return edits

    def write(self, folder: Path, parameters: Parameters, base_model: str, revision: str | None = None) -> None:
        write_adapter(folder, self.settings, parameters, base_model, revision, self._begins)

    def written_bytes(self, parameters: Parameters) -> int:
        tied = tied_weight(parameters, self.settings.also_train)
        return super().written_bytes(parameters) + (0 if tied is None else tied.nbytes)

    @classmethod
    def read(cls, folder: Path) -> tuple[Lora, Parameters]:
        settings, parameters = read_adapter(folder)
        method = cls(settings)
        method._begins = names_begin(folder)
        return method, parameters

    @classmethod
    def recognizes(cls, folder: Path) -> bool:
        return (folder / CONFIG).is_file()

    @classmethod
    def base_model(cls, folder: Path) -> str:
        return base_model_name(folder)

    def decides(self, where: Path) -> dict[str, Any]:
        if min(self.settings.alpha, *self.settings.alpha_pattern.values(), 1.0) <= 0:
            what = "its alpha is not above 0, so that it could not be trained"
            raise UserError(what, where=str(where), hint="start from another adapter")
        return self.settings.model_dump(exclude={"dropout", "init"})

    def decayed(self, name: str) -> bool:
        """Of a weight of the model as transformers' Trainer has it."""
        return is_lora(name) or is_decayed(name)

    def drops(self, name: str) -> bool:
        return self.uses_dropout and is_lora(name)

    def agrees(self, model: nn.Module, name: str, given: Any) -> bool:
        if name == "also_train":
            asked_for, own_ones = (whole_modules(model, names) for names in (given, self.settings.also_train))
            return [name for name, _, _ in asked_for] == [name for name, _, _ in own_ones]
        if name == "train_new_tokens":
            theirs = {name for name, _, _ in whole_modules(model, self.settings.also_train)}
            asked_rows = self.settings.model_copy(update={"train_new_tokens": given}).token_rows
            return on_model(model, asked_rows, theirs) == on_model(model, self.settings.token_rows, theirs)
        if name not in ("target", "layers"):
            return super().agrees(model, name, given)
        asked = self.settings.model_copy(update={name: given})  # `all-linear` may be the names in the file
        return _adapted(model, asked) == _adapted(model, self.settings)

    def not_in_trl(self) -> str:
        if self.settings.also_train:
            return "the moments of weights that --also-train names would not come back"
        if self.settings.train_new_tokens:
            return "the moments of new tokens' rows would not come back, nor would the vocabulary grow there"
        return "DoRA starts from the norms of the weights, which it would compute anew" if self.settings.dora else ""

    @property
    def title(self) -> str:
        return "DoRA" if self.settings.dora else "LoRA"

    def describe(self) -> str:
        settings = self.settings
        stabilized = ", rank-stabilized" if settings.rslora else ""
        own = "; modules with ranks or alphas of their own" if settings.rank_pattern or settings.alpha_pattern else ""
        kinds = dict.fromkeys(map(in_a_layer, settings.targets))
        targets = ", ".join(f"`{target}`" for target in kinds)
        if len(kinds) < len(settings.targets):  # each module by its whole name
            targets += f" ({len(settings.targets)} modules)"
        names = ", ".join(f"`{name}`" for name in settings.also_train)
        also = f"; {names} trained in full" if names else ""
        rows = max(map(len, settings.token_rows.values()), default=0)
        also += f"; the rows of {rows} tokens in embeddings and head" if rows else ""
        layers = f" of the layers `{settings.layers}`" if settings.layers else ""
        return (
            f"{self.title}, rank {settings.rank}, alpha {settings.alpha:g}{stabilized}, on {targets}{layers}{own}{also}"
        )

    def _kind(self, name: str, linear: nn.Module) -> type[LoraLinear]:
        experts = is_experts(linear)
        if self.settings.dora and experts:
            what = f"DoRA is not known for experts ({name})"
            raise UserError(what, where="target", hint="leave them out, as with --target attention")
        return LoraSwitchLinear if experts else DoraLinear if self.settings.dora else LoraLinear

    def _initial(self, seed: int) -> Parameters:
        parameters: Parameters = {}
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


def _check_patterns(settings: LoraSettings, chosen: list[str]) -> None:
    """Raise `UserError` for a rank or an alpha of a module that is not trained."""
    for where in ("rank_pattern", "alpha_pattern"):
        for key in getattr(settings, where):
            if not any(is_named(name, key) for name in chosen):
                hint = f"these are: {', '.join(sorted({name.rpartition('.')[2] for name in chosen}))}"
                raise UserError(f"no module that is trained is named {key}", where=where, hint=hint)


def _adapted(model: nn.Module, settings: LoraSettings) -> list[str]:
    """The names in transformers of the modules that get an adapter, in the model's order."""
    in_full = {name for name, _, _ in whole_modules(model, settings.also_train)}
    linears = linear_modules(model)
    names = in_layers(model, linears, settings.layers)
    return _chosen({name: linears[name] for name in names if name not in in_full}, settings.targets)


def resolve_targets(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """The names in transformers of the modules that targets stand for, in the model's order.

    `all-linear` is every linear module but the output head, as in PEFT, but the routers that choose experts, which are none there, and but
    those whose weights the checkpoint holds inside of other tensors.
    """
    return _adapted(model, LoraSettings(target=list(targets)))


def _chosen(linears: Mapping[str, tuple[str, nn.Module]], targets: tuple[str, ...]) -> list[str]:
    names = list(linears)
    routed = {name.partition(EXPERTS_PART)[0] for name in names if EXPERTS_PART in name}
    routers = {f"{block}.{router}" for block in routed for router in _ROUTERS}
    joined = {name for name, (_, module) in linears.items() if is_joined(module)}
    numbered = (name for name in names if any(part.isdigit() for part in name.split(".")))
    inner = [n for n in numbered if n not in joined and not any(f"{n}.".startswith(f"{router}.") for router in routers)]
    chosen: set[str] = set()
    for target in targets:
        if target in GROUPS:
            found = [n for n in inner if not GROUPS[target] or set(n.split(".")) & set(GROUPS[target])]
        else:
            named = [n for n in names if is_named(n, target)]
            found = [n for n in named if n not in joined] or named
        if not found:
            if joined.issuperset(names):
                what = "this checkpoint holds the weights of all linear modules inside of other tensors, or under other names"
                raise UserError(what, where="target", hint="nothing could be merged into them; train another model")
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
