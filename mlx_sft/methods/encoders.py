"""What the networks have in common that make what a method puts in front of a text: their arrays, named and drawn as in PEFT."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import mlx.core as mx

from mlx_sft.methods import Parameters

EMBEDDING = "embedding.weight"
"""PEFT's name of what goes into an encoder: [n, width]."""


class Drawn(NamedTuple):
    """An array of an encoder: PEFT's name, its shape, and the bound within which torch draws it evenly."""

    name: str
    shape: tuple[int, ...]
    bound: float


def linear_arrays(name: str, features: int, rows: int) -> Iterator[Drawn]:
    """The weight [rows, features] and the bias [rows] of a linear layer."""
    bound = 1 / math.sqrt(features)
    yield Drawn(f"{name}.weight", (rows, features), bound)
    yield Drawn(f"{name}.bias", (rows,), bound)


def draw_encoder(embedding: tuple[int, int], arrays: Iterable[Drawn], key: mx.array) -> Parameters:
    """As torch draws them: embeddings [n, width] from N(0, 1), and the encoder's arrays evenly within their bounds."""
    arrays = list(arrays)
    own_key, *keys = mx.random.split(key, 1 + len(arrays))
    return {EMBEDDING: mx.random.normal(embedding, key=own_key)} | {
        name: mx.random.uniform(-bound, bound, shape, key=key)
        for (name, shape, bound), key in zip(arrays, keys, strict=True)
    }


def linear(states: mx.array, parameters: Parameters, name: str) -> mx.array:
    """A linear layer, [n, features] → [n, rows]."""
    return mx.addmm(parameters[f"{name}.bias"], states, parameters[f"{name}.weight"].T)
