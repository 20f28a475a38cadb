"""The norm of a gradient, clipping, and the parts in which many arrays are gone through."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mlx.core as mx

Arrays = dict[str, mx.array]

PART_BYTES = 16 * 2**20

PIECE = 2**21
"""Numbers of a large array that are gone through at once."""

_BLOCK = 256
"""A piece is a whole number of blocks of so many numbers, which an optimizer may keep something of."""


def global_norm(gradients: Arrays) -> mx.array:
    """The Euclidean norm of all gradients together, float32; evaluated a part after another."""
    squares: list[mx.array] = []
    for part in parts(list(gradients), gradients):
        squares += [_sum_of_squares(gradients[name]) for name in part]
        mx.eval(squares)
    return mx.sqrt(mx.stack(squares).sum())


def _sum_of_squares(gradient: mx.array) -> mx.array:
    """Float32; one that is not float32 becomes so a piece after another. Numbers are added row after row, however they lie in memory."""
    pieces = row_pieces(gradient.shape) if gradient.dtype != mx.float32 else []
    if len(pieces) < 2:
        return mx.square(gradient.astype(mx.float32)).reshape(-1).sum()
    total = mx.array(0.0)
    for rows in pieces:
        total = total + mx.square(gradient[rows].astype(mx.float32)).sum()
        mx.eval(total)
    return total


def clip_scale(norm: mx.array, max_norm: float) -> mx.array | None:
    """What gradients of this norm are multiplied with, as `torch.nn.utils.clip_grad_norm_` does; None where `max_norm` is 0."""
    return mx.minimum(max_norm / (norm + 1e-6), 1.0) if max_norm else None


def parts(names: list[str], arrays: Arrays) -> Iterator[list[str]]:
    """The names in parts of about 16 MiB: what a part is computed from in between exists for it alone, and small arrays go together."""
    part: list[str] = []
    taken = 0
    for name in names:
        if part and taken + arrays[name].nbytes > PART_BYTES:
            yield part
            part, taken = [], 0
        part.append(name)
        taken += arrays[name].nbytes
    if part:
        yield part


def row_pieces(shape: tuple[int, ...]) -> list[slice]:
    """The rows of a large array in pieces of about 2 million numbers; one piece for what is smaller than two."""
    rows, row = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    block = _BLOCK // math.gcd(_BLOCK, row)
    step = max(block, PIECE // row // block * block)
    starts = [number * step for number in range(max(1, rows // step))]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], rows], strict=True)]
