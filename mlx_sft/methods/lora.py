"""LoRA: y = W x + scale · B A x, with W frozen (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

DoRA: the rows of V = W + scale · B A are given norms m of their own, y = m / ‖V‖ · V x (Liu et al. 2024, https://arxiv.org/abs/2402.09353).
Names, start and scale are PEFT's, and so are the files (`peft_files`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_sft.errors import USAGE, UserError
from mlx_sft.methods import Method, Parameters, WeightEdit, mlx_lm_files
from mlx_sft.methods.also_train import (
    ORIGINAL,
    Place,
    attach_whole,
    is_whole,
    new_weights,
    tied_weight,
    whole_modules,
)
from mlx_sft.methods.full import is_decayed
from mlx_sft.methods.lora_edits import LowRankUpdate, as_one_weight, scaled_updates, weight_halves
from mlx_sft.methods.lora_layers import BESIDE, DoraLinear, LoraEmbedding, LoraLinear, LoraTiedHead
from mlx_sft.methods.lora_settings import FACTORED, HALVES, MAGNITUDE, LoraSettings, is_embedding, is_lora
from mlx_sft.methods.lora_shards import beside_part, refuse_whole
from mlx_sft.methods.lora_starts import (
    as_plain,
    copies,
    fixed_names,
    rate_of,
    split_kept,
    start_in_peft,
    started,
    with_start,
)
from mlx_sft.methods.lora_targets import adaptable, adapted_modules, check_patterns, check_ranks, in_words
from mlx_sft.methods.peft_files import CONFIG, base_model_name, read_adapter, read_beside, read_config, write_adapter
from mlx_sft.methods.peft_forms import on_modules, refuse_moved_base, refuse_other_copies
from mlx_sft.methods.token_rows import TokenRows, attach_rows, changed_rows, on_model, row_edits, weights_of_rows
from mlx_sft.model.head import EMBEDDING_KINDS, HEAD, floating_weights, tied_embedding
from mlx_sft.model.linears import is_experts, is_quantized, weight_shape
from mlx_sft.model.outline import is_outline
from mlx_sft.model.quantize import plain_weight
from mlx_sft.model.vocabulary import EMBEDDINGS

_PARTS = (*HALVES, MAGNITUDE)


class Lora(Method):
    """The method `lora`.

    Parameters: `<module>.lora_A` [r, in] and `<module>.lora_B` [out, r], of the experts of a layer [experts, r, in] and
    [experts, out, r]; with DoRA `<module>.lora_magnitude_vector` [out], or [experts, out]. Modules have their names in transformers.
    """

    name: ClassVar = "lora"
    Settings: ClassVar = LoraSettings
    mergeable: ClassVar = True
    mlx_lm: ClassVar = mlx_lm_files
    peft: ClassVar = True
    starts_in_trl: ClassVar = True
    short_names: ClassVar = {"r": "rank"}
    variants: ClassVar = {"dora": {"dora": True}, "rslora": {"rslora": True}} | {
        init: {"init": init} for init in FACTORED
    }
    settings: LoraSettings

    def __init__(self, settings: LoraSettings | None = None) -> None:
        super().__init__(settings)
        self.modules: dict[str, LoraLinear] = {}
        self._places: dict[str, Place] = {}
        """Of the weights and rows that are trained as they are."""
        self._dtype = mx.float32
        """Of the model."""
        self.names_begin: str | None = None
        """How names begin in the file that it was read from."""
        self.base_copies: dict[str, mx.array] = {}
        """Weights of the base that the file holds copies of, by the names of their modules."""
        self.on_parameters: frozenset[str] = frozenset()
        """Modules in the names of the parameters that are in truth parameters, of all experts of a layer."""
        self._as_in_mlx_lm = False
        """Whether the file is mlx-lm's, where an adapter on embeddings changes a tied head too."""
        self._start: Parameters = {}
        """The halves that training starts with, where these are factors of the weights."""
        self._shared = ""
        """A parameter of the file that two modules have in common here."""

    @property
    def uses_dropout(self) -> bool:
        return self.settings.dropout > 0

    def for_new_tokens(self, token_ids: Sequence[int], *, from_adapter: bool) -> dict[str, Any]:
        asked = self.settings.train_new_tokens
        if asked is True and not token_ids:
            what = "--train-new-tokens, and there are no new tokens"
            raise UserError(what, where="train_new_tokens", hint="name them with --add-tokens FILE", exit_code=USAGE)
        if asked is True:
            return {"train_new_tokens": {role: list(token_ids) for role in (EMBEDDINGS, HEAD)}}
        if token_ids and not (asked or from_adapter or any(map(is_embedding, self.settings.also_train))):
            what = "nothing would train the embeddings of the new tokens, so that they would mean nothing"
            hint = f"give --train-new-tokens, or --also-train {EMBEDDINGS},{HEAD}"
            raise UserError(what, where="add_tokens", hint=hint, exit_code=USAGE)
        return {}

    def attach(self, model: nn.Module, seed: int) -> Parameters:
        """Wrap the target modules; A starts random from `seed`, B at zero, or both start from the factors of the weight.

        Raises:
            UserError: If a target names no linear module of the model, or one of fewer features than the rank.
        """
        self._dtype = next(iter(floating_weights(model).values())).dtype
        linears = adaptable(model)
        chosen = adapted_modules(model, self.settings)
        check_ranks(self.settings, [weight_shape(linears[name][1]) for name in chosen], chosen)
        check_patterns(self.settings, chosen)
        refuse_whole(model, linears, chosen, self.settings)
        in_full = [name for name, _, _ in whole_modules(model, self.settings.also_train)]
        stated = on_model(model, self.settings.token_rows, in_full, chosen) or False
        self.settings = self.settings.model_copy(update={"train_new_tokens": stated})
        self.modules = {}
        for name in chosen:
            path, linear = linears[name]
            shape = self.settings.width_of(name), self.settings.scale_of(name), self.settings.dropout
            kind = self._kind(name, linear)
            if kind is LoraTiedHead:  # around the embeddings, whatever they have of their own
                inner = next((one for one in self.modules.values() if one.linear is linear), linear)
                self.modules[name] = LoraTiedHead(inner, *shape, weight_shape(linear))
            else:
                self.modules[name] = kind(linear, *shape)
            _put(model, path, self.modules[name])
        self._start = {}
        self._places = attach_whole(model, self._dtype, self.settings.also_train)
        self._places |= attach_rows(model, self._dtype, self.settings.token_rows)
        whole = {name: module[part].astype(mx.float32) for name, (module, part, _) in self._places.items()}
        # Whole weights first: MLX computes gradients in this order, and those of embeddings last would find all others still there.
        parameters = whole | self._initial(model, seed)
        self.bind(model, parameters)
        return parameters

    def bind(self, model: nn.Module, parameters: Parameters, key: mx.array | None = None) -> None:
        keys: list[mx.array | None] = [None] * len(self.modules)
        if key is not None and self.settings.dropout > 0:
            keys = list(mx.random.split(key, len(self.modules)))
        for (path, module), module_key in zip(self.modules.items(), keys, strict=True):
            names = {part: f"{path}.{part}" for part in _PARTS if f"{path}.{part}" in parameters}
            given = {part: with_start(module, name, parameters[name], self._start) for part, name in names.items()}
            if given:  # binding some of them, as a head does, leaves the others' dropout alone
                module.update(given)
                module.drop_with(module_key)
        for name, (place, part, dtype) in self._places.items():
            if name in parameters:
                place[part] = parameters[name].astype(dtype)

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
        taken = {path: module for path, module in model.named_modules() if _before(module) is not None}
        taken = dict(sorted(taken.items()))  # a tied head before the embeddings inside of it
        for path, module in reversed(taken.items()):
            _put(model, path, _before(module))

        def again() -> None:
            for path, module in taken.items():
                _put(model, path, module)

        return again

    def release(self, model: nn.Module) -> None:
        for module in model.modules():
            vars(module).pop(ORIGINAL, None)

    def changed_shapes(self, parameters: Parameters) -> Mapping[str, tuple[int, ...] | None]:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in parameters if is_lora(name))
        pairs = {module: weight_halves(module, parameters) for module in modules}
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
        lora_A, lora_B = weight_halves(module, parameters)
        changed = weight.astype(mx.float32) + self.settings.scale_of(module) * (lora_B @ lora_A)
        magnitudes = parameters.get(f"{module}.{MAGNITUDE}")
        if magnitudes is None:
            return changed
        norms = mx.linalg.norm(changed, axis=-1)
        return changed * (magnitudes / mx.where(norms == 0, 1, norms))[..., None]

    def scaled(self, parameters: Parameters, strength: float) -> Parameters:
        return scaled_updates(parameters, strength)

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
            lora_A, lora_B = (np.array(half, np.float32) for half in weight_halves(module, parameters))
            norms = parameters.get(f"{module}.{MAGNITUDE}")
            magnitudes = None if norms is None else np.array(norms, np.float32)
            scale = method.settings.scale_of(module)
            edits[name] = LowRankUpdate(shape=shape, lora_A=lora_A, lora_B=lora_B, scale=scale, magnitudes=magnitudes)
        return as_one_weight(edits)

    def write(self, folder: Path, parameters: Parameters, base_model: str, revision: str | None = None) -> None:
        settings, parameters = as_plain(self.settings, parameters, self._start)
        write_adapter(folder, settings, parameters, base_model, revision, self.names_begin)

    def written_bytes(self, parameters: Parameters) -> int:
        tied = tied_weight(parameters, self.settings.also_train)
        return super().written_bytes(parameters | self.fixed) + (0 if tied is None else tied.nbytes)

    @classmethod
    def read(cls, folder: Path) -> tuple[Lora, Parameters]:
        if mlx_lm_files.holds_adapter(folder):
            settings, parameters = mlx_lm_files.read_adapter(folder)
            method = cls(settings)
            method._as_in_mlx_lm = True
            return method, parameters
        settings, parameters = read_adapter(folder)
        method = cls(settings)
        method.names_begin, method.base_copies, method.on_parameters = read_beside(folder)
        return method, parameters

    @classmethod
    def read_plain(cls, folder: Path) -> tuple[Lora, Parameters]:
        """As `read`; raises `UserError` for an adapter whose start PEFT took out of the base."""
        refuse_moved_base(read_config(folder / CONFIG), folder / CONFIG)
        return cls.read(folder)

    def needs_model(self, trained: Parameters) -> bool:
        """Whether `of_model` has something to do."""
        turned = self._as_in_mlx_lm and any(is_embedding(name.rpartition(".")[0]) for name in trained)
        return bool(self.base_copies or self.on_parameters or turned or self.settings.factored)

    def of_model(self, model: nn.Module, trained: Parameters, where: Path) -> Parameters:
        """What was trained on a parameter of all experts, on their modules; mlx-lm's adapter on tied embeddings, on both uses of them;
        and one whose start PEFT took out of the base, on the base as it is."""
        if self.base_copies and not is_outline(model):
            places = {name: module for name, (_, module) in adaptable(model).items() if name in self.base_copies}
            weights = {name: plain_weight(module) for name, module in places.items()}
            refuse_other_copies(self.base_copies, weights, where, rounded=any(map(is_quantized, places.values())))
        if self.on_parameters:
            of_modules = on_modules(model, self.settings, trained, self.on_parameters)
            self.settings, trained, self._shared = of_modules
        if self.settings.factored:
            start = start_in_peft(self.settings, adaptable(model), trained, where, known=not is_outline(model))
            self.settings, trained = as_plain(self.settings, trained, start)
        tied = tied_embedding(model)
        if self._as_in_mlx_lm and f"{tied}.lora_A" in trained:
            halves = {f"{HEAD}.lora_A": trained[f"{tied}.lora_B"].T, f"{HEAD}.lora_B": trained[f"{tied}.lora_A"].T}
            trained = trained | halves
            self.settings = self.settings.model_copy(update={"target": [*self.settings.targets, HEAD]})
        return trained

    @classmethod
    def recognizes(cls, folder: Path) -> bool:
        return (folder / CONFIG).is_file()

    @classmethod
    def base_model(cls, folder: Path) -> str:
        if mlx_lm_files.holds_adapter(folder):
            return mlx_lm_files.base_model_name(folder)
        return base_model_name(folder)

    def decides(self, where: Path) -> dict[str, Any]:
        if min(self.settings.alpha, *self.settings.alpha_pattern.values(), 1.0) <= 0:
            what = "its alpha is not above 0, so that it could not be trained"
            raise UserError(what, where=str(where), hint="start from another adapter")
        if self._shared:
            what = f"its adapter on {self._shared} has one A for the gates and the up projections, which each would train one of its own"
            hint = "merge it with PEFT's merge_and_unload, and train the merged model"
            raise UserError(what, where=str(where), hint=hint)
        return self.settings.model_dump(exclude={"dropout", "lora_plus_ratio", "lora_plus_embedding_lr", "shard_base"})

    def decayed(self, name: str) -> bool:
        """Of a weight of the model as transformers' Trainer has it."""
        return is_lora(name) or is_decayed(name)

    def rate(self, name: str, peak: float) -> float:
        return rate_of(self.settings, name, peak)

    @property
    def fixed(self) -> Parameters:
        return fixed_names(self._start)

    def take_up(self, kept: Parameters) -> Parameters:
        parameters, self._start = split_kept(kept)
        return parameters

    def of_checkpoint(self, kept: Parameters) -> tuple[Lora, Parameters]:
        parameters = self.take_up(kept)
        settings, parameters = as_plain(self.settings, parameters, self._start)
        return type(self)(settings), parameters

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
        if name == "init":
            return given not in FACTORED  # the others differ at zero alone, where this one is not
        if name not in ("target", "layers"):
            return super().agrees(model, name, given)
        asked = self.settings.model_copy(update={name: given})  # `all-linear` may be the names in the file
        return adapted_modules(model, asked) == adapted_modules(model, self.settings)

    def not_in_trl(self) -> str:
        if self.settings.also_train:
            return "the moments of weights that --also-train names would not come back"
        if self.settings.train_new_tokens:
            return "the moments of new tokens' rows would not come back, nor would the vocabulary grow there"
        if self.settings.factored or self.settings.lora_plus_ratio is not None:
            return "the script knows no start from factors of the weights (--init) and no rate of B's own (--lora-plus-ratio)"
        return "DoRA starts from the norms of the weights, which it would compute anew" if self.settings.dora else ""

    @property
    def title(self) -> str:
        return "DoRA" if self.settings.dora else "LoRA"

    def describe(self) -> str:
        return f"{self.title}, {in_words(self.settings)}"

    def _kind(self, name: str, linear: nn.Module) -> type[LoraLinear]:
        experts, embeds = is_experts(linear), isinstance(linear, EMBEDDING_KINDS)
        unknown = f"--init {self.settings.init}" if self.settings.factored else "DoRA" if self.settings.dora else ""
        if unknown and embeds:
            what = f"{unknown} is not known for embeddings ({name})"
            raise UserError(what, where="target", hint="leave them out, as with --target all-linear")
        if embeds:
            return LoraTiedHead if name == HEAD else LoraEmbedding
        return beside_part(linear) or BESIDE[experts, self.settings.dora]

    def _initial(self, model: nn.Module, seed: int) -> Parameters:
        parameters: Parameters = {}
        known = self.settings.factored and not (self.begun or is_outline(model))
        keys = mx.random.split(mx.random.key(seed), max(len(self.modules), 2))
        for (path, module), key in zip(self.modules.items(), keys, strict=False):
            half_shapes = module.lora_A.shape, module.lora_B.shape
            halves = started(self.settings, path, half_shapes, plain_weight(module.linear) if known else None, key)
            parameters |= halves
            if isinstance(module, DoraLinear):
                parameters[f"{path}.{MAGNITUDE}"] = module.lora_magnitude_vector
            if self.settings.factored:
                self._start |= copies(halves)
        return parameters


def _put(model: nn.Module, path: str, module: Any) -> None:
    model.update_modules(tree_unflatten([(path, module)]))


def _before(module: Any) -> Any:
    """What was in a model where a module of this method's is now; None for any other module."""
    if isinstance(module, LoraLinear):
        return module.linear
    return module.frozen if isinstance(module, TokenRows) else vars(module).get(ORIGINAL)
