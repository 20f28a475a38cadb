"""Examples as flat arrays, one `Store` a source, and as a sequence of `Example`s with columns, whatever their size.

    token_ids   int32: those of all examples, one after another
    spans       (start, end, weight): the stretches of an example that are supervised, and each one's weight in the loss
    table       a record an example: where its tokens, spans, breaks and origin lie, its row, signs and facts
    breaks      (token, level): where an example may be split, counted from its first token; none where it may not
    contents    a record an example: its lengths, its largest token, its SHA-256
    origins     UTF-8: each example's origin, which begins with that of its row

The arrays may be mapped from disk: an example's tokens are read when it is asked for.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlx_sft.data.example import SPAN, Example, Note, Outcome, spans_of, weights_of
from mlx_sft.data.key_counts import KeyCount, KeyCounts
from mlx_sft.data.splitting import BREAK
from mlx_sft.data.template import Facts
from mlx_sft.data.token_counts import TokenColumn
from mlx_sft.errors import UserError

_CONTENT: dict[str, tuple[str, Callable[[Example], Any]]] = {
    "length": ("<i4", len),
    "needed_length": ("<i4", lambda example: example.needed_length),
    "supervised_tokens": ("<i4", lambda example: example.supervised_tokens),
    "largest_token_id": ("<i4", lambda example: example.token_ids.max(initial=0)),
    "digest": ("V32", Example.digest),
}
CONTENTS = np.dtype([(name, dtype) for name, (dtype, _) in _CONTENT.items()])
"""What depends on an example's tokens and weights, and so changes where it is truncated."""
FACTS = tuple(field.name for field in fields(Facts))
TABLE = np.dtype(
    [
        ("first_token", "<i8"),
        ("first_span", "<i8"),
        ("spans", "<i4"),
        ("first_break", "<i8"),
        ("breaks", "<i4"),
        ("first_character", "<i8"),
        ("characters", "<i4"),
        ("row_characters", "<i4"),
        ("row", "<i8"),
        ("signs", "<u4"),
        *((name, "<i4") for name in FACTS),
    ]
)
"""`characters` are the bytes of the example's origin, the first `row_characters` of them its row's origin."""


@dataclass(frozen=True, slots=True)
class LostRow:
    """A row without an example: its number from 0, the note that says why, and whether it has another format than others."""

    number: int
    note: Note
    mixed: bool


@dataclass(frozen=True, slots=True)
class Store:
    """Some rows of one source in order, in memory or mapped from disk; what is counted in it is counted from its beginning.

    Attributes:
        rows: How many rows were read for it, those without an example included.
        lost: Those without an example.
        row_format: The name of the rows' format, where it is known.
        keys: What became of the rows' keys.
    """

    token_ids: NDArray[np.int32]
    spans: NDArray[np.void]
    breaks: NDArray[np.void]
    table: NDArray[np.void]
    contents: NDArray[np.void]
    origins: NDArray[np.uint8]
    rows: int
    lost: list[LostRow] = field(default_factory=list)
    row_format: str | None = None
    keys: list[KeyCount] = field(default_factory=list)

    def example(self, index: int) -> Example:
        """Example number `index`."""
        record = dict(zip(TABLE.names or (), self.table[index].item(), strict=True))
        length, token, span = self.contents["length"][index].item(), record["first_token"], record["first_span"]
        return Example(
            self._origin(record, "characters"),
            self.token_ids[token : token + length],
            weights_of(self.spans[span : span + record["spans"]], length),
            Facts(*(record[name] for name in FACTS)),
            self.breaks[record["first_break"] : record["first_break"] + record["breaks"]],
        )

    def row_origin(self, index: int) -> str:
        """The origin of the row that example number `index` is of."""
        return self._origin(self.table[index], "row_characters")

    def _origin(self, record: Any, characters: str) -> str:
        first = record["first_character"]
        return self.origins[first : first + record[characters]].tobytes().decode("utf-8", "surrogatepass")

    def truncated_to(self, longest: int) -> Store:
        """With the first `longest` tokens of every example that is longer; of what is stored, only the contents change."""
        too_long = np.flatnonzero(self.contents["length"] > longest).tolist()
        if not too_long:
            return self
        contents = self.contents.copy()
        for index in too_long:
            contents[index] = _content(self.example(index).truncated(longest))
        return replace(self, contents=contents)

    def split_to(self, longest: int) -> Store:
        """With every example that is longer and may be split in pieces of at most `longest` tokens, which stay where they are stored."""
        found = np.flatnonzero((self.contents["length"] > longest) & (self.table["breaks"] > 0)).tolist()
        if not found:
            return self
        spans, origins = [self.spans], [self.origins]
        tables, contents = [self.table[: found[0]]], [self.contents[: found[0]]]
        first_span, first_character = len(self.spans), len(self.origins)
        for index, following in zip(found, [*found[1:], len(self.table)], strict=True):
            whole = self.table[index]
            row = pack([Outcome(self.row_origin(index), self.example(index).in_pieces(longest))])
            row = row.behind(whole["first_token"], first_span, 0, first_character, whole["row"])
            row.table["signs"] = whole["signs"]
            tables += [row.table, self.table[index + 1 : following]]
            contents += [row.contents, self.contents[index + 1 : following]]
            spans.append(row.spans)
            origins.append(row.origins)
            first_span += len(row.spans)
            first_character += len(row.origins)
        table, joined = np.concatenate(tables), np.concatenate(contents)
        return replace(self, table=table, contents=joined, spans=np.concatenate(spans), origins=np.concatenate(origins))

    def behind(self, tokens: int, spans: int, breaks: int, characters: int, rows: int) -> Store:
        """The same rows, counted as they are behind so many tokens, spans, breaks, characters of origins, and rows."""
        table = self.table.copy()
        table["first_token"] += tokens
        table["first_span"] += spans
        table["first_break"] += breaks
        table["first_character"] += characters
        table["row"] += rows
        return replace(self, table=table, lost=[replace(row, number=rows + row.number) for row in self.lost])


def _content(example: Example) -> tuple[Any, ...]:
    return tuple(of(example) for _, of in _CONTENT.values())


def pack(outcomes: Iterable[Outcome], row_format: str | None = None) -> Store:
    """What became of some rows, as a store in memory."""
    token_ids: list[NDArray[np.int32]] = []
    spans: list[NDArray[np.void]] = []
    breaks: list[NDArray[np.void]] = []
    records: list[tuple[object, ...]] = []
    contents: list[tuple[Any, ...]] = []
    lost: list[LostRow] = []
    keys = KeyCounts()
    origins = bytearray()
    first_token, first_span, first_break, number = 0, 0, 0, -1
    for number, outcome in enumerate(outcomes):
        keys.add_row(outcome.origin, outcome.keys)
        if outcome.note:
            lost.append(LostRow(number, outcome.note, outcome.mixed))
        for example in outcome.examples:
            origin = example.origin.encode("utf-8", "surrogatepass")
            row_origin = outcome.origin.encode("utf-8", "surrogatepass")
            row_characters = len(row_origin if origin.startswith(row_origin) else origin)
            own_spans = spans_of(example.loss_weights)
            where = (first_token, first_span, len(own_spans), first_break, len(example.breaks))
            called = (len(origins), len(origin), row_characters)
            records.append(
                (*where, *called, number, outcome.sign_mask, *(getattr(example.facts, name) for name in FACTS))
            )
            contents.append(_content(example))
            token_ids.append(example.token_ids)
            spans.append(own_spans)
            breaks.append(example.breaks)
            origins += origin
            first_token += len(example)
            first_span += len(own_spans)
            first_break += len(example.breaks)
    return Store(
        np.concatenate([np.zeros(0, np.int32), *token_ids]).astype("<i4", copy=False),
        np.concatenate([np.zeros(0, SPAN), *spans]),
        np.concatenate([np.zeros(0, BREAK), *breaks]),
        np.array(records, TABLE),
        np.array(contents, CONTENTS),
        np.frombuffer(bytes(origins), np.uint8),
        number + 1,
        lost,
        row_format,
        keys.counts,
    )


class Examples(Sequence[Example]):
    """Examples of one or several sources in order, each read when it is asked for; its columns are NumPy arrays.

    Args:
        stores: Of the sources.
        chosen: int64, which of the stores' examples these are, counted over all; None: all.

    Attributes:
        reference: [examples] what `Batch.reference` has of each; None where nothing needs it.
        own: How many are of the data; the others, behind these, are `mismatched` ones.
    """

    def __init__(self, stores: Sequence[Store], chosen: NDArray[np.int64] | None = None) -> None:
        self._stores = tuple(stores)
        sizes = [len(store.table) for store in self._stores]
        self._starts: list[int] = np.cumsum([0, *sizes]).tolist()
        self._chosen = chosen
        self._columns: dict[str, NDArray[Any]] = {}
        self.reference: NDArray[np.float64] | None = None
        self.own = len(self)

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        """These examples, each as a row of its own."""
        return cls([pack(Outcome(example.origin, [example]) for example in examples)])

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """The examples of all parts, one part after another."""
        stores: list[Store] = []
        chosen: list[NDArray[np.int64]] = []
        for part in parts:
            first = sum(len(store.table) for store in stores)
            chosen.append(first + part._numbers())
            stores.extend(part._stores)
        whole = all(part._chosen is None for part in parts)
        return cls(stores, None if whole else np.concatenate(chosen))

    def __len__(self) -> int:
        return self._starts[-1] if self._chosen is None else len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        store, number = self._find(index)
        return store.example(number)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: ArrayLike) -> Examples:
        """Those with these indices, in this order."""
        return Examples(self._stores, self._numbers()[np.asarray(indices, np.int64)])

    def truncated_to(self, longest: int) -> Examples:
        """Every example's first `longest` tokens, where it is longer; supervised may then be none of them."""
        return Examples([store.truncated_to(longest) for store in self._stores], self._chosen)

    def split_to(self, longest: int) -> Examples:
        """Every example that is longer and may be split in pieces of at most `longest` tokens, one behind the other.

        Raises:
            ValueError: for a selection of what is stored.
        """
        if self._chosen is not None:
            raise ValueError("only all examples of their stores can be split")
        return Examples([store.split_to(longest) for store in self._stores])

    # Columns: shape (examples,)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each example."""
        return self._column("length")

    @property
    def needed_lengths(self) -> NDArray[np.int32]:
        """Tokens that must be computed of each: those before the last supervised one."""
        return self._column("needed_length")

    @property
    def supervised_tokens(self) -> NDArray[np.int32]:
        """Supervised tokens of each."""
        return self._column("supervised_tokens")

    @property
    def largest_token_ids(self) -> NDArray[np.int32]:
        """The largest id in each."""
        return self._column("largest_token_id")

    @property
    def signs(self) -> NDArray[np.uint32]:
        """What is suspicious about each, as a bit mask over `screening.SIGNS`."""
        return self._column("signs")

    @property
    def rows(self) -> NDArray[np.int64]:
        """The number, from 0 and over all sources, of the row that each is of; the turns of one row share it."""
        return self._column("row")

    def by_row(self) -> list[list[int]]:
        """The indices of the examples of each row that has some."""
        order = np.argsort(self.rows, kind="stable")
        _, starts = np.unique(self.rows[order], return_index=True)
        return [part.tolist() for part in np.split(order, starts[1:])] if len(self) else []

    def fact(self, name: str) -> NDArray[np.int32]:
        """One field of each one's `Facts`."""
        return self._column(name)

    def facts(self) -> Facts:
        """What a person should know about all of them together."""
        return Facts(*(int(self._gathered(name).sum()) for name in FACTS))

    def sign_counts(self, names: Sequence[str]) -> Counter[str]:
        """How many of their rows have each sign; `names` are those of the bits."""
        signs = self.signs[np.unique(self.rows, return_index=True)[1]]
        counts = {name: int(np.count_nonzero(signs >> bit & 1)) for bit, name in enumerate(names)}
        return Counter({name: number for name, number in counts.items() if number})

    def counts(self) -> list[int]:
        """How many there are of each source."""
        return list(map(int, np.bincount(self._store_indices(), minlength=len(self._stores))))

    def tokens(self) -> list[TokenColumn]:
        """The tokens of each source."""
        stores, columns = self._store_indices(), (self.supervised_tokens, self.lengths - self.supervised_tokens)
        sums = (np.bincount(stores, column, len(self._stores)).astype(np.int64).tolist() for column in columns)
        return [TokenColumn(*one) for one in zip(*sums, strict=True)]

    def first_rows(self, found: NDArray[np.bool_], most: int) -> list[str]:
        """The origins of the first rows with an example that is found."""
        indices = np.flatnonzero(found)
        first = np.unique(self.rows[indices], return_index=True)[1]
        return [self.row_origin(index) for index in indices[np.sort(first)[:most]].tolist()]

    def row_origin(self, index: int) -> str:
        """The origin of the row that an example is of."""
        store, number = self._find(index)
        return store.row_origin(number)

    # Contents

    def content_ids(self) -> NDArray[np.uint64]:
        """The first eight bytes of each digest: among millions, equal only for equal examples."""
        digests = np.ascontiguousarray(self._gathered("digest"))
        return digests.view("<u8").reshape(-1, 4)[:, 0].astype(np.uint64) if len(digests) else np.zeros(0, np.uint64)

    def fingerprint(self) -> str:
        """SHA-256 over the examples' tokens and weights, in order; the same on every machine."""
        return hashlib.sha256(self._gathered("digest").tobytes()).hexdigest()

    def _column(self, name: str) -> NDArray[Any]:
        if name not in self._columns:
            self._columns[name] = np.array(self._gathered(name))
        return self._columns[name]

    def _gathered(self, name: str) -> NDArray[Any]:
        """A field of the stores' tables or contents; rows are counted over all stores."""
        columns = [(store.contents if name in _CONTENT else store.table)[name] for store in self._stores]
        if name == "row":
            before = np.cumsum([0, *(store.rows for store in self._stores)])
            columns = [column + first for column, first in zip(columns, before.tolist(), strict=False)]
        dtype = (CONTENTS if name in _CONTENT else TABLE)[name]
        column = columns[0] if len(columns) == 1 else np.concatenate([np.zeros(0, dtype), *columns])
        return column if self._chosen is None else column[self._chosen]

    def _numbers(self) -> NDArray[np.int64]:
        return np.arange(len(self)) if self._chosen is None else self._chosen

    def _store_indices(self) -> NDArray[np.int64]:
        return np.searchsorted(self._starts, self._numbers(), side="right") - 1

    def _find(self, index: int) -> tuple[Store, int]:
        number = range(len(self))[index]
        if self._chosen is not None:
            number = int(self._chosen[number])
        which = bisect_right(self._starts, number) - 1
        return self._stores[which], number - self._starts[which]


def check_vocabulary(examples: Examples, vocabulary: int) -> None:
    """Raise `UserError` at the first token that a model, whose embedding has so many rows, has none for: MLX would read past the end."""
    unknown = np.flatnonzero(examples.largest_token_ids >= vocabulary)
    if len(unknown):
        example = examples[int(unknown[0])]
        raise UserError(
            f"the tokenizer gives token {example.token_ids.max()} here, and the model has embeddings only for "
            f"0 to {vocabulary - 1}",
            where=example.origin,
            hint="tokenizer and checkpoint do not belong together; take both from the same model",
        )
