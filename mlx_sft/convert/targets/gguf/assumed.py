"""Settings that llama.cpp does not read, and takes to be as the published models of a family have them.

A checkpoint with another value would be another model there, and nothing would say so.

Read in its source at commit 0c1e57098 (`conversion/`, `src/models/`), and measured: each value that is refused here moved the logits of a
small random model by a tenth to all of their size, or made a file that llama.cpp does not open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_sft.errors import UserError
from mlx_sft.model.translate import text_settings

Settings = dict[str, Any]


def _scale_of_attention(largest: int) -> Callable[[Settings], float]:
    """Of Gemma: a head's size; in the largest model, told by its number of layers, its share of the width."""

    def taken(settings: Settings) -> float:
        if settings["num_hidden_layers"] == largest:
            return float(settings["hidden_size"] // settings["num_attention_heads"])
        return float(settings["head_dim"])

    return taken


def _slide_but_every(number: int) -> Callable[[Settings], list[str]]:
    return lambda settings: ["sliding_attention" if layer % number else "full_attention" for layer in _layers(settings)]


def _slide_in_the_largest(largest: int) -> Callable[[Settings], Any]:
    """Of EXAONE 4: what the settings say where there are so many layers, else full attention."""

    def taken(settings: Settings) -> Any:
        is_largest = settings["num_hidden_layers"] == largest
        return settings["layer_types"] if is_largest else ["full_attention"] * settings["num_hidden_layers"]

    return taken


def _turn_but_every(number: int) -> Callable[[Settings], list[int]]:
    return lambda settings: [int(layer % number > 0) for layer in _layers(settings)]


def _layers(settings: Settings) -> range:
    return range(1, settings["num_hidden_layers"] + 1)


_TAKEN: dict[str, dict[str, Any]] = {
    "cohere2": {"layer_types": _slide_but_every(4)},
    "ernie4_5": {"use_bias": False},
    "ernie4_5_moe": {"use_bias": False, "moe_layer_interval": 1},
    "exaone4": {"layer_types": _slide_in_the_largest(64)},
    "gemma2": {"query_pre_attn_scalar": _scale_of_attention(46), "layer_types": _slide_but_every(2)},
    "gemma3_text": {
        "attention_bias": False,
        "query_pre_attn_scalar": _scale_of_attention(62),
        "layer_types": _slide_but_every(6),
    },
    "gpt_oss": {"layer_types": _slide_but_every(2)},
    "hunyuan_v1_dense": {"attention_bias": False},
    "olmoe": {"norm_topk_prob": False},
    "qwen2_moe": {"norm_topk_prob": False},
    "qwen3": {"attention_bias": False},
    "qwen3_moe": {"norm_topk_prob": True, "attention_bias": False},
    "smollm3": {"attention_bias": False, "mlp_bias": False, "no_rope_layers": _turn_but_every(4)},
}
"""By family: a setting, and the value that llama.cpp computes with, or what makes it of the others."""

_SCALED_AS_LLAMA_3 = {"apertus", "arcee", "exaone4", "llama", "mistral", "mixtral"}
_SCALED_AS_PHI_3 = {"minicpm3", "phi3", "phimoe"}
_SCALES_YARN_OTHERWISE = {"deepseek_v2", "deepseek_v3", "deepseek_v32", "ministral3", "mistral4"}
"""Families whose converter writes YaRN's `mscale` settings."""

_WITHOUT_WINDOWS = {
    "llama",
    "mistral",
    "mixtral",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "starcoder2",
}
"""Families that have full attention in llama.cpp, whatever `sliding_window` says."""


def refuse_other_settings(base: Path) -> None:
    """Raise `UserError` for a checkpoint that llama.cpp would compute otherwise than it says."""
    settings = text_settings(base)
    family = settings["model_type"]
    for name, value, taken in _otherwise(settings):
        raise UserError(
            f"llama.cpp would compute another model, and say nothing: of models of type {family} it takes {name} to be {taken}, "
            f"and here it is {value}",
            where=str(base / "config.json"),
            hint="export it with --format merged (for transformers) or --format mlx",
        )


def notes_of(base: Path) -> list[str]:
    """What a person should know of a checkpoint that llama.cpp computes rightly within limits alone."""
    settings = text_settings(base)
    window, notes = settings.get("sliding_window"), []
    slides = settings.get("use_sliding_window", True) and settings["model_type"] in _WITHOUT_WINDOWS
    if window and slides and window < settings.get("max_position_embeddings", math.inf):
        notes.append(
            f"llama.cpp leaves out this model's sliding window: it computes this model up to {window} tokens, and another one beyond"
        )
    for _, rope in _ropes(settings):
        original = rope.get("original_max_position_embeddings") or settings.get("original_max_position_embeddings")
        if _kind(rope) in ("longrope", "su") and original:
            notes.append(
                f"open it with a context (-c) of {original} tokens, unless you need a longer one: "
                "then llama.cpp takes LongRoPE's factors for long texts, also for short ones"
            )
        if _kind(rope) == "yarn" and rope.get("truncate") is False:
            notes.append(
                "llama.cpp rounds YaRN's bounds, which this model does not: its logits are some thousandths off"
            )
    return notes


def _otherwise(settings: Settings) -> Iterator[tuple[str, Any, Any]]:
    """Each setting that llama.cpp takes to be another, its value, and what it takes it to be."""
    family = settings["model_type"]
    for name, value in _TAKEN.get(family, {}).items():
        if settings.get(name) is None:
            continue
        taken = value(settings) if callable(value) else value
        if settings[name] != taken:
            yield name, settings[name], taken
    for kind, rope in _ropes(settings):
        yield from _rope_otherwise(settings, f"rope_parameters {kind}".strip(), rope)


def _ropes(settings: Settings) -> Iterator[tuple[str, Settings]]:
    """The settings of RoPE, and of which type of layers they are; an empty text where they are of all."""
    found = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    by_type = {kind: rope for kind, rope in found.items() if isinstance(rope, dict)}
    yield from (by_type or {"": found}).items()


def _kind(rope: Settings) -> Any:
    return rope.get("rope_type") or rope.get("type")


def _rope_otherwise(settings: Settings, where: str, rope: Settings) -> Iterator[tuple[str, Any, Any]]:
    kind, family = _kind(rope), settings["model_type"]
    known = {"llama3": _SCALED_AS_LLAMA_3, "longrope": _SCALED_AS_PHI_3, "su": _SCALED_AS_PHI_3}
    stated = usual = 1.0
    if kind in known and family not in known[kind]:
        yield f"the type of {where}", kind, "default"
    elif kind in ("longrope", "su") and family != "minicpm3":
        original = rope.get("original_max_position_embeddings") or settings["original_max_position_embeddings"]
        factor = settings["max_position_embeddings"] / original
        usual = _longrope(factor, original)
        stated = float(rope.get("attention_factor") or _longrope(rope.get("factor") or factor, original))
    elif kind == "yarn" and family not in _SCALES_YARN_OTHERWISE:
        usual, stated = _yarn(rope["factor"]), _attention_factor(rope)
    if not math.isclose(stated, usual, rel_tol=1e-4):
        yield f"the attention_factor of {where}", round(stated, 4), round(usual, 4)


def _attention_factor(rope: Settings) -> float:
    """As transformers has it: `_compute_yarn_parameters` in its `modeling_rope_utils.py`."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    above, below = rope.get("mscale"), rope.get("mscale_all_dim")
    return _yarn(rope["factor"], above) / _yarn(rope["factor"], below) if above and below else _yarn(rope["factor"])


def _yarn(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(factor: float, original: int) -> float:
    """As transformers has it: `_compute_longrope_parameters`."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
