"""Packed examples of one or several sources → a sequence of `Example`s and their columns, whatever their size.

The arrays may be mapped from disk: an example's tokens are read when it is asked for. Knows how examples are selected, joined
and cut; knows nothing of where they are kept or how they are made.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlx_sft.data.example import Example
from mlx_sft.data.packing import FACTS, TABLE, Block, PackedRow, origin_from, pack, weights_of
from mlx_sft.data.template import Facts
from mlx_sft.errors import UserError

_AT_ONCE = 1 << 16


@dataclass(frozen=True, slots=True)
class Store:
    """The examples of one source, as a block or mapped from disk.

    Attributes:
        name: The source's, with which the origins begin.
        rows: How many rows were read of it.
    """

    name: str
    token_ids: NDArray[np.int32]
    spans: NDArray[np.void]
    table: NDArray[np.void]
    origins: NDArray[np.uint8]
    rows: int

    @classmethod
    def of_block(cls, block: Block, name: str = "") -> Store:
        return cls(name, block.token_ids, block.spans, block.table, np.frombuffer(block.origins, np.uint8), block.rows)

    def example(self, index: int, longest: int | None = None) -> Example:
        """Example number `index`, its first `longest` tokens."""
        record = dict(zip(TABLE.names or (), self.table[index].item(), strict=True))
        length = record["length"] if longest is None else min(longest, record["length"])
        first = record["first_token"]
        return Example(
            self._origin(record, "characters"),
            self.token_ids[first : first + length],
            weights_of(self.spans_of(record), length),
            Facts(*(record[name] for name in FACTS)),
        )

    def spans_of(self, record: Any) -> NDArray[np.void]:
        """The supervised spans of the whole example that a record of the table is of."""
        first = record["first_span"]
        return self.spans[first : first + record["spans"]]

    def row_origin(self, index: int) -> str:
        """The origin of the row that example number `index` is of."""
        return self._origin(self.table[index], "row_characters")

    def _origin(self, record: Any, characters: str) -> str:
        first = record["first_character"]
        stored = self.origins[first : first + record[characters]].tobytes().decode("utf-8", "surrogatepass")
        return origin_from(stored, self.name)


class Examples(Sequence[Example]):
    """Examples of one or several sources in order, each read when it is asked for; its columns are NumPy arrays.

    Args:
        stores: Of the sources.
        chosen: int64, which of the stores' examples these are, counted over all; None: all.
        longest: Every example is its first so many tokens; None: the whole.
    """

    def __init__(
        self, stores: Sequence[Store], chosen: NDArray[np.int64] | None = None, longest: int | None = None
    ) -> None:
        self._stores = tuple(stores)
        sizes = [len(store.table) for store in self._stores]
        self._starts: list[int] = np.cumsum([0, *sizes]).tolist()
        self._chosen = chosen
        self._longest = longest
        self._known: dict[str, NDArray[Any]] = {}

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Examples:
        """These examples, each as a row of its own."""
        return cls([Store.of_block(pack(PackedRow(example.origin, [example]) for example in examples))])

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """The examples of all parts, one part after another; those that are cut, all to the same length."""
        longest = min((part._longest for part in parts if part._longest is not None), default=None)
        for part in parts:
            if part._longest != longest and part.lengths.max(initial=0) > (longest or 0):
                raise ValueError("examples that are cut to different lengths cannot be joined")
        stores: list[Store] = []
        chosen: list[NDArray[np.int64]] = []
        for part in parts:
            first = sum(len(store.table) for store in stores)
            chosen.append(first + part._numbers())
            stores.extend(part._stores)
        whole = all(part._chosen is None for part in parts)
        result = cls(stores, None if whole else np.concatenate(chosen))
        return result if longest is None else result.truncated_to(longest)

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
        return store.example(number, self._longest)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def select(self, indices: ArrayLike) -> Examples:
        """Those with these indices, in this order."""
        indices = np.asarray(indices, np.int64)
        result = Examples(self._stores, self._numbers()[indices], self._longest)
        result._known = {name: column[indices] for name, column in self._known.items()}
        return result

    def truncated_to(self, longest: int) -> Examples:
        """Every example's first `longest` tokens, where it is longer; supervised may then be none of them."""
        if self._longest is not None:
            longest = min(longest, self._longest)
        result = Examples(self._stores, self._chosen, longest)
        supervised_tokens, needed_lengths = result.supervised_tokens, result.needed_lengths
        for index in result._cut():
            store, number = self._find(index)
            spans = store.spans_of(store.table[number])
            spans = spans[spans["start"] < longest]
            ends = np.minimum(spans["end"], longest)
            supervised_tokens[index] = (ends - spans["start"]).sum()
            needed_lengths[index] = min(int(spans["end"][-1]), longest) - 1 if len(spans) else 0
        return result

    # Columns: shape (examples,)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each example."""
        whole = self._column("length")
        return whole if self._longest is None else np.minimum(whole, self._longest)

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
        if "largest_token_id" not in self._known:
            column = self._column("largest_token_id")
            for index in self._cut():
                column[index] = self[index].token_ids.max(initial=0)
        return self._column("largest_token_id")

    @property
    def signs(self) -> NDArray[np.uint32]:
        """What is suspicious about each, as a bit mask over `screening.SIGNS`."""
        return self._column("signs")

    @property
    def rows(self) -> NDArray[np.int64]:
        """The number, from 0 and over all sources, of the row that each is of; the turns of one row share it."""
        if "row" not in self._known:
            behind = np.cumsum([0, *(store.rows for store in self._stores)])
            stores = np.searchsorted(self._starts, self._numbers(), side="right") - 1
            self._known["row"] = self._gathered("row") + behind[stores]
        return self._known["row"]

    def row_of(self, index: int) -> int:
        """What `rows` has at this index; the others are not looked at."""
        which, number = self._place(index)
        return sum(store.rows for store in self._stores[:which]) + int(self._stores[which].table["row"][number])

    def by_row(self) -> list[list[int]]:
        """The indices of the examples of each row that has some."""
        order = np.argsort(self.rows, kind="stable")
        _, starts = np.unique(self.rows[order], return_index=True)
        return [part.tolist() for part in np.split(order, starts[1:])] if len(self) else []

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
        stores = np.searchsorted(self._starts, self._numbers(), side="right") - 1
        counts: list[int] = np.bincount(stores, minlength=len(self._stores)).tolist()
        return counts

    def row_origin(self, index: int) -> str:
        """The origin of the row that an example is of."""
        store, number = self._find(index)
        return store.row_origin(number)

    # Contents

    def digest(self, index: int) -> bytes:
        """`Example.digest` of one."""
        return bytes(self._digests()[index].tobytes())

    def content_ids(self) -> NDArray[np.uint64]:
        """The first eight bytes of each digest: among millions, equal only for equal examples."""
        digests = np.ascontiguousarray(self._digests())
        return digests.view("<u8").reshape(-1, 4)[:, 0].astype(np.uint64) if len(digests) else np.zeros(0, np.uint64)

    def fingerprint(self) -> str:
        """SHA-256 over the examples' tokens and weights, in order; the same on every machine."""
        digests, result = self._digests(), hashlib.sha256()
        for first in range(0, len(digests), _AT_ONCE):
            result.update(digests[first : first + _AT_ONCE].tobytes())
        return result.hexdigest()

    def _digests(self) -> NDArray[np.void]:
        if "digest" in self._known:
            return self._known["digest"]
        digests = self._gathered("digest")
        if cut := self._cut():
            digests = digests.copy()
            for index in cut:
                digests[index] = np.void(self[index].digest())
            self._known["digest"] = digests
        return digests

    def _cut(self) -> list[int]:
        """Indices of the examples that are not whole."""
        if self._longest is None:
            return []
        cut: list[int] = np.flatnonzero(self._column("length") > self._longest).tolist()
        return cut

    def _column(self, name: str) -> NDArray[Any]:
        if name not in self._known:
            self._known[name] = np.array(self._gathered(name))
        return self._known[name]

    def _gathered(self, name: str) -> NDArray[Any]:
        """A field of the stores' tables, as it was written."""
        columns = [store.table[name] for store in self._stores]
        column = columns[0] if len(columns) == 1 else np.concatenate([np.zeros(0, TABLE[name]), *columns])
        return column if self._chosen is None else column[self._chosen]

    def _numbers(self) -> NDArray[np.int64]:
        return np.arange(len(self)) if self._chosen is None else self._chosen

    def _find(self, index: int) -> tuple[Store, int]:
        which, number = self._place(index)
        return self._stores[which], number

    def _place(self, index: int) -> tuple[int, int]:
        number = range(len(self))[index]
        if self._chosen is not None:
            number = int(self._chosen[number])
        which = bisect_right(self._starts, number) - 1
        return which, number - self._starts[which]


def check_vocabulary(examples: Examples, vocabulary: int) -> None:
    """Raise `UserError` at the first token that a model has no embedding for: MLX would read past the table's end.

    Args:
        examples: What is to be computed.
        vocabulary: Rows of the model's embedding.
    """
    unknown = np.flatnonzero(examples.largest_token_ids >= vocabulary)
    if len(unknown):
        example = examples[int(unknown[0])]
        raise UserError(
            f"the tokenizer gives token {example.token_ids.max()} here, and the model has embeddings only for "
            f"0 to {vocabulary - 1}",
            where=example.origin,
            hint="tokenizer and checkpoint do not belong together; take both from the same model",
        )
