"""Whether a run diverges: several losses in a row above a bound that moves with those before them.

    bound = median + max(4 · deviation, 1 nat), of the last 50 losses that were within their own bound

The deviation is the median one, scaled as a normal distribution's, so that a steep beginning or a hard row says little. Losses above the
bound do not move it: it does not follow them. Knows nothing of what is done about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

IN_A_ROW = 3
"""Losses above the bound that are a divergence: one or two may be of hard rows."""

_WINDOW = 50
_DEVIATIONS = 4.0
_OF_NORMAL = 1.4826
"""A normal distribution's standard deviation is so many of its median deviations (Rousseeuw & Croux 1993)."""
_LEAST = 1.0
_FEW = 10
"""Fewer losses say little of what is usual; then the bound is wide."""
_FEW_LEAST = 4.0


def bound(within: Sequence[float]) -> float:
    """The most that the next loss may be, in nats, after losses that were within their bounds; infinite before the first."""
    if not within:
        return math.inf
    middle = median(within)
    deviation = _OF_NORMAL * median(abs(loss - middle) for loss in within)
    return middle + max(_DEVIATIONS * deviation, _LEAST if len(within) >= _FEW else _FEW_LEAST)


def observe(within: Sequence[float], above: int, loss: float | None) -> tuple[tuple[float, ...], int]:
    """What is known after a further loss.

    Args:
        within: The last losses that were within their bounds.
        above: How many in a row were above, up to now.
        loss: None where a step had no finite one.
    """
    if loss is None or loss > bound(within):
        return tuple(within), above + 1
    return (*within, loss)[-_WINDOW:], 0
