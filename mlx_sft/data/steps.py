"""The optimizer steps of a run: which rows each takes, in an order that a seed gives, and mixed from several sources.

The plan is a pure function of its arguments, so that a resumed run goes on with the very step that the killed one would have taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Portion:
    """One source of a mixture: how many rows it has, and its weight beside the others'."""

    rows: int
    weight: float


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step.

    Attributes:
        number: From 1.
        epoch: How many passes over the data are done when the step is.
        ends_epoch: Whether it is the last of its pass.
        rows: Indices of the examples in it.
    """

    number: int
    epoch: float
    ends_epoch: bool
    rows: tuple[int, ...]


class Plan:
    """The steps of a run.

    Args:
        rows: Number of examples.
        batch_size: Examples a step; the last step of an epoch takes what is left, so that none is dropped.
        epochs: Passes over the data.
        max_steps: Number of steps instead, over as many passes as they need.
        seed: Of the order, which is another one each epoch.
        shuffle: Whether there is a random order at all.
        mixture: Sources whose rows follow one another, and their weights. An epoch still has `rows` rows, and takes of each
            source its share: a small one is repeated, a large one is gone through over several epochs.
        together: The examples of each row, where those of a row stand in one step; then all that is said of examples is said of rows.
    """

    def __init__(
        self,
        rows: int,
        *,
        batch_size: int,
        epochs: int = 1,
        max_steps: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        mixture: Sequence[Portion] = (),
        together: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.rows = rows
        self.batch_size = batch_size
        self.steps_per_epoch = -(-rows // batch_size)
        self.total_steps = max_steps or epochs * self.steps_per_epoch
        self._seed = seed
        self._shuffle = shuffle
        self._together = together
        self.mixture = tuple(mixture)
        self._shares = shares(rows, [portion.weight for portion in mixture])

    def steps(self, after: int = 0) -> Iterator[Step]:
        """The steps that follow step number `after`."""
        order, order_epoch, together = np.arange(0), -1, self._together
        for number in range(after + 1, self.total_steps + 1):
            epoch, within = divmod(number - 1, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = self._order(epoch), epoch
            rows = order[within * self.batch_size : (within + 1) * self.batch_size]
            done = min((within + 1) * self.batch_size, self.rows)
            yield Step(
                number=number,
                epoch=epoch + done / self.rows,
                ends_epoch=within + 1 == self.steps_per_epoch,
                rows=tuple(rows.tolist() if together is None else (index for row in rows for index in together[row])),
            )

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """The rows of an epoch."""
        rows = self._mixed(epoch) if self.mixture else np.arange(self.rows)
        return np.random.default_rng([self._seed, epoch]).permutation(rows) if self._shuffle else rows

    def _mixed(self, epoch: int) -> NDArray[np.int64]:
        """Each source's share, evenly interleaved."""
        first, drawn, places = 0, [], []
        for source, (portion, share) in enumerate(zip(self.mixture, self._shares, strict=True)):
            drawn.append(first + self._next_rows(source, portion.rows, range(epoch * share, (epoch + 1) * share)))
            places.append((np.arange(share) + 0.5) / max(1, share))
            first += portion.rows
        rows: NDArray[np.int64] = np.concatenate(drawn)[np.argsort(np.concatenate(places), kind="stable")]
        return rows

    def _next_rows(self, source: int, rows: int, positions: range) -> NDArray[np.int64]:
        """A source is gone through again and again, in another order each time; these positions of that."""
        passes = []
        for number in range(positions.start // rows, -(-positions.stop // rows)):
            order = np.arange(rows)
            passes.append(
                np.random.default_rng([self._seed, source, number]).permutation(order) if self._shuffle else order
            )
        skipped = positions.start // rows * rows
        return np.concatenate([np.arange(0), *passes])[positions.start - skipped : positions.stop - skipped]


def shares(rows: int, weights: Sequence[float]) -> list[int]:
    """So many rows divided in proportion to weights, the remainders going to the largest fractions; they sum to `rows`."""
    parts = [weight / max(weights) for weight in weights]  # so that their sum is finite
    exact = [rows * part / sum(parts) for part in parts]
    whole = [int(share) for share in exact]
    by_fraction = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for index in by_fraction[: rows - sum(whole)]:
        whole[index] += 1
    return whole
