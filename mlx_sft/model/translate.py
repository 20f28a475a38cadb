"""A checkpoint's `config.json` → the settings that the family's code in mlx-lm reads.

A config is translated, never trusted to defaults: transformers 4 and 5 write the same setting in different places, and
mlx-lm falls back on its own default where it does not find one.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlx_lm import utils as mlx_lm_utils
from transformers import CONFIG_MAPPING, AutoConfig

from mlx_sft.errors import UserError, blamed_on
from mlx_sft.files import read_json
from mlx_sft.gate import checked
from mlx_sft.model.family_settings import ALWAYS, layer_types_as_read, settings_asked_for
from mlx_sft.model.rope import UNREAD, Unread, translate_rope
from mlx_sft.near_paths import instead_of_model
from mlx_sft.trust import may_run_code_of, model_code

DOWNLOAD_AGAIN = "copy or download the checkpoint again"

_MOST_LAYERS = 1000
"""Several times as many as any model has; a damaged number would have the model built layer by layer."""

_NESTED = "text_config"
"""Where a model that can also see or hear keeps the settings of its language model."""

_TEXT_ARGUMENTS = ("TextModelArgs", "TextConfig", "TextArgs")
"""The class in which mlx-lm's code of such a family reads them, where it is in the same module."""

_ARITHMETIC = (
    "attention_bias",
    "mlp_bias",
    "hidden_act",
    "hidden_activation",
    "use_sliding_window",
    "partial_rotary_factor",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "residual_multiplier",
    "embedding_multiplier",
    "attention_multiplier",
    "query_pre_attn_scalar",
)
"""Settings that change what a model computes; where one differs from its family's default, the code must read it."""


_ASKED_FOR = inspect.Parameter.empty

_LAYER_PATTERNS = ("sliding_window_pattern", "full_attention_interval")
"""Settings of mlx-lm's code with a number n: every n-th layer, and no other, has full attention."""


@dataclass(frozen=True)
class _Settings:
    """A checkpoint's settings of its language model, and those that are read.

    Attributes:
        whole: `config.json` with the defaults that transformers fills in.
        text: The language model's settings: a part of `whole` where the model can also see or hear, else all of it.
        defaults: The family's defaults in transformers; empty where transformers does not know the family.
        fields: The settings that mlx-lm's code for the family reads, with its defaults.
        code: The module of that code.
    """

    whole: dict[str, Any]
    text: dict[str, Any]
    defaults: dict[str, Any]
    fields: dict[str, Any]
    code: Any


def translate_config(path: Path) -> dict[str, Any]:
    """The settings of `config.json`, written by any version of transformers, as the family's code in mlx-lm reads them.

    What the file leaves out gets transformers' defaults, because the weights were trained with these.

    Raises:
        UserError: If the family's code does not read a setting that changes the arithmetic.
    """
    known = _settings(path)
    if known.text is not known.whole and "tie_word_embeddings" in known.whole:  # of all heads, and so of this one
        known.text["tie_word_embeddings"] = known.whole["tie_word_embeddings"]
    text, fields, of_path = known.text, known.fields, unread(path)
    pattern = _layer_pattern(text, fields)
    if "full_attention_interval" in fields and text.get("layer_types") and not pattern:
        raise of_path("layer_types", text["layer_types"])
    family = str(text.get("model_type"))
    translated = text | pattern | settings_asked_for(family, text, fields)
    translated |= translate_rope(text, fields, of_path)
    if known.defaults and not known.defaults.keys() & {"rope_theta", "rope_parameters"}:
        translated[UNREAD] = {}  # transformers' code does not turn anything either
    if "layer_types" in text:
        translated["layer_types"] = layer_types_as_read(text["layer_types"], known.code)
    if missing := [name for name, default in fields.items() if default is _ASKED_FOR and name not in translated]:
        raise UserError(
            f"mlx-lm's code for this family asks for {', '.join(missing)}, which the settings do not say",
            where=str(path / "config.json"),
            hint="give the checkpoint with the config.json that its authors published; a newer mlx-lm may do without",
        )
    for name in _ARITHMETIC:
        value = translated.get(name)
        computed = ALWAYS.get(family, {}).get(name, known.defaults.get(name, value))
        if value is not None and name not in fields and value != computed:
            raise of_path(name, value)
    if known.text is not known.whole:
        # mlx-lm's code takes some of them from the whole, which need not say them.
        outer = inspect.signature(family_code(known.whole, path).ModelArgs).parameters.keys() - {"model_type", _NESTED}
        said = {name: text[name] for name in outer if name in text}
        translated = known.whole | said | {_NESTED: translated}
    return translated | {"model_type": _family(known.whole["model_type"])}


def exact_length(path: Path) -> int | None:
    """The longest row, in tokens, for which mlx-lm's code computes what the checkpoint says; None for no limit.

    mlx-lm runs the sliding windows of several families (Mistral, Phi 3, Gemma 2, Starcoder 2) as full attention, which is
    the same up to the window. Its sparse attention (DeepSeek 3.2) is transformers' as long as no position is left out. Beyond the
    length that the model was first trained with, dynamic RoPE and LongRoPE depend on the width of the padded row, and so on the other
    rows of its batch.
    """
    known = _settings(path)
    settings = known.text
    limits = []
    window = settings.get("sliding_window")
    if (
        window
        and settings.get("use_sliding_window", True)
        and not _same_windows(settings, known.defaults, known.fields)
    ):
        limits.append(int(window))
    rope = dict(settings.get("rope_scaling") or {}) | dict(settings.get("rope_parameters") or {})
    kinds = (rope.get("rope_type"), rope.get("type"))
    if "dynamic" in kinds and settings.get("max_position_embeddings"):
        limits.append(int(settings["max_position_embeddings"]))
    if "longrope" in kinds:
        original = rope.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
        limits.append(int(original or settings["max_position_embeddings"]))
    if settings.get("index_topk"):
        limits.append(int(settings["index_topk"]))
    return min(limits, default=None)


def _layer_pattern(settings: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The setting n of a family's code, from a checkpoint that names the type of each layer.

    Returns:
        The setting; an empty mapping where the code reads none, or where no n says the same as the types.
    """
    types = settings.get("layer_types")
    name = next((name for name in _LAYER_PATTERNS if name in fields), None)
    if name is None or not isinstance(types, list) or isinstance(fields[name], str):
        return {}
    full = [kind == "full_attention" for kind in types]
    every = full.index(True) + 1 if any(full) else len(full) + 1
    fits = full == [number % every == 0 for number in range(1, len(full) + 1)]
    return {name: every} if fits else {}


def _same_windows(settings: dict[str, Any], defaults: dict[str, Any], fields: dict[str, Any]) -> bool:
    """Whether mlx-lm's code gives the window to those layers for which the checkpoint means it."""
    return _windows_meant(settings, defaults) == _windows_computed(settings | _layer_pattern(settings, fields), fields)


def _layer_count(settings: dict[str, Any]) -> int:
    names = ("layer_types", "layers_block_type", "hybrid_override_pattern")
    listed = next((settings[name] for name in names if isinstance(settings.get(name), list | str)), ())
    return int(settings.get("num_hidden_layers") or len(listed))


def _windows_meant(settings: dict[str, Any], defaults: dict[str, Any]) -> list[bool]:
    """Whether the checkpoint means each layer to have the window."""
    layers = _layer_count(settings)
    if defaults and "sliding_window" not in defaults:  # transformers would not read it
        return [False] * layers
    if not defaults or "layer_types" in defaults:
        types = settings.get("layer_types") or ["sliding_attention"] * layers
        return [kind == "sliding_attention" for kind in types]
    return [True] * layers


def _windows_computed(settings: dict[str, Any], fields: dict[str, Any]) -> list[bool] | None:
    """Whether mlx-lm's code gives each layer the window; None where it decides by something else."""
    layers = _layer_count(settings)
    if "sliding_window" not in fields:
        return [False] * layers
    if "layer_types" in fields:
        types = settings.get("layer_types") or ["full_attention"] * layers
        return [kind == "sliding_attention" for kind in types]
    pattern = settings.get("sliding_window_pattern", fields.get("sliding_window_pattern"))
    if isinstance(pattern, str):
        return [pattern[layer % len(pattern)] == "L" for layer in range(layers)]
    if isinstance(pattern, int):
        return [(layer + 1) % pattern != 0 for layer in range(layers)]
    return None


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder."""
    file = path / "config.json"
    if not file.is_file():
        hint = instead_of_model(path) or "give a Hugging Face checkpoint folder"
        raise UserError("not a model folder: no config.json", where=str(path), hint=hint)
    config = read_json(checked(path) / file.name, hint=DOWNLOAD_AGAIN)
    for part in (config, config.get(_NESTED)):
        layers = part.get("num_hidden_layers", 1) if isinstance(part, dict) else 1
        if not isinstance(layers, int) or not 0 < layers <= _MOST_LAYERS:
            what = f"num_hidden_layers is {layers!r}, where a model has 1 to {_MOST_LAYERS}"
            raise UserError(what, where=str(file), hint=DOWNLOAD_AGAIN)
    if not isinstance(config.get("model_type"), str):
        hint = "give a Hugging Face checkpoint folder"
        raise UserError("names no model_type", where=str(file), hint=hint)
    classes = config.get("architectures", [])
    if not isinstance(classes, list | str) or not all(isinstance(name, str) for name in classes):
        what = f"architectures is {config['architectures']!r}, where a model names its classes"
        raise UserError(what, where=str(file), hint=DOWNLOAD_AGAIN)
    return config


def _settings(path: Path) -> _Settings:
    raw = read_config(path)
    hint = f"another version of transformers may; if it is not as its authors published it, {DOWNLOAD_AGAIN}"
    with blamed_on(path / "config.json", "transformers does not take it", hint):
        try:
            trusted = may_run_code_of(path)
            full = AutoConfig.from_pretrained(checked(path), local_files_only=True, trust_remote_code=trusted)
        except (ValueError, OSError):
            if raw["model_type"] in CONFIG_MAPPING:
                raise
            whole, defaults = raw, {}  # a family that it does not know
        else:
            # transformers may take it for another family; mlx-lm goes by the type that the file names.
            filled = _given(full.to_dict())
            if _NESTED not in raw and not _is_of(raw, filled.get(_NESTED)):
                filled.pop(_NESTED, None)  # of a text alone, written under the name of the whole
            whole = raw | filled | {"model_type": raw["model_type"]}
            defaults = type(full)().to_dict()
    text = whole.get(_NESTED)
    family = family_code(whole, path)
    if _NESTED not in _fields(family.ModelArgs):
        if isinstance(text, dict):
            raise _nested(whole, path)
        return _Settings(whole, whole, defaults, _fields(family.ModelArgs), family)
    code, arguments = _text_code(whole, path)
    if not isinstance(text, dict):
        return _Settings(whole, whole, defaults, _fields(arguments), code)
    text = dict(raw.get(_NESTED) or {}) | _given(text)
    return _Settings(whole, text, dict(defaults.get(_NESTED) or {}), _fields(arguments), code)


def _is_of(raw: dict[str, Any], text: Any) -> bool:
    """Whether transformers made these settings of a language model from a file that has them beside those of the other parts."""
    told = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    return isinstance(text, dict) and all(raw.get(name) == text.get(name, _ASKED_FOR) for name in told)


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def family_code(settings: dict[str, Any], path: Path) -> Any:
    """The module with the `Model` and the `ModelArgs` of a checkpoint: mlx-lm's, or the checkpoint's own where that may run.

    Raises:
        UserError: If there is none.
    """
    if model_code(path, settings):
        return _own_code(checked(path) / settings["model_file"])
    kind = _family(settings["model_type"])
    by_architecture = getattr(mlx_lm_utils, "MODEL_ARCHITECTURE_REMAPPING", {})
    named = [
        by_architecture[kind, one] for one in settings.get("architectures") or () if (kind, one) in by_architecture
    ]
    family = _module(named[0] if named else mlx_lm_utils.MODEL_REMAPPING.get(kind, kind))
    if not hasattr(family, "Model") or not hasattr(family, "ModelArgs"):
        hint = "mlx-lm defines the models that can be trained; a newer mlx-lm may know this one"
        raise UserError(f"mlx-lm has no model of type {kind}", where=str(path), hint=hint)
    return family


@cache
def _own_code(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location("custom_model", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UserError("config.json names this file as its code, and it is none", where=str(file))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _family(kind: str) -> str:
    """The type by which mlx-lm knows a family: `qwen3_5_text` is the text alone of `qwen3_5`, and has no code of its own there."""
    whole = kind.removesuffix("_text")
    takes_text = "from_dict" in vars(getattr(_module(whole), "ModelArgs", object))
    return whole if _module(kind) is None and takes_text else kind


@cache
def _module(kind: str) -> Any:
    try:
        return importlib.import_module(f"mlx_lm.models.{kind}") if re.fullmatch(r"\w[\w-]*", kind) else None
    except (ImportError, SystemExit):  # mlx-lm's code for OLMo ends the program where a package of its own is missing
        return None


def text_settings(path: Path) -> dict[str, Any]:
    """The settings of a checkpoint's language model, with transformers' defaults for what the file leaves out."""
    return _settings(path).text


def fields_read(path: Path) -> dict[str, Any]:
    """The settings of a checkpoint's language model that mlx-lm's code reads, with its defaults."""
    return _settings(path).fields


def fields_of_the_whole(path: Path) -> dict[str, Any]:
    """What mlx-lm's code of a model that can do more reads beside the settings of its language model, with its defaults."""
    fields = _fields(family_code(read_config(path), path).ModelArgs)
    return {name: default for name, default in fields.items() if name not in ("model_type", _NESTED)}


def _text_code(whole: dict[str, Any], path: Path) -> tuple[Any, Any]:
    """The module of the language model inside of one that can do more, and the class of its settings."""
    family = family_code(whole, path)
    for module in (family, *(inspect.getmodule(base) for base in family.Model.__mro__)):
        for name in _TEXT_ARGUMENTS:
            if hasattr(module, name):
                return module, getattr(module, name)
    kind = str((whole.get(_NESTED) or whole).get("model_type"))
    used = [module for module in vars(family).values() if hasattr(module, "Model") and hasattr(module, "ModelArgs")]
    own = _module(mlx_lm_utils.MODEL_REMAPPING.get(kind, kind))
    if own not in used and len(used) != 1:
        raise _nested(whole, path)
    code = own if own in used else used[0]
    return code, code.ModelArgs


def _fields(arguments: Any) -> dict[str, Any]:
    """The settings that a class of mlx-lm's takes, and their defaults."""
    return {name: field.default for name, field in inspect.signature(arguments).parameters.items()}


def unread(path: Path) -> Unread:
    """Makes the errors for settings of a checkpoint folder that would change the arithmetic, and that nothing reads."""

    def of_path(name: str, value: Any) -> UserError:
        return UserError(
            f"mlx-lm's code for this family does not read {name} = {value!r}; the model would be another one",
            where=str(path / "config.json"),
            hint="a newer mlx-lm may read it; otherwise this checkpoint cannot be trained exactly",
        )

    return of_path


def _nested(whole: dict[str, Any], path: Path) -> UserError:
    return UserError(
        f"the settings of {whole['model_type']}'s language model are nested in {_NESTED}, which is not read yet",
        where=str(path / "config.json"),
        hint="give the text-only checkpoint of this family",
    )
