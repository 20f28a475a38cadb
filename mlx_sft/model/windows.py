"""Which layers look at a window of positions only: as the checkpoint means it, and as mlx-lm's code computes it."""

from __future__ import annotations

from typing import Any

_PATTERNS = ("sliding_window_pattern", "full_attention_interval")
"""Settings of mlx-lm's code that say that every so many-th layer, and no other, has full attention."""


def layer_pattern(settings: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The number by which a family's code goes, where its checkpoints name the type of each layer.

    Returns:
        The setting; an empty mapping where the code reads none, or where no number says what the types do.
    """
    types = settings.get("layer_types")
    name = next((name for name in _PATTERNS if name in fields), None)
    if name is None or not isinstance(types, list) or isinstance(fields[name], str):
        return {}
    full = [kind == "full_attention" for kind in types]
    every = full.index(True) + 1 if any(full) else len(full) + 1
    fits = full == [number % every == 0 for number in range(1, len(full) + 1)]
    return {name: every} if fits else {}


def same_windows(settings: dict[str, Any], defaults: dict[str, Any], fields: dict[str, Any]) -> bool:
    """Whether mlx-lm's code gives the window to those layers for which the checkpoint means it."""
    return _meant(settings, defaults) == _computed(settings | layer_pattern(settings, fields), fields)


def _meant(settings: dict[str, Any], defaults: dict[str, Any]) -> list[bool]:
    """Those that the checkpoint names, where its family has types of layers."""
    layers = settings["num_hidden_layers"]
    if defaults and "sliding_window" not in defaults:  # transformers would not read it
        return [False] * layers
    if not defaults or "layer_types" in defaults:
        types = settings.get("layer_types") or ["sliding_attention"] * layers
        return [kind == "sliding_attention" for kind in types]
    return [True] * layers


def _computed(settings: dict[str, Any], fields: dict[str, Any]) -> list[bool] | None:
    """None where the code goes by something else than is known here."""
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
