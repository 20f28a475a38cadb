"""A checkpoint's `config.json` → the settings that the family's code in mlx-lm reads.

A config is translated, never trusted to defaults: transformers 4 and 5 write the same setting in different places, and
mlx-lm falls back on its own default where it does not find one. Knows nothing of weights.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

from mlx_lm import utils as mlx_lm_utils
from transformers import CONFIG_MAPPING, AutoConfig

from mlx_sft.errors import UserError, blamed_on
from mlx_sft.mappings import read_json
from mlx_sft.trust import may_run_code_of, model_code

_ROPE_SETTINGS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
    },
    "longrope": {"original_max_position_embeddings", "long_factor"},
}
"""Per RoPE type, the settings that mlx-lm's `initialize_rope` reads. It takes `long_factor` for short rows, too."""

DOWNLOAD_AGAIN = "copy or download the checkpoint again"

_MOST_LAYERS = 1000
"""Several times as many as any model has; a number without end would be made layer by layer."""

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
"""Settings that change what a model computes; one that differs from its family's default must be read by someone."""


def translate_config(path: Path) -> dict[str, Any]:
    """The settings of `config.json`, whichever transformers wrote it, in the form that the family's code in mlx-lm reads.

    transformers fills in what the file leaves out, because its defaults are what the weights were trained with.

    Raises:
        UserError: If a setting that changes the arithmetic is one that the family's code does not read.
    """
    settings, defaults = _settings_and_defaults(path)
    fields = _fields_read(settings, path)
    if isinstance(settings.get("text_config"), dict):
        raise UserError(
            f"the settings of {settings['model_type']}'s language model are nested in text_config, which is not read yet",
            where=str(path / "config.json"),
            hint="give the text-only checkpoint of this family",
        )
    settings = settings | _translate_rope(settings, fields, path)
    for name in _ARITHMETIC:
        value = settings.get(name)
        if value is not None and name not in fields and value != defaults.get(name, value):
            raise _unread(name, value, path)
    return settings


def exact_length(path: Path) -> int | None:
    """The longest row, in tokens, for which mlx-lm's code computes what the checkpoint says; None for no limit.

    mlx-lm runs the sliding windows of several families (Mistral, Phi 3, Gemma 2, Starcoder 2) as full attention, which is
    the same up to the window. Dynamic RoPE beyond the model's length goes by the width of the padded row, so that the
    result would depend on the row's neighbours.
    """
    settings, defaults = _settings_and_defaults(path)
    limits = []
    window = settings.get("sliding_window")
    if window and settings.get("use_sliding_window", True):
        meant = _windowed_layers_meant(settings, defaults)
        if meant != _windowed_layers_computed(settings, _fields_read(settings, path)):
            limits.append(int(window))
    rope = dict(settings.get("rope_scaling") or {}) | dict(settings.get("rope_parameters") or {})
    if "dynamic" in (rope.get("rope_type"), rope.get("type")) and settings.get("max_position_embeddings"):
        limits.append(int(settings["max_position_embeddings"]))
    return min(limits, default=None)


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder."""
    file = path / "config.json"
    if not file.is_file():
        hint = "give a Hugging Face checkpoint folder"
        raise UserError("not a model folder: no config.json", where=str(path), hint=hint)
    config = read_json(file, hint=DOWNLOAD_AGAIN)
    layers = config.get("num_hidden_layers", 1)
    if not isinstance(layers, int) or not 0 < layers <= _MOST_LAYERS:
        what = f"num_hidden_layers is {layers!r}, where a model has 1 to {_MOST_LAYERS}"
        raise UserError(what, where=str(file), hint=DOWNLOAD_AGAIN)
    if not isinstance(config.get("model_type"), str):
        hint = "give a Hugging Face checkpoint folder"
        raise UserError("names no model_type", where=str(file), hint=hint)
    return config


def _settings_and_defaults(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`config.json` with what transformers fills in, and the defaults of its family; none where it does not know it."""
    raw = read_config(path)
    with blamed_on(path / "config.json", "transformers does not take it", DOWNLOAD_AGAIN):
        try:
            full = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=may_run_code_of(path))
        except (ValueError, OSError):
            if raw["model_type"] in CONFIG_MAPPING:
                raise
            return raw, {}  # a family that it does not know
        # transformers may take it for another family; mlx-lm goes by the type that the file names.
        filled = {k: v for k, v in full.to_dict().items() if v is not None} | {"model_type": raw["model_type"]}
        return raw | filled, type(full)().to_dict()


def _windowed_layers_meant(settings: dict[str, Any], defaults: dict[str, Any]) -> list[bool]:
    """Which layers of the checkpoint have the sliding window: those that it names, where its family has types of layers."""
    layers = settings["num_hidden_layers"]
    if defaults and "sliding_window" not in defaults:  # transformers would not read it
        return [False] * layers
    if not defaults or "layer_types" in defaults:
        types = settings.get("layer_types") or ["sliding_attention"] * layers
        return [kind == "sliding_attention" for kind in types]
    return [True] * layers


def _windowed_layers_computed(settings: dict[str, Any], fields: dict[str, Any]) -> list[bool] | None:
    """Which layers have it in mlx-lm's code; None where the code goes by something else than is known here."""
    layers = settings["num_hidden_layers"]
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


def _translate_rope(settings: dict[str, Any], fields: dict[str, Any], path: Path) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` (transformers 4) from either form, with every setting known to be read."""
    rope = dict(settings.get("rope_scaling") or {}) | dict(settings.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in rope.values()):  # a set for each type of layer
        if "rope_parameters" in fields:
            return {}
        raise _unread("rope_parameters", rope, path)
    theta = rope.pop("rope_theta", settings.get("rope_theta"))
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    partial = rope.pop("partial_rotary_factor", settings.get("partial_rotary_factor"))
    if theta is not None and not fields.keys() & {"rope_theta", "rope_parameters"}:
        raise _unread("rope_theta", theta, path)
    if partial not in (None, 1.0) and "partial_rotary_factor" not in fields:
        raise _unread("partial_rotary_factor", partial, path)
    for name, value in rope.items():
        if value is not None and name not in _ROPE_SETTINGS.get(kind, ()):
            raise _unread(f"{name} (of RoPE type {kind})", value, path)
    if kind == "yarn":
        for name, other in (("mscale", "mscale_all_dim"), ("mscale_all_dim", "mscale")):
            if rope.get(name) and not rope.get(other):  # transformers goes by both or neither
                raise _unread(f"{name} without {other}", rope[name], path)
        rope.setdefault("original_max_position_embeddings", settings["max_position_embeddings"])
    scaling = None if kind == "default" else {"type": kind, "rope_type": kind} | rope
    if scaling and not fields.keys() & {"rope_scaling", "rope_parameters"}:
        raise _unread("rope_scaling", scaling, path)
    parameters = (scaling or {"type": "default", "rope_type": "default"}) | {"rope_theta": theta}
    translated: dict[str, Any] = {"rope_scaling": scaling, "rope_parameters": parameters}
    if theta is not None:
        translated["rope_theta"] = theta
    if partial is not None:
        translated["partial_rotary_factor"] = partial
    return translated


def family_code(settings: dict[str, Any], path: Path) -> Any:
    """The module with the `Model` and the `ModelArgs` of a checkpoint: mlx-lm's, or the checkpoint's own where that may run.

    Raises:
        UserError: If there is none.
    """
    if model_code(path, settings):
        return _own_code(path / settings["model_file"])
    kind = mlx_lm_utils.MODEL_REMAPPING.get(settings["model_type"], settings["model_type"])
    try:
        family = importlib.import_module(f"mlx_lm.models.{kind}") if re.fullmatch(r"\w[\w-]*", kind) else None
    except ImportError:
        family = None
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


def _fields_read(settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings that the family's code reads, and their defaults."""
    arguments = inspect.signature(family_code(settings, path).ModelArgs).parameters
    return {name: field.default for name, field in arguments.items()}


def _unread(name: str, value: Any, path: Path) -> UserError:
    return UserError(
        f"mlx-lm's code for this family does not read {name} = {value!r}; the model would be another one",
        where=str(path / "config.json"),
        hint="a newer mlx-lm may read it; otherwise this checkpoint cannot be trained exactly",
    )
