"""Examples → those to train on and those to validate on: seeded, and nothing that is learnt is also held out.

Knows rows by their content; knows nothing of files.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.store import Examples
from mlx_sft.errors import UserError


def split(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Training and validation examples, drawn by the seed; the order is kept.

    Equal rows stay together, and so do the turns of one row.

    Raises:
        UserError: where the two cannot both have an example.
    """
    groups, sizes = _groups(examples)
    if len(sizes) < 2:
        raise UserError(
            f"cannot hold out a part of {len(sizes)} different conversation",
            hint="give more rows, or a validation file with --valid",
        )
    order = np.random.default_rng(seed).permutation(len(sizes))
    wanted = max(1, round(fraction * len(examples)))
    held_out = np.zeros(len(sizes), bool)
    taken = 0
    for group, size in zip(order[:-1].tolist(), sizes[order[:-1]].tolist(), strict=True):
        if taken + size <= wanted:
            held_out[group] = True
            taken += size
            if taken == wanted:
                break
    if not taken:
        held_out[order[np.argmin(sizes[order])]] = True
    chosen = held_out[groups]
    return examples.select(np.flatnonzero(~chosen)), examples.select(np.flatnonzero(chosen))


def _groups(examples: Examples) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which group of equal rows each example is of, groups numbered as they first appear; and the groups' sizes in examples."""
    contents, rows = examples.content_ids(), examples.rows
    starts = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]])) if len(rows) else np.zeros(0, np.int64)
    turns = np.diff(np.concatenate([starts, [len(rows)]]))
    of_row = contents[starts]
    for row in np.flatnonzero(turns > 1).tolist():
        own = contents[starts[row] : starts[row] + turns[row]]
        of_row[row] = int.from_bytes(hashlib.sha256(own.tobytes()).digest()[:8], "little")
    _, first, inverse = np.unique(of_row, return_index=True, return_inverse=True)
    by_appearance = np.empty(len(first), np.int64)
    by_appearance[np.argsort(first)] = np.arange(len(first))
    groups = by_appearance[inverse]
    return np.repeat(groups, turns), np.bincount(groups, weights=turns, minlength=len(first)).astype(np.int64)
