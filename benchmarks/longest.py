"""The longest row of a model that mlx-lm trains within so much memory above its weights, layers recomputed, and multiples of it in ours.

A length is tried by one step. Peak memory grows nearly in a straight line, so a few steps lead to the length.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cases import Point
from benchmarks.point import WORK, Settings, prepare, run_trainer
from benchmarks.summary import went_well

STEP = 64
"""Lengths are multiples of this."""
MULTIPLES = (4,)
"""Of the peer's longest row: lengths at which ours is tried."""
ASIDE = 0.03
"""The share of a length by which the next one lies beside one that is known."""


def longest_that_fits(peak_of: Callable[[int], float], budget: float, *, first: int, precision: float = 0.04) -> int:
    """The largest length whose peak is within budget, to a relative precision: secant steps, then halving.

    Args:
        peak_of: Bytes of a length; infinite where it fails. It must not fall with the length.
        budget: Bytes.
        first: Where to begin.
    """
    known: dict[int, float] = {0: 0.0}
    length = first
    while True:
        known[length] = peak_of(length)
        fits = max(n for n, peak in known.items() if peak <= budget)
        too_long = min((n for n, peak in known.items() if peak > budget), default=None)
        if too_long is not None and too_long - fits <= max(STEP, precision * fits):
            return fits
        length = next_length(known, budget, fits, too_long)


def next_length(known: dict[int, float], budget: float, fits: int, too_long: int | None) -> int:
    """On the straight line through the two nearest points, kept inside what is still open."""
    ends = sorted(n for n in known if n and known[n] < float("inf"))
    guess = 2 * fits
    if len(ends) >= 2:
        a, b = ends[-2:] if too_long is None else sorted(sorted(ends, key=lambda n: abs(known[n] - budget))[:2])
        slope = (known[b] - known[a]) / (b - a)
        guess = int(a + (budget - known[a]) / slope) if slope > 0 else guess
    if too_long is None:
        return max(fits + STEP, min(guess, 4 * max(fits, STEP)) // STEP * STEP)
    if not fits <= guess <= too_long or len(ends) < 2:
        guess = (fits + too_long) // 2
    # Next to a known end, a step aside brings the other end near.
    aside = max(STEP, int(ASIDE * fits))
    guess = min(max(guess, fits + aside), too_long - aside)
    return min(max(round(guess / STEP) * STEP, fits + STEP), too_long - STEP)


def measure_longest(budget: float, layers: int, first: int, precision: float, settings: Settings) -> dict[str, Any]:
    """The longest row of mlx-lm, and what multiples of it ours takes, with every length that was tried.

    How long ours could be is not searched: on a CPU a row of 10,000 tokens takes the better part of an hour.
    """
    found: dict[str, Any] = {}
    for name in ("mlx-lm", "ours"):
        tried: list[dict[str, Any]] = []

        def peak_of(length: int, name: str = name, tried: list[dict[str, Any]] = tried) -> float:
            point = Point(f"{length:,}", length, "halves", 1, 1, layers, {"length": length}, grad_checkpoint=True)
            with tempfile.TemporaryDirectory(dir=WORK) as folder:
                run = run_trainer(name, prepare(point, Path(folder), settings.dtype).task, settings)
            peak = run["peak_bytes"] if went_well(run) else float("inf")
            tried.append(
                {"tokens": length, "peak_bytes": peak if went_well(run) else None, "seconds": run.get("seconds")}
            )
            print(f"  {name}, {length:,} tokens: {peak / 1e9:.2f} GB above the weights", file=sys.stderr, flush=True)
            return peak

        if name == "ours":
            theirs = found["mlx-lm"]["tokens"]
            longest = max((n for n in (m * theirs for m in MULTIPLES) if peak_of(n) <= budget), default=0)
        else:
            longest = longest_that_fits(peak_of, budget, first=first, precision=precision)
        found[name] = {"tokens": longest, "tried": tried}
    ratio = found["ours"]["tokens"] / max(1, found["mlx-lm"]["tokens"])
    return {"budget_bytes": budget, "layers": layers, "trainers": found, "ratio": ratio, "settings": asdict(settings)}
