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

Unread = Callable[[str, Any], Exception]
"""Makes the error for a setting, of this name and value, that nothing reads."""

_SETTINGS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"},
    "longrope": {"factor", "attention_factor", "original_max_position_embeddings", "short_factor", "long_factor"},
}
"""The settings that mlx-lm's `initialize_rope`, or the module here, reads, by type of RoPE."""

_WITHOUT_EFFECT = {"mrope_section", "mrope_interleaved"}
"""They say which part of a position turns which pair of numbers. For text alone, the parts are equal."""


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
    if theta is not None and not fields.keys() & {"rope_theta", "rope_parameters"}:
        raise unread("rope_theta", theta)
    if partial not in (None, 1.0) and not fields.keys() & {"partial_rotary_factor"}:
        raise unread("partial_rotary_factor", partial)
    rope = {name: value for name, value in rope.items() if value is not None and name not in _WITHOUT_EFFECT}
    for name, value in rope.items():
        positive = name != "factor" or (isinstance(value, int | float) and value > 0)
        if name not in _SETTINGS.get(kind, ()) or not positive:
            raise unread(f"{name} (of RoPE type {kind})", value)
    if kind == "yarn":
        for name, other in (("mscale", "mscale_all_dim"), ("mscale_all_dim", "mscale")):
            if rope.get(name) and not rope.get(other):  # transformers goes by both or neither
                raise unread(f"{name} without {other}", rope[name])
    if kind in ("yarn", "longrope"):
        original = settings.get("original_max_position_embeddings") or settings["max_position_embeddings"]
        rope.setdefault("original_max_position_embeddings", original)
    scaling = None if kind == "default" else {"type": kind, "rope_type": kind} | rope
    parameters = (scaling or {"type": "default", "rope_type": "default"}) | {"rope_theta": theta}
    translated: dict[str, Any] = {"rope_scaling": scaling, "rope_parameters": parameters}
    if theta is not None:
        translated["rope_theta"] = theta
    if partial is not None:
        translated["partial_rotary_factor"] = parameters["partial_rotary_factor"] = partial
    return translated


def _by_type_of_layer(
    rope: dict[str, Any], settings: dict[str, Any], fields: dict[str, Any], unread: Unread
) -> dict[str, Any]:
    """Settings for each type of layer. Gemma 3's code reads a separate base for layers with a window; others' read the sets."""
    if "rope_parameters" in fields:
        return {}
    if not {"rope_theta", "rope_local_base_freq"} <= fields.keys():
        raise unread("rope_parameters", rope)
    windowed = dict(rope.get("sliding_attention") or {})
    base = windowed.pop("rope_theta", None) or settings.get("rope_local_base_freq") or fields["rope_local_base_freq"]
    if windowed.pop("rope_type", "default") != "default" or any(value is not None for value in windowed.values()):
        raise unread("rope_parameters of sliding_attention", rope["sliding_attention"])
    full = settings | {"rope_scaling": None, "rope_parameters": rope.get("full_attention") or {}}
    return translate_rope(full, fields, unread) | {"rope_local_base_freq": base}


class LongRope(nn.Module):
    """LongRoPE (Ding et al. 2024, https://arxiv.org/abs/2402.13753): one set of frequencies up to the length that the model was first
    trained with, and another beyond. mlx-lm's takes the second for rows of every length.
    """

    def __init__(self, dims: int, settings: dict[str, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        rope: dict[str, Any] = settings["rope_scaling"]
        if {len(rope["short_factor"]), len(rope["long_factor"])} != {dims // 2}:
            raise ValueError(f"LongRoPE needs {dims // 2} factors")
        frequencies = settings["rope_theta"] ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
        self._dims = dims
        self._short = mx.array(rope["short_factor"], mx.float32) * frequencies
        self._long = mx.array(rope["long_factor"], mx.float32) * frequencies
        self._original = int(rope["original_max_position_embeddings"])
        self._scale = rope.get("attention_factor") or self._attention_factor(
            rope.get("factor") or settings["max_position_embeddings"] / self._original
        )

    def __call__(self, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        end = x.shape[-2] + (int(np.array(offset).max()) if isinstance(offset, mx.array) else offset)
        turned: mx.array = mx.fast.rope(
            x.at[..., : self._dims].multiply(self._scale),
            self._dims,
            traditional=False,
            base=None,
            scale=1.0,
            offset=offset,
            freqs=self._long if end > self._original else self._short,
        )
        return turned

    def _attention_factor(self, factor: float) -> float:
        return math.sqrt(1 + math.log(factor) / math.log(self._original)) if factor > 1 else 1.0


def correct_ropes(model: nn.Module, settings: dict[str, Any]) -> None:
    """Give each layer the rotation that its checkpoint means, where mlx-lm's code gives it another.

    Several families' code takes `rope_scaling` and ignores it. Where some layers have it (OLMo 3), the code is right.

    Args:
        model: Made from `settings`, translated.

    Raises:
        ValueError: If there is a scaling, and no module of the model is known to apply it.
    """
    settings = settings.get("text_config") or settings
    scaling = settings.get("rope_scaling")
    if scaling is None or "rope_local_base_freq" in settings:  # by type of layer: such code reads it
        return
    places = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.children().items()
        if isinstance(child, (nn.RoPE, *_SCALED))
    ]
    if not places and getattr(getattr(model, "args", None), "rope_scaling", None) is None:
        raise ValueError(f"mlx-lm's code for this family does not read rope_scaling = {scaling}")
    unread = all(type(child) is nn.RoPE and child.scale == 1 for _, _, child in places)
    for module, name, child in places:
        if unread or isinstance(child, SuScaledRoPE):
            module[name] = _right(child, scaling, settings)


def _right(rope: Any, scaling: dict[str, Any], settings: dict[str, Any]) -> nn.Module:
    if scaling["type"] == "longrope":
        return LongRope(rope.dim if isinstance(rope, SuScaledRoPE) else rope.dims, settings)
    made: nn.Module = initialize_rope(
        rope.dims, rope.base, rope.traditional, scaling, settings.get("max_position_embeddings")
    )
    return made


_SCALED = (SuScaledRoPE, Llama3RoPE, YarnRoPE, DynamicNTKScalingRoPE)
