"""Joined rows: the rows of a micro-batch lie end to end, without padding, which saves what the CPU would compute in vain.

    a a a b b b b b c     the products of a layer see one long row of all tokens; attention sees a, b and c one after another
    p p p x x x y y       two rows that begin alike, p x and p y: attention sees p once more before y

A GPU is given rows of equal width instead, because its steps are compiled by shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_sft.cpu.fast_core import Core
from mlx_sft.data.batches import Span, Spans


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

        def of_row(value: Any, span: Span) -> Any:
            masks = isinstance(value, mx.array) and value.shape[-2:] == (length, length)
            return value[..., : span.length, : span.length] if masks else value

        def computed(row: int, span: Span) -> mx.array:
            *own, own_x = (_with_shared(parts, row, span, heads) for parts in split)
            named = {name: of_row(value, span) for name, value in kwargs.items()}
            return core(own, own_x, *(of_row(value, span) for value in args), **named)[:, span.shared :]

        # The gradient of a split is one concatenation; that of a slice would be an array of the whole for each row.
        ends, heads = [span.end for span in spans[:-1]], {span.start: row for row, span in enumerate(spans)}
        split: list[list[mx.array]] = [list(mx.split(whole, ends, axis=1)) for whole in (*projected, x)]
        return mx.concatenate([computed(row, span) for row, span in enumerate(spans)], axis=1)

    return apply


def _with_shared(parts: list[mx.array], row: int, span: Span, heads: dict[int, int]) -> mx.array:
    """A row's part, and before it what it has from another."""
    if not span.shared:
        return parts[row]
    return mx.concatenate([parts[heads[span.head]][:, : span.shared], parts[row]], axis=1)
