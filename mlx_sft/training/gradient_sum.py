"""The sum of a step's gradients: of the micro-batches of this process as they come, and of all processes at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import mlx.core as mx

from mlx_sft.methods import Parameters
from mlx_sft.training.ranks import Ranks

LossAndGradients = tuple[mx.array, Parameters]


class GradientSum:
    """Loss and gradients of a step.

    Args:
        ranks: The processes that share the step.
        add: Adds a micro-batch's gradients to those so far, which are empty before the first.
        like: Arrays of the gradients' names and shapes.

    Attributes:
        loss: What is known of it: of this process within the block of `of_all`, and of all after it.
        gradients: Likewise, by name.
    """

    def __init__(self, ranks: Ranks, add: Callable[[Parameters, Parameters], Parameters], like: Parameters) -> None:
        self._ranks, self._add_up, self._like = ranks, add, like
        self.loss = mx.array(0.0)
        self.gradients: Parameters = {}
        self._apart: dict[int, LossAndGradients] = {}

    def add(self, index: int, compute: Callable[[], LossAndGradients]) -> None:
        """A micro-batch of this process is computed, and evaluated."""
        loss, gradients = compute()
        if self._ranks.exact:
            mx.eval(loss, gradients)
            self._apart[index] = loss, gradients
            return
        self.loss, self.gradients = self.loss + loss, self._add_up(self.gradients, gradients)
        del gradients  # so that the sum can take its place
        mx.eval(self.loss, self.gradients)

    @contextmanager
    def of_all(self, indices: Sequence[int]) -> Iterator[None]:
        """While the block runs, this process adds its share of these micro-batches; then the sum over all processes is known.

        Raises:
            BatchFailed, Stopped: Where one of them failed, in all.
        """
        ranks = self._ranks
        with ranks.together() as failed:
            yield
        if ranks.size == 1:
            return
        if failed:
            self.loss, self.gradients, self._apart = mx.array(0.0), {}, {}
        if not ranks.exact:
            self.loss, self.gradients = ranks.summed(self.loss, self.gradients, self._like, failed)
            return
        for index in indices:
            loss, gradients = ranks.summed(*self._apart.pop(index, (mx.array(0.0), {})), self._like, failed)
            self.loss, self.gradients = self.loss + loss, self._add_up(self.gradients, gradients)
            mx.eval(self.loss, self.gradients)
