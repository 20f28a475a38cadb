"""Rotary positions (RoPE): a checkpoint's settings → those that mlx-lm's code reads, and corrections where it reads them wrong.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`, for some families a set for each type of layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import DynamicNTKScalingRoPE, Llama3RoPE, SuScaledRoPE, YarnRoPE, initialize_rope

from mlx_sft.model.family_settings import OTHER_LAYER_TYPES

Unread = Callable[[str, Any], Exception]
"""Makes the error for a setting, of this name and value, that nothing reads."""

_SETTINGS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
             "attention_factor", "truncate"},
    "longrope": {"factor", "attention_factor", "original_max_position_embeddings", "short_factor", "long_factor"},
}  # fmt: skip
"""The settings that mlx-lm's `initialize_rope`, or a module here, reads, by type of RoPE."""

_READ_BY = {
    "llama_4_scaling_beta": ("ministral3", "mistral4"),
    # Hunyuan's dynamic RoPE has a base of its own; the others it names beside are YaRN's, and neither library looks at them.
    "alpha": ("hunyuan_v1_dense",),
    "beta_fast": ("hunyuan_v1_dense",),
    "beta_slow": ("hunyuan_v1_dense",),
    "mscale": ("hunyuan_v1_dense",),
    "mscale_all_dim": ("hunyuan_v1_dense",),
}
"""Settings among those of RoPE that these families' code reads, or that have no effect in them."""

_OF_MLX_LM = {"rotary_emb_base", "rotary_pct", "rotary_dim"}
"""Other names of the base, and of the part of a head that is turned."""

TURNS_ALL = ("glm",)
"""Families whose code in mlx-lm turns all of a head, where transformers turns the part that `partial_rotary_factor` says."""

UNREAD = "rope_settings_unread"
"""The name, among translated settings, of those that the family's code has no name for: `correct_ropes` sees to them."""

_WITHOUT_EFFECT = {"mrope_section", "mrope_interleaved", "max_position_embeddings"}
"""The first two say which part of a position turns which pair of numbers; for text alone, the parts are equal. The last is said twice."""


def translate_rope(settings: dict[str, Any], fields: dict[str, Any], unread: Unread) -> dict[str, Any]:
    """`rope_theta`, `rope_scaling` and `rope_parameters` as a family's code reads them.

    Args:
        settings: The language model's, in either form.
        fields: The settings that the family's code reads.
        unread: Makes the error that is raised for a setting that the code does not read.
    """
    rope = dict(settings.get("rope_scaling") or {}) | dict(settings.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in rope.values()):
        return _by_type_of_layer(rope, settings, fields, unread)
    theta = rope.pop("rope_theta", settings.get("rope_theta"))
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if not isinstance(kind, str):
        raise unread("rope_type", kind)
    partial = rope.pop("partial_rotary_factor", settings.get("partial_rotary_factor"))
    rope = {name: value for name, value in rope.items() if value is not None and name not in _WITHOUT_EFFECT}
    for name, value in rope.items():
        positive = name != "factor" or (isinstance(value, int | float) and value > 0)
        known = name in _SETTINGS.get(kind, ()) or settings.get("model_type") in _READ_BY.get(name, ())
        if not known or not positive:
            raise unread(f"{name} (of RoPE type {kind})", value)
    if kind == "yarn" and not rope.get("attention_factor"):
        for name, other in (("mscale", "mscale_all_dim"), ("mscale_all_dim", "mscale")):
            if rope.get(name) and not rope.get(other):  # transformers goes by both or neither
                raise unread(f"{name} without {other}", rope[name])
    if kind in ("yarn", "longrope"):
        original = settings.get("original_max_position_embeddings") or settings["max_position_embeddings"]
        rope.setdefault("original_max_position_embeddings", original)
    scaling = None if kind == "default" else {"type": kind, "rope_type": kind} | rope
    parameters = (scaling or {"type": "default", "rope_type": "default"}) | {"rope_theta": theta}
    translated: dict[str, Any] = {"rope_scaling": scaling, "rope_parameters": parameters, UNREAD: {}}
    if theta is not None and not fields.keys() & {"rope_theta", "rope_parameters", *_OF_MLX_LM}:
        translated[UNREAD]["rope_theta"] = theta
    if partial not in (None, 1.0) and not fields.keys() & {"partial_rotary_factor", *_OF_MLX_LM}:
        translated[UNREAD]["partial_rotary_factor"] = partial
    if theta is not None:
        translated["rope_theta"] = theta
    if partial is not None:
        translated["partial_rotary_factor"] = parameters["partial_rotary_factor"] = partial
    return translated


def _by_type_of_layer(
    rope: dict[str, Any], settings: dict[str, Any], fields: dict[str, Any], unread: Unread
) -> dict[str, Any]:
    """Settings for each type of layer. Some families' code reads the sets, Gemma 3's a separate base for layers with a window.

    Where it reads neither, it is given the set of layers with full attention, and `correct_ropes` the sets.
    """
    if "rope_parameters" in fields:
        return {}
    if not settings.get("layer_types"):
        raise unread("rope_parameters", rope)
    translated = {
        kind: translate_rope(settings | {"rope_scaling": None, "rope_parameters": of_kind}, fields, unread)
        for kind, of_kind in rope.items()
        if isinstance(of_kind, dict)
    }
    sets = {kind: one["rope_parameters"] for kind, one in translated.items()}
    of_full = translated.get("full_attention", next(iter(translated.values())))
    if "rope_local_base_freq" in fields and "sliding_attention" in sets:
        of_full["rope_local_base_freq"] = sets["sliding_attention"]["rope_theta"]
    return of_full | {"rope_parameters": sets}


class _ScaledRope(nn.Module):
    """RoPE with frequencies of its own, and what is turned scaled."""

    def __init__(self, dims: int, traditional: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dims, self._traditional = dims, traditional
        self._scale = 1.0

    def _turned(self, x: mx.array, offset: int | mx.array, frequencies: mx.array) -> mx.array:
        if self._scale != 1.0:
            x = x.at[..., : self._dims].multiply(self._scale)
        turned: mx.array = mx.fast.rope(
            x, self._dims, traditional=self._traditional, base=None, scale=1.0, offset=offset, freqs=frequencies
        )
        return turned


class LongRope(_ScaledRope):
    """LongRoPE (Ding et al. 2024, https://arxiv.org/abs/2402.13753): one set of frequencies up to the length that the model was first
    trained with, and another beyond. mlx-lm's takes the second for rows of every length.
    """

    def __init__(self, dims: int, settings: dict[str, Any]) -> None:
        super().__init__(dims)
        rope: dict[str, Any] = settings["rope_scaling"]
        if {len(rope["short_factor"]), len(rope["long_factor"])} != {dims // 2}:
            raise ValueError(f"LongRoPE needs {dims // 2} factors")
        frequencies = settings["rope_theta"] ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
        self._short = mx.array(rope["short_factor"], mx.float32) * frequencies
        self._long = mx.array(rope["long_factor"], mx.float32) * frequencies
        self._original = int(rope["original_max_position_embeddings"])
        self._scale = rope.get("attention_factor") or self._attention_factor(
            rope.get("factor") or settings["max_position_embeddings"] / self._original
        )

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        end = x.shape[-2] + (int(np.array(offset).max()) if isinstance(offset, mx.array) else offset)
        return self._turned(x, offset, self._long if end > self._original else self._short)

    def _attention_factor(self, factor: float) -> float:
        return math.sqrt(1 + math.log(factor) / math.log(self._original)) if factor > 1 else 1.0


class YarnRope(_ScaledRope):
    """YaRN (Peng et al. 2023, https://arxiv.org/abs/2309.00071) with an `attention_factor` of its own, or between dimensions that are not
    rounded (`truncate: false`). mlx-lm's knows neither.
    """

    def __init__(self, dims: int, theta: float, traditional: bool, rope: dict[str, Any]) -> None:
        super().__init__(dims, traditional)
        factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])

        def dimension_of(rotations: float) -> float:
            return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dimension_of(rope.get("beta_fast") or 32), dimension_of(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        ramp = (mx.arange(dims // 2, dtype=mx.float32) - low) / (high - low if high != low else 0.001)
        extrapolated = 1 - mx.clip(ramp, 0, 1)
        frequencies = theta ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
        self._freqs = 1 / (extrapolated / frequencies + (1 - extrapolated) / (factor * frequencies))
        self._scale = rope.get("attention_factor") or self._attention_factor(factor, rope)

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        return self._turned(x, offset, self._freqs)

    @staticmethod
    def _attention_factor(factor: float, rope: dict[str, Any]) -> float:
        def of(mscale: float) -> float:
            return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

        both = rope.get("mscale"), rope.get("mscale_all_dim")
        return of(both[0]) / of(both[1]) if both[0] and both[1] else of(1)


def correct_ropes(model: nn.Module, settings: dict[str, Any], unread: Unread) -> None:
    """Give each layer the rotation that its checkpoint means, where mlx-lm's code gives it another.

    Several families' code takes `rope_scaling` and ignores it. Where some layers have it (OLMo 3), the code is right.

    Args:
        model: Made from `settings`, translated.
        unread: Makes the error that is raised where no module of the model is known to apply a setting.
    """
    settings = settings.get("text_config") or settings
    places = [
        (path, module, name, child)
        for path, module in model.named_modules()
        for name, child in module.children().items()
        if isinstance(child, (nn.RoPE, *_SCALED))
    ]
    sets = settings.get("rope_parameters") or {}
    if UNREAD in settings and any(isinstance(one, dict) for one in sets.values()):
        return _correct_by_type(places, sets, settings, unread)
    scaling, passed_over = settings.get("rope_scaling"), settings.get(UNREAD) or {}
    if scaling is None and not passed_over:
        return None
    if not places and (passed_over or getattr(getattr(model, "args", None), "rope_scaling", None) is None):
        name, value = next(iter((passed_over or {"rope_scaling": scaling}).items()))
        raise unread(name, value)
    plain = all(type(child) is nn.RoPE and child.scale == 1 for _, _, _, child in places)
    for _, module, name, child in places:
        _check_part(child, settings, unread)
        if plain or isinstance(child, SuScaledRoPE) or (isinstance(child, YarnRoPE) and _is_own_yarn(scaling)):
            module[name] = _right(child, scaling, settings)


def _correct_by_type(places: list[Any], sets: dict[str, Any], settings: dict[str, Any], unread: Unread) -> None:
    types = settings["layer_types"]
    if not places:
        raise unread("rope_parameters", sets)
    for path, module, name, child in places:
        number = next((int(part) for part in path.split(".") if part.isdecimal()), None)
        kind = types[number] if number is not None and number < len(types) else None
        rope = sets.get(str(_USUAL_TYPES.get(kind, kind)))
        if rope is None:
            raise unread("rope_parameters", sets)
        of_layer = settings | rope
        _check_part(child, of_layer, unread)
        module[name] = _right(child, None if rope["rope_type"] == "default" else rope, of_layer)


_USUAL_TYPES: dict[Any, Any] = {other: usual for usual, other in OTHER_LAYER_TYPES.items()}


def _check_part(rope: Any, settings: dict[str, Any], unread: Unread) -> None:
    """Raise where a module turns another part of a head than the settings say."""
    partial, head_dim = settings.get("partial_rotary_factor"), settings.get("head_dim")
    if partial is None or settings.get("model_type") in TURNS_ALL or settings.get("qk_rope_head_dim"):
        return
    head_dim = head_dim or settings["hidden_size"] // settings["num_attention_heads"]
    if _dims(rope) != int(head_dim * partial):
        raise unread("partial_rotary_factor", partial)


def _right(rope: Any, scaling: dict[str, Any] | None, settings: dict[str, Any]) -> nn.Module:
    dims, theta = _dims(rope), settings.get("rope_theta") or rope.base
    if settings.get("model_type") in TURNS_ALL:
        dims = int(dims * settings.get("partial_rotary_factor", 1.0))
    if scaling is not None and scaling["rope_type"] == "longrope":
        return LongRope(dims, settings | {"rope_scaling": scaling})
    if scaling is not None and _is_own_yarn(scaling):
        return YarnRope(dims, float(theta), rope.traditional, scaling)
    made: nn.Module = initialize_rope(dims, theta, rope.traditional, scaling, settings.get("max_position_embeddings"))
    return made


def _is_own_yarn(scaling: dict[str, Any] | None) -> bool:
    """Whether mlx-lm's YaRN is another one than these settings say."""
    if scaling is None or scaling["rope_type"] != "yarn":
        return False
    return not scaling.get("truncate", True) or scaling.get("attention_factor") is not None


def _dims(rope: Any) -> int:
    return int(rope.dim if isinstance(rope, SuScaledRoPE) else rope.dims)


_SCALED = (SuScaledRoPE, Llama3RoPE, YarnRoPE, DynamicNTKScalingRoPE)
