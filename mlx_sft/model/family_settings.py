"""Settings that mlx-lm's code for a family asks for, and that `config.json` says in other words, or leaves to transformers.

An older config of the same family has them under mlx-lm's names; these are left as they are.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

Settings = dict[str, Any]

OTHER_LAYER_TYPES = {"linear_attention": "mamba", "full_attention": "attention"}
"""transformers 5's names of types of layers, and what the same types were called before."""


def _head_dim(settings: Settings) -> int:
    return int(settings["hidden_size"]) // int(settings["num_attention_heads"])


def _partial(settings: Settings) -> float:
    rope = settings.get("rope_parameters") or {}
    return float(rope.get("partial_rotary_factor") or settings.get("partial_rotary_factor") or 1.0)


def _rotary_dim(settings: Settings) -> int:
    return int(_partial(settings) * (settings.get("head_dim") or _head_dim(settings)))


def _window_pattern(settings: Settings) -> str | None:
    """`LLLG`: layers with a window, and without, as often as it takes to repeat; None where no layer has a window."""
    if isinstance(settings.get("sliding_window_pattern"), str):
        return str(settings["sliding_window_pattern"])
    letters = "".join("L" if kind == "sliding_attention" else "G" for kind in settings.get("layer_types") or ())
    if "L" not in letters:
        return None
    lengths = range(1, len(letters) + 1)
    return next(letters[:n] for n in lengths if (letters[:n] * len(letters))[: len(letters)] == letters)


def _intermediate_size(settings: Settings) -> Any:
    """Of Granite 4: without experts there is the shared MLP alone."""
    return settings["intermediate_size" if settings.get("num_local_experts") else "shared_intermediate_size"]


def _time_step_limit(settings: Settings) -> tuple[float, float]:
    """transformers 5 writes infinity as {"__float__": "Infinity"}."""
    least, most = settings.get("time_step_limit") or (0.0, math.inf)
    return float(least), math.inf if isinstance(most, dict) else float(most)


def _same_as(name: str) -> Callable[[Settings], Any]:
    return lambda settings: settings[name]


def _fixed(value: Any) -> Callable[[Settings], Any]:
    return lambda _: value


_ANY_FAMILY: dict[str, Callable[[Settings], Any]] = {
    "block_dim": _same_as("hidden_size"),
    "num_experts": _same_as("num_local_experts"),
    "head_dim": _head_dim,
    "n_ctx": _same_as("n_positions"),
    "n_inner": lambda settings: 4 * settings["n_embd"],
    "rotary_emb_base": lambda settings: (settings.get("rope_parameters") or settings)["rope_theta"],
    "rotary_pct": _partial,
}

_BY_FAMILY: dict[str, dict[str, Callable[[Settings], Any]]] = {
    # What transformers' code for these families does, whatever a config says.
    "apertus": {"mlp_bias": _fixed(False), "post_norm": _fixed(False), "qk_norm": _fixed(True)},
    "exaone4": {"sliding_window_pattern": _window_pattern},
    "exaone_moe": {"is_moe_layer": lambda settings: [kind == "sparse" for kind in settings["mlp_layer_types"]]},
    "gpt_bigcode": {"num_key_value_heads": lambda settings: 1 if settings["multi_query"] else settings["n_head"]},
    "glm_moe_dsa": {"topk_method": _fixed("noaux_tc"), "scoring_func": _fixed("sigmoid"), "moe_layer_freq": _fixed(1)},
    "granitemoehybrid": {
        "intermediate_size": _intermediate_size,
        "position_embedding_type": _fixed("nope"),
        "time_step_limit": _time_step_limit,
    },
    # transformers bounds the time step by another setting than the one named so.
    "nemotron_h": {"time_step_limit": lambda settings: (float(settings["time_step_min"]), math.inf)},
    "mamba2": {"intermediate_size": lambda settings: int(settings["expand"] * settings["hidden_size"])},
    "qwen3_vl_moe_text": {"norm_topk_prob": _fixed(True)},
    "minimax_m2": {"shared_intermediate_size": _fixed(0), "rotary_dim": _rotary_dim},
}


ALWAYS: dict[str, Settings] = {"phimoe": {"attention_bias": True}}
"""What a family's code in mlx-lm computes whatever the settings say, where that is not transformers' default."""

_OTHER_MEANING = ("sliding_window_pattern", "time_step_limit", "intermediate_size")
"""Settings of which transformers' value is of another type, or stands for something else."""


def settings_asked_for(family: str, settings: Settings, fields: Settings) -> Settings:
    """What a family's code asks for and the settings do not say, where it follows from them.

    Args:
        family: The `model_type` of the language model.
        settings: The language model's.
        fields: The settings that the family's code reads.
    """
    known = _ANY_FAMILY | _BY_FAMILY.get(family, {})
    found = {}
    for name, value_of in known.items():
        if name in fields and (settings.get(name) is None or name in _OTHER_MEANING):
            try:
                found[name] = value_of(settings)
            except (KeyError, TypeError, ValueError, ZeroDivisionError):  # it does not follow
                continue
    return found


def layer_types_as_read(types: Any, code: Any) -> Any:
    """The types of layers under the names that a family's code compares with.

    Args:
        types: A checkpoint's `layer_types`.
        code: The family's module.
    """
    if not isinstance(types, list) or not any(kind in OTHER_LAYER_TYPES for kind in types):
        return types
    source = inspect.getsource(code)

    def as_read(kind: Any) -> Any:
        other = OTHER_LAYER_TYPES.get(kind)
        return other if other is not None and f'"{kind}"' not in source and f'"{other}"' in source else kind

    return [as_read(kind) for kind in types]
