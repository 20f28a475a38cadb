"""Joined rows: the rows of a micro-batch lie end to end, without padding, which saves what the CPU would compute in vain.

    a a a b b b b b c     the products of a layer see one long row of all tokens; attention sees a, b and c one after another

A GPU is given rows of equal width instead, because its steps are compiled by shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_sft.cpu.fast_core import Core
from mlx_sft.data.batches import Spans


@dataclass
class JoinedRows:
    """Where the rows of the micro-batch lie that is computed now; empty where they are not joined."""

    spans: Spans = ()


def row_by_row(core: Core, spans: Spans) -> Core:
    """A block's core, applied to each of the joined rows alone; masks are cut to the row."""
    if len(spans) < 2:
        return core

    def apply(projected: list[mx.array], x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        length = x.shape[1]

        def of_row(value: Any, start: int, end: int) -> Any:
            masks = isinstance(value, mx.array) and value.shape[-2:] == (length, length)
            return value[..., start:end, start:end] if masks else value

        # The gradient of a split is one concatenation; that of a slice would be an array of the whole for each row.
        ends = [end for _, end in spans[:-1]]
        *products, xs = (mx.split(whole, ends, axis=1) for whole in (*projected, x))
        rows = [
            core(
                [product[row] for product in products],
                xs[row],
                *(of_row(value, start, end) for value in args),
                **{name: of_row(value, start, end) for name, value in kwargs.items()},
            )
            for row, (start, end) in enumerate(spans)
        ]
        return mx.concatenate(rows, axis=1)

    return apply
