"""The norm of a gradient, clipping, and the parts in which many arrays are gone through."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

Arrays = dict[str, mx.array]

PART_BYTES = 16 * 2**20


def global_norm(gradients: Arrays) -> mx.array:
    """The Euclidean norm of all gradients together, float32; evaluated a part after another."""
    squares: list[mx.array] = []
    for part in parts(list(gradients), gradients):
        squares += [mx.square(gradients[name]).sum() for name in part]
        mx.eval(squares)
    return mx.sqrt(mx.stack(squares).sum())


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
