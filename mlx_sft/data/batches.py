"""The examples of an optimizer step → the micro-batches that it is computed in, as arrays.

    lengths 12 96 100 14 ─► sorted 12 14 | 96 100 ─► [2, 16] and [2, 112]: padded tokens stay near real ones
                                                  or [1, 222]: end to end, where each row can be kept to itself
    two answers to a prompt of 80 ───────────────► [1, 80 + 16 + 20]: there the prompt is computed once

How a step is cut changes its cost, never its result, and is a pure function of its rows. Knows nothing of models.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Example

Lengths = Sequence[int] | NDArray[np.int32]

CALL_COST = 32
"""What one more call costs on a CPU, in tokens: reading the weights again."""
ATTENTION_WIDTH = 4096
"""The width at which attention costs a token as much as the products with the weights: 3,840 in Qwen3-0.6B, more in larger models."""
_LEAST_WIDTH = 16
"""Of a grid, which is for GPUs: for queries of up to 8 positions Metal's attention takes another kernel, which has no gradient."""
_MOST_WIDTHS = 16
"""So many leave less than a tenth of the tokens of chats or short pairs as padding."""
_CUT_AT_ONCE = 4096


class Span(NamedTuple):
    """Where a row lies, of those that lie end to end.

    Attributes:
        start, end: Of its tokens, but for its shared ones.
        targets: How many it has.
        head, shared: It begins with so many tokens of the row that lies from `head` on, and has them from there.
    """

    start: int
    end: int
    targets: int = 0
    head: int = 0
    shared: int = 0

    @property
    def length(self) -> int:
        """Tokens of the row, the shared ones included."""
        return self.shared + self.end - self.start


Spans = tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """How the rows of a micro-batch lie, and what decides how many there are.

    Attributes:
        joined: End to end, unpadded; else each row is padded to the longest.
        widths: The widths that there are, in rising order, where shapes are to be few: a micro-batch then has 1, 2, 4, 8, ... rows of
            one of them. Empty where any will do.
        call_cost: What one more micro-batch costs, in tokens.
        in_front: Positions that are computed in front of each row, and are not in its width.
        shares: Whether what the examples of a row of the data begin with alike is computed once; they are then joined.
    """

    joined: bool = False
    widths: tuple[int, ...] = ()
    call_cost: int = CALL_COST
    in_front: int = 0
    shares: bool = False

    @classmethod
    def of_few_shapes(cls, lengths: Lengths, call_cost: int = CALL_COST) -> Layout:
        """With the widths that leave rows of these lengths the least padding."""
        on_fine_grid = [round_up(max(_LEAST_WIDTH, int(length)), steps=32) for length in lengths]
        return cls(widths=levels(on_fine_grid, _MOST_WIDTHS), call_cost=call_cost)

    def width_of(self, length: int) -> int:
        """The width that a row takes which is the longest of its micro-batch."""
        if not self.widths:
            return length
        at = bisect_left(self.widths, length)
        return self.widths[at] if at < len(self.widths) else round_up(length)


PADDED, JOINED = Layout(), Layout(joined=True)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that are computed at once.

    Attributes:
        rows: Indices of examples.
        width: Tokens that each is right-padded to, or of all of them where they are joined.
        joined: Whether they lie end to end.
        shared: Of each row, how many of its first tokens are those of the last row before it that has 0 here; empty where all have 0.
    """

    rows: tuple[int, ...]
    width: int
    joined: bool = False
    shared: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """That go through the model."""
        return self.width if self.joined else len(self.rows) * self.width


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch as arrays. Labels are already shifted: the hidden state at a position predicts its target.

    Attributes:
        token_ids: [rows, width] int32, right-padded with 0 (a causal model never looks right); [1, width] where rows lie end to end.
        positions: [supervised] int32, indices into rows × width.
        targets: [supervised] int32.
        weights: [supervised] float32, of each target in the mean loss.
        tokens: Real tokens in it.
        needed_tokens: Those of them that must be computed.
        spans: Of the rows, where they lie end to end; else empty.
        examples: [rows] indices of the examples.
        data_rows: [rows] which row of the data each example is of, for an objective that compares the examples of a row.
        lengths: [rows] tokens of each example, those included that need not be computed.
        desirable: [rows] 1 for an answer that has the label true, 0 for false, -1 for none.
        reference: [rows] log p of each example's targets under the model as training starts, summed with their weights; None where the
            objective does not need it.
    """

    token_ids: NDArray[np.int32]
    positions: NDArray[np.int32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]
    tokens: int
    needed_tokens: int
    spans: Spans = ()
    examples: tuple[int, ...] = ()
    data_rows: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    reference: NDArray[np.float64] | None = None
    desirable: tuple[int, ...] = ()

    @property
    def owners(self) -> NDArray[np.int64]:
        """[supervised]: in which of the rows each target is."""
        if self.spans:
            return np.repeat(np.arange(len(self.spans)), [span.targets for span in self.spans])
        return np.asarray(self.positions // self.token_ids.shape[1], np.int64)

    def summed(self, values: NDArray[np.float32]) -> NDArray[np.float64]:
        """[rows]: the sum over each row's targets of what is said of them, times their weights."""
        return np.bincount(self.owners, np.multiply(values, self.weights, dtype=np.float64), self.rows).astype(
            np.float64
        )

    @property
    def rows(self) -> int:
        return len(self.spans) or self.token_ids.shape[0]

    @property
    def longest(self) -> int:
        """Tokens of the longest row, with its padding."""
        return max((span.length for span in self.spans), default=self.token_ids.shape[1])


def round_up(length: int, *, steps: int = 8) -> int:
    """The next width of a fixed grid with so many steps an octave, of 8 at least: by default an eighth (or 7 tokens) above at most."""
    step = max(8, (1 << max(0, (length - 1).bit_length() - 1)) // steps)
    return -(-length // step) * step


def levels(numbers: Sequence[int], most: int) -> tuple[int, ...]:
    """At most so many of these numbers, in rising order, so that rounding each number up to one of them adds the least in all.

    A dynamic program; its time grows with `most` times the square of how many different numbers there are.
    """
    values, times = np.unique(np.asarray(numbers), return_counts=True)
    below = np.concatenate([[0], np.cumsum(times)])  # how many numbers there are before each value, and in all
    # [start, end]: what it adds to round the values from `start` to `end`, which is not among them, up to the last of them
    added = (below[None, 1:] - below[:-1, None]) * values.astype(float)
    added[np.tril_indices(len(values), -1)] = np.inf
    least, lasts = added[0], []
    for _ in range(min(most, len(values)) - 1):
        ways = np.concatenate([added[:1], least[:-1, None] + added[1:]])
        lasts.append(ways.argmin(0))
        least = ways.min(0)
    end, chosen = len(values) - 1, []
    for last in [*lasts[::-1], np.zeros(len(values), int)]:
        chosen.append(int(values[end]))
        if last[end] == 0:
            break
        end = int(last[end]) - 1
    return tuple(chosen[::-1])


def row_cost(width: int) -> int:
    """What a row of this width costs, in tokens: its own, padding included, and attention's part, which grows with the square."""
    return width + width * width // ATTENTION_WIDTH


def cut(rows: Sequence[int], lengths: Lengths, token_budget: int, layout: Layout = PADDED) -> list[MicroBatch]:
    """Cut a step's rows, sorted by length, where the estimated time is least: `row_cost` of every row, and what each call costs.

    A dynamic program over where the last cut lies. Its time grows with the rows times those that fit the budget at once.

    Args:
        rows: Indices of examples.
        lengths: Needed length of every example.
        token_budget: Positions, padding and what is in front of each row included, that fit at once; a single longer row goes alone.
    """
    joined = layout.joined
    ordered = sorted(rows, key=lambda row: (lengths[row], row))
    widths = [layout.width_of(int(lengths[row])) for row in ordered]
    counts = 1 << np.arange(len(ordered).bit_length())
    ends, own_costs = np.cumsum([0, *widths]), np.cumsum([0, *map(row_cost, widths)])
    costs = np.zeros(len(ordered) + 1, np.int64)  # of the first so many rows
    last_cuts = [0]
    for end, width in enumerate(widths, 1):
        if joined:
            firsts = np.arange(min(end - 1, int(np.searchsorted(ends, ends[end] - token_budget))), end)
            candidates = costs[firsts] + own_costs[end] - own_costs[firsts]
        else:
            most = min(end, max(1, token_budget // (width + layout.in_front)))
            firsts = end - counts[counts <= most][::-1] if layout.widths else np.arange(end - most, end)
            candidates = costs[firsts] + (end - firsts) * row_cost(width + layout.in_front)
        best = int(candidates.argmin())
        costs[end] = candidates[best] + layout.call_cost
        last_cuts.append(int(firsts[best]))
    micro_batches = []
    end = len(ordered)
    while end > 0:
        start = last_cuts[end]
        width = int(ends[end] - ends[start]) if joined else widths[end - 1]
        micro_batches.append(MicroBatch(tuple(ordered[start:end]), width, joined))
        end = start
    return micro_batches[::-1]


def cut_step(rows: Sequence[int], examples: Examples, token_budget: int, layout: Layout = PADDED) -> list[MicroBatch]:
    """A step's rows, cut; mismatched ones apart from the others, as they need no gradient."""
    parts = [row for row in rows if row < examples.own], [row for row in rows if row >= examples.own]
    if not layout.shares:
        lengths = examples.needed_lengths
        return [micro_batch for part in parts for micro_batch in cut(part, lengths, token_budget, layout)]
    groups = [_beginning_alike(part, examples, token_budget) for part in parts]
    return [
        _of_groups(micro_batch, part)
        for part in groups
        for micro_batch in cut(range(len(part)), [group.width for group in part], token_budget, layout)
    ]


def cut_all(lengths: Lengths, token_budget: int, layout: Layout = PADDED) -> list[MicroBatch]:
    """All rows cut for evaluation, where there are no steps: similar lengths together, whatever their order."""
    ordered = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    groups = (ordered[i : i + _CUT_AT_ONCE] for i in range(0, len(ordered), _CUT_AT_ONCE))
    return [micro_batch for group in groups for micro_batch in cut(group, lengths, token_budget, layout)]


def cut_examples(examples: Examples, token_budget: int, layout: Layout = PADDED) -> list[MicroBatch]:
    """All examples cut, as `cut_all` does it."""
    if not layout.shares:
        return cut_all(examples.needed_lengths, token_budget, layout)
    groups = _beginning_alike([row for rows in examples.by_row() for row in rows], examples, token_budget)
    return [_of_groups(one, groups) for one in cut_all([group.width for group in groups], token_budget, layout)]


def _beginning_alike(rows: Sequence[int], examples: Examples, token_budget: int) -> list[MicroBatch]:
    """Examples that are cut together: those of a row of the data that follow one another, where all fit at once; else each alone."""
    lengths, groups = examples.needed_lengths, list[list[int]]()
    for row in rows:
        if groups and groups[-1][-1] < row and examples.rows[row] == examples.rows[groups[-1][-1]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    found = []
    for first, *others in groups:
        tokens, shared = examples[first].token_ids[: lengths[first]], [0]
        for other in others:
            own = examples[other].token_ids[: lengths[other] - 1]  # so that each row has a token of its own
            differs = np.flatnonzero(tokens[: len(own)] != own[: len(tokens)])
            shared.append(int(differs[0]) if len(differs) else min(len(tokens), len(own)))
        width = int(lengths[[first, *others]].sum()) - sum(shared)
        if width <= token_budget:
            found.append(MicroBatch((first, *others), width, joined=True, shared=tuple(shared)))
        else:
            found += [MicroBatch((row,), int(lengths[row]), joined=True, shared=(0,)) for row in (first, *others)]
    return found


def _of_groups(cut_groups: MicroBatch, groups: Sequence[MicroBatch]) -> MicroBatch:
    """The micro-batch of the examples of groups, whose numbers were cut as rows are."""
    of = [groups[number] for number in cut_groups.rows]
    rows = tuple(row for group in of for row in group.rows)
    return MicroBatch(rows, cut_groups.width, joined=True, shared=tuple(n for group in of for n in group.shared))


def labels(examples: Examples, rows: Sequence[int]) -> tuple[int, ...]:
    """`Batch.desirable` of these examples."""
    wanted, unwanted = (examples.fact(name)[list(rows)] for name in ("desirable", "undesirable"))
    return tuple(np.where(wanted + unwanted > 0, wanted, -1).tolist())


def collate(examples: Sequence[Example], micro_batch: MicroBatch) -> Batch:
    """A micro-batch's arrays.

    ```
    token_ids  a b C D e F .     capitals are supervised
    position     ^ ^   ^         the hidden states at b, C (predicting C, D) and e (predicting F) count
    targets      C D   F
    ```
    """
    token_ids = np.zeros(micro_batch.tokens, np.int32)
    positions, targets, weights, needed, head = [], [], [], 0, 0
    spans: list[Span] = []
    lengths: list[int] = []
    shared_tokens = micro_batch.shared or [0] * len(micro_batch.rows)
    for row, (index, shared) in enumerate(zip(micro_batch.rows, shared_tokens, strict=True)):
        example = examples[index]
        length = example.needed_length - shared
        start = needed if micro_batch.joined else row * micro_batch.width
        head = head if shared else start
        token_ids[start : start + length] = example.token_ids[shared : shared + length]
        supervised = np.flatnonzero(example.loss_weights[1:])
        spans.append(Span(start, start + length, len(supervised), head, shared))
        positions.append(np.where(supervised < shared, head, start - shared) + supervised)
        targets.append(example.token_ids[1:][supervised])
        weights.append(example.loss_weights[1:][supervised])
        lengths.append(len(example.token_ids))
        needed += length
    known = examples if isinstance(examples, Examples) else None
    return Batch(
        token_ids.reshape(-1, micro_batch.width),
        np.concatenate(positions).astype(np.int32),
        np.concatenate(targets).astype(np.int32),
        np.concatenate(weights).astype(np.float32),
        sum(lengths),
        needed,
        tuple(spans) if micro_batch.joined else (),
        micro_batch.rows,
        tuple(known.rows[list(micro_batch.rows)].tolist()) if known is not None else micro_batch.rows,
        tuple(lengths),
        known.reference[list(micro_batch.rows)] if known is not None and known.reference is not None else None,
        labels(known, micro_batch.rows) if known is not None else (),
    )
