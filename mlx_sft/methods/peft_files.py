"""LoRA adapters ⇄ PEFT's own files, so that PyTorch opens them as they are.

```
adapter_config.json         settings, complete enough for `PeftModel.from_pretrained`
adapter_model.safetensors   base_model.model.<module>.lora_A.weight [r, in] and .lora_B.weight [out, r], float32; with DoRA
                            .lora_magnitude_vector [out]; and the weights of modules that are trained in full, `modules_to_save`
```
Modules have the names of the class with which transformers opens the base; read, they have those of the text alone, whichever class an
adapter was trained on. Each expert of a layer has its own, as it has a module of its own in transformers 4; PEFT puts them together for
transformers 5.
Equal adapters give byte-identical files. Whether an adapter fits a model is for `attach_trained` to say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlx_sft.errors import UserError
from mlx_sft.files import read_json, to_json
from mlx_sft.gate import checked
from mlx_sft.methods.also_train import is_whole, modules_to_save, saved_modules, saved_weight, tied_weight
from mlx_sft.methods.layers import layers_of_config, layers_to_transform
from mlx_sft.methods.lora_settings import FACTORED, HALVES, MAGNITUDE, LoraSettings, is_lora
from mlx_sft.methods.peft_base import peft_base
from mlx_sft.methods.peft_forms import (
    copied_module,
    is_on_parameter,
    of_parameter,
    plain_name,
    read_copy,
    refuse_moved_base,
    stacked,
    stored_name,
    target_parameters,
)
from mlx_sft.methods.peft_rules import (
    LONGEST_NAME,
    MOST_FEATURES,
    Loss,
    PeftBase,
    for_each_expert,
    losses,
    of_modules,
    target_modules,
    targets_in_file,
    together,
)
from mlx_sft.methods.token_rows import indices, is_frozen_copy, is_rows, read_indices
from mlx_sft.model.head import HEAD_WEIGHT
from mlx_sft.model.names import INSIDE, Opening, expert_name, split_expert, transformers_name
from mlx_sft.near_paths import instead_of_adapter
from mlx_sft.safetensors_file import SafetensorsFile, StoredTensor, open_safetensors, read_float32, write_arrays
from mlx_sft.settings import first_problem
from mlx_sft.writing import make_folder, write_file, write_file_with

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PREFIX, _SUFFIX = "base_model.model.", ".weight"

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", *FACTORED, None),
    "layer_replication": ([], None),
    "alora_invocation_tokens": ([], None),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "megatron_config": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
}
"""PEFT's settings that change what an adapter computes, with the values that mean LoRA or DoRA."""


class _Stated(BaseModel):
    """PEFT's settings that are read as numbers and switches. What training would refuse (an alpha of 0) can still be merged."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    r: int = Field(ge=1)
    lora_alpha: float
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    use_rslora: bool | None = False
    use_dora: bool | None = False
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None
    ensure_weight_tying: bool | None = False


def peft_name(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.lora_A` → PEFT's name of the same tensor."""
    stored = stored_name(name)
    return f"{_PREFIX}{stored}{_SUFFIX}" if stored.rpartition(".")[2] in HALVES else f"{_PREFIX}{stored}"


def our_name(name: str) -> str:
    """The inverse of `peft_name`, of the names in any class; raises `ValueError` for one that is not a LoRA matrix of a linear module."""
    return transformers_name(_stripped(name))


def _stripped(name: str) -> str:
    stripped = plain_name(name.removeprefix(_PREFIX).removesuffix(_SUFFIX))
    if peft_name(stripped) != name or not (is_lora(stripped) or is_rows(stripped)) or "." not in stripped:
        raise ValueError(name)
    return stripped


def write_adapter(
    folder: Path,
    settings: LoraSettings,
    parameters: dict[str, mx.array],
    base_model: str,
    revision: str | None = None,
    begins: str | None = None,
) -> None:
    """Write an adapter.

    Args:
        folder: Made where it does not exist.
        settings: Its shape and scale.
        parameters: `<module>.lora_A` [r, in] and `<module>.lora_B` [out, r]; of experts [experts, r, in] and [experts, out, r]; with
            DoRA `<module>.lora_magnitude_vector` [out], or [experts, out]. Of a module that is trained in full `<module>.weight`.
        base_model: Name or path of the base model, for PEFT to find it.
        revision: The base model's commit on the Hub, where it is known.
        begins: How the names of a language model's modules begin where the base is not on this disk, as in `Opening`.
    """
    base = peft_base(base_model) or PeftBase(Opening("", "", begins or "model."))
    arrays = {peft_name(base.name(name)): value for name, value in _unstacked(parameters).items()}
    if (tied := tied_weight(parameters, settings.also_train)) is not None:
        arrays[peft_name(base.name(HEAD_WEIGHT))] = tied  # PEFT asks for it under both names
    make_folder(folder)
    write_file_with(folder / WEIGHTS, lambda path: write_arrays(path, arrays, {"format": "pt"}))
    modules = sorted({name.rpartition(".")[0] for name in parameters if is_lora(name)})
    saved = modules_to_save(settings.also_train, parameters, base.name)
    config = _to_config(settings, modules, base, base_model, revision) | saved
    config |= indices(settings.train_new_tokens, parameters, base.name)
    write_file(folder / CONFIG, to_json(dict(sorted(config.items()))))


def read_adapter(folder: str | Path) -> tuple[LoraSettings, dict[str, mx.array]]:
    """Read an adapter that this package or PEFT wrote; the parameters become float32.

    Raises `UserError` where files are missing or damaged, or where the adapter is not LoRA or DoRA of linear modules.
    """
    folder = Path(folder)
    config = read_config(folder / CONFIG)
    _check_plain(config, folder / CONFIG)
    file = open_safetensors(weights_file(folder))
    parameters: dict[str, mx.array] = {}
    modules: dict[str, str] = {}
    named = target_parameters(config, folder / CONFIG)
    for tensor, stripped in _trained(file, config):
        stripped = of_parameter(stripped, named, file.path)
        if max(tensor.shape, default=0) >= MOST_FEATURES or len(stripped) > LONGEST_NAME:
            raise UserError(f"{tensor.name[:LONGEST_NAME]} is larger than any module of a model", where=str(file.path))
        name = transformers_name(stripped)
        if name in parameters:
            raise UserError(f"{tensor.name} is there under another name, too", where=str(file.path))
        parameters[name] = mx.array(read_float32(tensor))
        modules[name.rpartition(".")[0]] = stripped.rpartition(".")[0]
    whole = {name: parameters.pop(name) for name in list(parameters) if is_whole(name)}
    rows = {name: parameters.pop(name) for name in list(parameters) if is_rows(name)}
    adapted = {name.rpartition(".")[0] for name in parameters}
    modules = {name: modules[name] for name in sorted(adapted)}
    settings = _to_settings(config, modules, folder / CONFIG)
    of_all = {name: parameters.pop(name) for name in list(parameters) if is_on_parameter(name)}
    for name, value in of_all.items():
        of_all[name] = stacked(name, value, settings.rank_of(name.rpartition(".")[0]), file.path)
    _check_shapes(settings, parameters, of_all, file.path)
    also = saved_modules(config, whole, file.path)
    further = {"also_train": also, "train_new_tokens": read_indices(config, rows, file.path)}
    return settings.model_copy(update=further), _stacked(parameters, file.path) | of_all | whole | rows


def read_beside(folder: Path) -> tuple[str, dict[str, mx.array], frozenset[str]]:
    """What an adapter's files say beside its settings and parameters.

    Returns:
        How the names of a language model's modules begin in the class that the file is for, as in `Opening`; the weights that PEFT saved
        beside an adapter on embeddings or the head as copies of the base's, by the names of their modules; and the names here of what
        it trained as `target_parameters`, the matrices of all experts of a layer.
    """
    config, path = read_config(folder / CONFIG), weights_file(folder)
    tensors, named = open_safetensors(path).tensors, target_parameters(config, folder / CONFIG)
    names = [tensor.name.removeprefix(_PREFIX) for tensor in tensors]
    begins = INSIDE if any(transformers_name(name) != name for name in names) else "model."
    copies = {module: read_copy(tensor) for tensor in tensors if (module := _copied(tensor.name, config)) is not None}
    stripped = [plain_name(name.removesuffix(_SUFFIX)) for name in names]
    on_parameters = {of_parameter(name, named, path) for name in stripped} - set(stripped)
    return begins, copies, frozenset(transformers_name(name).rpartition(".")[0] for name in on_parameters)


def _copied(name: str, config: dict[str, Any]) -> str | None:
    """The module of whose weight a tensor is a copy; None where it is none."""
    stripped = name.removeprefix(_PREFIX)
    known = saved_weight(stripped, config) or is_frozen_copy(name, config)
    module = None if known else copied_module(stripped)
    return module and transformers_name(module)


def _trained(file: SafetensorsFile, config: dict[str, Any]) -> Iterator[tuple[StoredTensor, str]]:
    """The tensors that were trained, and their names without what PEFT puts before and after them; raises `UserError` for any other."""
    for tensor in file.tensors:
        if is_frozen_copy(tensor.name, config) or _copied(tensor.name, config) is not None:
            continue
        try:
            yield tensor, saved_weight(tensor.name.removeprefix(_PREFIX), config) or _stripped(tensor.name)
        except ValueError:
            hint = "only lora_A, lora_B and lora_magnitude_vector of linear modules and embeddings are read"
            raise UserError(f"unknown tensor {tensor.name}", where=str(file.path), hint=hint) from None


def lost_by_peft(folder: Path, base: PeftBase) -> Iterator[Loss]:
    """What PEFT would open otherwise than it was trained, of a LoRA adapter's files."""
    config = read_config(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        return
    settings, parameters = read_adapter(folder)
    for _, stripped in _trained(open_safetensors(weights_file(folder)), config):
        if base.name(transformers_name(stripped)) != stripped:
            yield Loss("no module of the model is named {}", stripped)
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters if is_lora(name)))
    yield from losses(base, settings, modules, config)


def refuse_losses(folder: Path, base: PeftBase, what: str, *, where: str, hint: str) -> None:
    """Raise `UserError`, which begins with `what`, for an adapter that PEFT would open otherwise than it was trained."""
    if lost := list(lost_by_peft(folder, base)):
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise UserError(f"{what}: {lost[0]}{more}", where=where, hint=hint)


def base_model_name(folder: str | Path) -> str:
    """The name or path of the base model that an adapter says it belongs to; an empty string where it says none."""
    name = read_config(Path(folder) / CONFIG).get("base_model_name_or_path")
    return name if isinstance(name, str) else ""


def _unstacked(parameters: dict[str, mx.array]) -> dict[str, mx.array]:
    """Each expert's matrices under names of their own."""
    return {
        expert_name(name, expert) if expert is not None else name: one
        for name, value in parameters.items()
        for expert, one in (
            enumerate(value) if value.ndim > (1 if name.endswith(f".{MAGNITUDE}") else 2) else [(None, value)]
        )
    }


def _stacked(parameters: dict[str, mx.array], where: Path) -> dict[str, mx.array]:
    """The inverse; raises `UserError` where an expert is missing, or has another shape than the others."""
    stacks: dict[str, dict[int, mx.array]] = {}
    stacked: dict[str, mx.array] = {}
    for name, value in parameters.items():
        match split_expert(name):
            case None:
                stacked[name] = value
            case (stack, expert):
                stacks.setdefault(stack, {})[expert] = value
    for name, experts in stacks.items():
        if missing := [expert for expert in range(max(experts) + 1) if expert not in experts]:
            raise UserError(f"{peft_name(expert_name(name, missing[0]))} is missing", where=str(where))
        if len({value.shape for value in experts.values()}) > 1:
            raise UserError(f"the experts of {peft_name(name)} have matrices of several shapes", where=str(where))
        stacked[name] = mx.stack([experts[expert] for expert in range(len(experts))])
    return stacked


def _to_config(
    settings: LoraSettings, modules: list[str], base: PeftBase, base_model: str, revision: str | None
) -> dict[str, Any]:
    alpha = float(settings.alpha)
    layers = layers_to_transform(settings.layers, list(map(base.module, modules)))
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "init_lora_weights": True if settings.init == "kaiming" else settings.init,
        "target_modules": target_modules(base, modules, layers["layers_to_transform"]),
        "exclude_modules": None,
        **layers,
        "rank_pattern": {for_each_expert(base.name(name)): rank for name, rank in settings.rank_pattern.items()},
        "alpha_pattern": {for_each_expert(base.name(name)): alpha for name, alpha in settings.alpha_pattern.items()},
        "bias": "none",
        "lora_bias": False,
        "fan_in_fan_out": False,
        "auto_mapping": None,
    }


def _to_settings(config: dict[str, Any], modules: dict[str, str], where: Path) -> LoraSettings:
    """Of modules, each expert's apart, and their names in the file."""
    try:
        stated = _Stated.model_validate(config)
    except ValidationError as error:
        raise UserError(first_problem(error), where=str(where)) from error
    layers = layers_of_config(config, modules)
    return LoraSettings.model_construct(
        rank=stated.r,
        alpha=stated.lora_alpha,
        dropout=stated.lora_dropout,
        rslora=bool(stated.use_rslora),
        target=targets_in_file(config, modules, layers),
        layers=layers,
        init=start if (start := config.get("init_lora_weights")) in ("gaussian", *FACTORED) else "kaiming",
        dora=bool(stated.use_dora),
        rank_pattern=of_modules(stated.rank_pattern or {}, "rank_pattern", modules, str(where)),
        alpha_pattern=of_modules(stated.alpha_pattern or {}, "alpha_pattern", modules, str(where)),
    )


def read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        hint = (
            instead_of_adapter(path.parent)
            or f"an adapter folder has {CONFIG} and {WEIGHTS}; a run that trained an adapter has one"
        )
        found = f"no {CONFIG}" if path.parent.exists() else "it is not there"
        raise UserError(f"not an adapter folder: {found}", where=str(path.parent), hint=hint)
    return read_json(checked(path.parent, for_libraries=False) / path.name)


def _check_plain(config: dict[str, Any], where: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"its peft_type is {kind!r}; only LORA adapters are read", where=str(where))
    refuse_moved_base(config, where, but=FACTORED)
    for name, neutral in _NEUTRAL.items():
        value = config.get(name)
        if not any(value is other or (value == other and type(value) is type(other)) for other in neutral):
            raise UserError(
                f"{name} is {json.dumps(value)}, which is not supported",
                where=str(where),
                hint="only LoRA and DoRA are read; merge this adapter with PEFT and start from the merged model",
            )


def weights_file(folder: Path) -> Path:
    path = folder / WEIGHTS
    if path.is_file():
        return path
    if (folder / "adapter_model.bin").is_file():
        raise UserError(
            "its weights are a pickled adapter_model.bin, which is not read because it can run code",
            where=str(folder),
            hint="open it with PEFT and save it again with `save_pretrained`, which writes safetensors",
        )
    raise UserError(f"not an adapter folder: no {WEIGHTS}", where=str(folder))


def _check_shapes(
    settings: LoraSettings, parameters: dict[str, mx.array], of_all: dict[str, mx.array], where: Path
) -> None:
    """Every module has all its parts, and they agree with its rank; those of all experts at once agree with it already."""
    named = parameters | of_all
    if not named:
        raise UserError("this adapter has no tensors", where=str(where))
    for name in named:
        module = name.rpartition(".")[0]
        for other in (*HALVES, *([MAGNITUDE] if settings.dora else [])):
            if f"{module}.{other}" not in named:
                raise UserError(f"{peft_name(f'{module}.{other}')} is missing", where=str(where))
    for name, value in parameters.items():
        module, _, part = name.rpartition(".")
        if part == MAGNITUDE:
            _check_magnitude(settings, name, value, parameters[f"{module}.lora_B"], where)
            continue
        rank = settings.rank_of(together(module))
        if value.ndim != 2 or value.shape[HALVES.index(part)] != rank:
            form = f"[{rank}, in]" if part == "lora_A" else f"[out, {rank}]"
            what = f"{peft_name(name)} is {list(value.shape)}, and rank {rank} asks for {form}"
            raise UserError(what, where=str(where))


def _check_magnitude(settings: LoraSettings, name: str, value: mx.array, lora_B: mx.array, where: Path) -> None:
    if not settings.dora:
        raise UserError(f"{peft_name(name)} is of DoRA, and use_dora is not set", where=str(where))
    if value.shape != lora_B.shape[:1]:
        what = f"{peft_name(name)} is {list(value.shape)}, where lora_B asks for {list(lora_B.shape[:1])}"
        raise UserError(what, where=str(where))
