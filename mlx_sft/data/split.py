"""Examples → those to train on and those to validate on: seeded, and nothing that is supervised is also held out.

Knows rows by their content; knows nothing of files.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.dataset import Examples
from mlx_sft.errors import UserError


def split(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Training and validation examples, drawn by the seed; the order is kept.

    Equal rows stay together, so do the turns of one row, and rows that have a turn in common.

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
    """Which group each example is of, groups numbered as they first appear; and the groups' sizes in examples.

    Rows are of one group where an example of the one equals an example of the other: conversations with the same first turns
    have these in common where each turn is an example.
    """
    _, content_of = np.unique(examples.content_ids(), return_inverse=True)
    _, row_of = np.unique(examples.rows, return_inverse=True)
    group_of_row = np.arange(row_of.max(initial=-1) + 1)  # the first row that each is known to be with
    while True:
        first = np.full(content_of.max(initial=-1) + 1, len(group_of_row))
        np.minimum.at(first, content_of, group_of_row[row_of])
        nearer = group_of_row.copy()
        np.minimum.at(nearer, group_of_row[row_of], first[content_of])  # the whole group goes over, not a row at a time
        nearer = nearer[nearer]
        if np.array_equal(nearer, group_of_row):
            break
        group_of_row = nearer
    _, groups = np.unique(group_of_row[row_of], return_inverse=True)
    return groups, np.bincount(groups)
