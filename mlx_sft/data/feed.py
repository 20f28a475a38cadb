"""What training takes next, made in a thread a little before it is asked for: any iterator's items, and the steps of a plan as arrays."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

from mlx_sft.data.batches import Batch, Layout, collate, cut_step
from mlx_sft.data.dataset import Examples
from mlx_sft.data.steps import Plan, Step

T = TypeVar("T")


class Prefetch(Iterator[T], AbstractContextManager["Prefetch[T]", None]):
    """An iterator over the items, in their order, and a context: when it ends, however it ends, so has the thread.

    An error in making an item comes out where the item was asked for, with the thread's traceback.

    Args:
        items: Gone through in the thread alone, one item after another.
        ahead: How many items are made before they are asked for.

    Attributes:
        waited: Seconds that the last item was waited for.
    """

    def __init__(self, items: Iterable[T], ahead: int = 2) -> None:
        self.waited = 0.0
        self._take = iter(items).__next__
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._coming: deque[Future[T]] = deque(self._thread.submit(self._take) for _ in range(ahead))

    def __exit__(self, *_: object) -> None:
        self.close()

    def __next__(self) -> T:
        if not self._coming:  # closed
            raise StopIteration
        started = time.perf_counter()
        try:
            item = self._coming.popleft().result()
        except BaseException:  # the end of the items is one too
            self.close()
            raise
        self.waited = time.perf_counter() - started
        self._coming.append(self._thread.submit(self._take))
        return item

    def close(self) -> None:
        """End the thread; an item that it is at is finished first, and what was not asked for is forgotten."""
        self._coming.clear()
        self._thread.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class PreparedStep:
    """A step and its micro-batches.

    Attributes:
        waited: Seconds that it was waited for.
    """

    step: Step
    batches: list[Batch]
    waited: float


class StepFeed(Iterator[PreparedStep], AbstractContextManager["StepFeed", None]):
    """An iterator over the steps that are left, and a context: when it ends, so has its thread.

    Args:
        after: Number of the last step that was taken.
        token_budget: Padded tokens of a micro-batch.
        layout: How rows lie in a micro-batch.
    """

    def __init__(self, plan: Plan, examples: Examples, *, after: int, token_budget: int, layout: Layout) -> None:
        self._plan = plan
        self._examples = examples
        self._layout = layout
        self._taken = after
        self._coming = Prefetch(self._steps(after, token_budget))

    def __exit__(self, *_: object) -> None:
        self._coming.close()

    def __next__(self) -> PreparedStep:
        step, batches = next(self._coming)
        self._taken = step.number
        return PreparedStep(step, batches, self._coming.waited)

    def again(self, token_budget: int) -> PreparedStep:
        """The step that came last once more, cut to another budget, as are those that follow it."""
        self._coming.close()
        self._taken -= 1
        self._coming = Prefetch(self._steps(self._taken, token_budget))
        return next(self)

    def _steps(self, after: int, token_budget: int) -> Iterator[tuple[Step, list[Batch]]]:
        for step in self._plan.steps(after):
            micro_batches = cut_step(step.rows, self._examples, token_budget, self._layout)
            yield step, [collate(self._examples, micro_batch) for micro_batch in micro_batches]
