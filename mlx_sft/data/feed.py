"""The steps of a plan as arrays, made in a thread before they are asked for. NumPy only; knows nothing of what a step does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from mlx_sft.data.batches import Batch, Layout, Plan, Step, collate, cut
from mlx_sft.data.dataset import Examples
from mlx_sft.data.prefetch import Prefetch


@dataclass(frozen=True)
class PreparedStep:
    """A step and its micro-batches.

    Attributes:
        waited: Seconds that it was waited for.
    """

    step: Step
    batches: list[Batch]
    waited: float


class StepFeed:
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._coming.close()

    def __iter__(self) -> Iterator[PreparedStep]:
        return self

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
        lengths = self._examples.needed_lengths
        for step in self._plan.steps(after):
            micro_batches = cut(step.rows, lengths, token_budget, self._layout)
            yield step, [collate(self._examples, micro_batch) for micro_batch in micro_batches]
