"""Examples → flat arrays, as they are written to disk and sent between processes.

    token_ids   int32: those of all examples, one after another
    spans       (start, end, weight): the stretches of an example that are supervised, and each one's weight in the loss
    table       a record an example: where its tokens and spans lie, its lengths, signs, facts and SHA-256
    origins     text: each example's origin behind its source's name (`:17#2`), so that a file may move

Knows nothing of files or of how an example is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.example import Example
from mlx_sft.data.template import Facts

FACTS = tuple(field.name for field in fields(Facts))
SPAN = np.dtype([("start", "<i4"), ("end", "<i4"), ("weight", "<f4")])
TABLE = np.dtype(
    [
        ("first_token", "<i8"),
        ("length", "<i4"),
        ("first_span", "<i8"),
        ("spans", "<i4"),
        ("first_character", "<i8"),
        ("characters", "<i4"),
        ("row_characters", "<i4"),
        ("row", "<i8"),
        ("needed_length", "<i4"),
        ("supervised_tokens", "<i4"),
        ("largest_token_id", "<i4"),
        ("signs", "<u4"),
        ("digest", "V32"),
        *((name, "<i4") for name in FACTS),
    ]
)
"""`characters` are those of the example's origin in UTF-8, the first `row_characters` of them its row's origin."""
_ELSEWHERE = "\0"
"""Before an origin that does not begin with its source's name."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some rows in order, packed; what is counted in it (tokens, spans, characters, rows) is counted from its beginning.

    Attributes:
        rows: How many rows were read for it, those without an example included.
    """

    token_ids: NDArray[np.int32]
    spans: NDArray[np.void]
    table: NDArray[np.void]
    origins: bytes
    rows: int


@dataclass(frozen=True, slots=True)
class PackedRow:
    """What is packed of one row: its origin, its examples (none for a row that is lost) and a bit mask of its signs."""

    origin: str
    examples: Sequence[Example]
    signs: int = 0


def pack(rows: Iterable[PackedRow], name: str = "") -> Block:
    """The rows as one block.

    Args:
        name: Of their source, with which their origins begin.
    """
    token_ids: list[NDArray[np.int32]] = []
    spans: list[NDArray[np.void]] = []
    records: list[tuple[object, ...]] = []
    origins = bytearray()
    first_token, first_span, number = 0, 0, -1
    for number, row in enumerate(rows):
        row_origin = _shortened(row.origin, name)
        for example in row.examples:
            origin = _shortened(example.origin, name)
            own_spans = spans_of(example.loss_weights)
            records.append(
                (first_token, len(example), first_span, len(own_spans), len(origins), len(origin),
                 len(row_origin) if origin.startswith(row_origin) else len(origin), number,
                 example.needed_length, example.supervised_tokens, int(example.token_ids.max(initial=0)), row.signs,
                 example.digest(), *(getattr(example.facts, name) for name in FACTS))
            )  # fmt: skip
            token_ids.append(example.token_ids)
            spans.append(own_spans)
            origins += origin
            first_token += len(example)
            first_span += len(own_spans)
    return Block(
        np.concatenate([np.zeros(0, np.int32), *token_ids]).astype("<i4", copy=False),
        np.concatenate([np.zeros(0, SPAN), *spans]),
        np.array(records, TABLE),
        bytes(origins),
        number + 1,
    )


def moved(block: Block, *, tokens: int, spans: int, characters: int, rows: int) -> NDArray[np.void]:
    """A block's table as it is behind so many tokens, spans, characters of origins, and rows."""
    table = block.table.copy()
    table["first_token"] += tokens
    table["first_span"] += spans
    table["first_character"] += characters
    table["row"] += rows
    return table


def spans_of(loss_weights: NDArray[np.float32]) -> NDArray[np.void]:
    """The stretches of equal weight other than 0, shape (spans,) of dtype `SPAN`; `weights_of` is the inverse."""
    bounds = np.flatnonzero(loss_weights[1:] != loss_weights[:-1]) + 1
    starts = np.concatenate([[0], bounds]) if len(loss_weights) else bounds
    spans = np.zeros(len(starts), SPAN)
    spans["start"] = starts
    spans["end"] = np.concatenate([bounds, [len(loss_weights)]])[: len(starts)]
    spans["weight"] = loss_weights[starts]
    supervised: NDArray[np.void] = spans[spans["weight"] != 0]
    return supervised


def weights_of(spans: NDArray[np.void], length: int) -> NDArray[np.float32]:
    """float32, shape (length,): the weight of each token; spans may reach beyond the length."""
    weights = np.zeros(length, np.float32)
    for start, end, weight in spans.tolist():
        weights[start:end] = weight
    return weights


def origin_from(stored: str, name: str) -> str:
    """An origin in full; the inverse of how `pack` stores it."""
    return stored.removeprefix(_ELSEWHERE) if stored.startswith(_ELSEWHERE) else name + stored


def _shortened(origin: str, name: str) -> bytes:
    """An origin without its source's name."""
    shortened = origin.removeprefix(name) if origin.startswith(name) else _ELSEWHERE + origin
    return shortened.encode("utf-8", "surrogatepass")
