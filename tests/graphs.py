"""Graphs that MLX has recorded and not computed: how many primitives of which kind, each of which is a kernel or more on a GPU."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import mlx.core as mx

_VIEWS = (
    "Transpose",
    "Broadcast",
    "Flatten",
    "Unflatten",
    "Squeeze",
    "ExpandDims",
    "Reshape",
    "Slice",
    "StopGradient",
    "Depends",
)
"""They move nothing."""


def recorded(file: Path, *arrays: mx.array) -> Counter[str]:
    """The primitives from which arrays are to be computed, by kind; a compiled graph is one primitive."""
    mx.export_to_dot(str(file), *arrays)
    return Counter(re.findall(r'label ?= ?"([A-Za-z]+)', file.read_text()))


def primitives(file: Path, *arrays: mx.array) -> int:
    """How many there are that compute something."""
    return sum(count for kind, count in recorded(file, *arrays).items() if kind not in _VIEWS)
