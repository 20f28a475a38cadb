"""Charts as SVG, drawn here, so that a page shows them without a script: lines and dots over axes with round ticks, and bars.

Colours come from the page's style: what is drawn has the class `c0` to `c7` of its series. Where a page has `charts.js`, a chart of lines
also tells its values where the pointer is, which it computes from what is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlx_sft.web_page import escaped

COLOURS = 8
STYLE, SCRIPT = (Path(__file__).with_name(f"charts.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))

Point = tuple[float, float]
Look = Literal["line", "faint", "dashed", "dots", "line and dots"]

_WIDTH, _HEIGHT = 460.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 50.0, 12.0, 12.0, 24.0
_TICKS = 5
_MOST_DOTS = 60
"""On a line; more would hide it."""
_TICK_APART = 9.0
"""Pixels a character, by which labels of the x axis are told to overlap."""


@dataclass(frozen=True)
class Series:
    """What has one colour.

    Attributes:
        points: x and y, finite; in their order where lines join them.
        name: What the legend calls it; without one it is not in the legend.
        colour: A number from 0 to 7.
        radii: Of the dots; all alike where there are none.
        stands_out: The places of points that have a ring.
    """

    points: Sequence[Point]
    name: str = ""
    colour: int = 0
    look: Look = "line"
    radii: Sequence[float] = ()
    stands_out: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Axis:
    """How one axis is divided.

    Attributes:
        powers: Logarithmic; None decides by the values: where the largest is many times the smallest.
        from_zero: Whether 0 is on it.
        show: A value as text.
    """

    powers: bool | None = False
    from_zero: bool = False
    show: Callable[[float], str] = "{:,.4g}".format


_PLAIN = Axis()
_MANY_TIMES = 50.0


class _Scale:
    """Values → pixels along one axis, and the round values between its ends."""

    def __init__(self, values: Sequence[float], axis: Axis, start: float, end: float) -> None:
        low, high = min(values), max(values)
        by_values = low > 0 and high > _MANY_TIMES * low
        self.powers = low > 0 and (by_values if axis.powers is None else axis.powers)
        self._as_drawn: Callable[[float], float] = math.log10 if self.powers else float
        if axis.from_zero and not self.powers:
            low, high = min(0.0, low), max(0.0, high)
        self.low, self.high = self._as_drawn(low), self._as_drawn(high)
        if not self.high > self.low:
            apart = max(abs(self.low) * 0.1, 1e-12) if self.low else 0.5
            self.low, self.high = self.low - apart, self.high + apart
        self._start, self._end = start, end

    def place(self, value: float) -> float:
        share = (self._as_drawn(value) - self.low) / (self.high - self.low)
        return round(self._start + share * (self._end - self._start), 1)

    def ticks(self) -> list[float]:
        """Round values from the low end to the high one."""
        if self.powers and self.high - self.low >= 1:
            every = max(1, math.ceil((self.high - self.low) / _TICKS))
            return [10.0**power for power in range(math.ceil(self.low), math.floor(self.high) + 1, every)]
        low, high = (10**self.low, 10**self.high) if self.powers else (self.low, self.high)
        return _round_values(low, high)


def _round_values(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten; few, and never none."""
    power = 10.0 ** math.floor(math.log10((high - low) / _TICKS))
    apart = next(power * step for step in (1, 2, 5, 10, 20) if (high - low) / (power * step) <= _TICKS)
    first, last = math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9)
    return [number * apart for number in range(first, last + 1)]


def chart(
    series: Sequence[Series], x: Axis = _PLAIN, y: Axis = _PLAIN, *, label: str = "", marks: Iterable[Point] = ()
) -> str:
    """Lines and dots, with a legend where series have names.

    Args:
        label: What it shows, for who hears the page.
        marks: Upright lines: each at an x, with the number of a colour.
    """
    points = [point for one in series for point in one.points]
    if not points:
        return '<p class="soft">Nothing to draw yet.</p>'
    across = _Scale([point[0] for point in points], x, _LEFT, _WIDTH - _RIGHT)
    up = _Scale([point[1] for point in points], y, _HEIGHT - _BOTTOM, _TOP)
    drawn = [*_axes(across, up, x, y)]
    for at, colour in marks:
        if points and min(p[0] for p in points) <= at <= max(p[0] for p in points):
            drawn.append(f'<path class="mark c{colour:g}" d="M{across.place(at)} {_TOP}V{_HEIGHT - _BOTTOM}"/>')
    drawn += [_drawn(one, across, up) for one in series]
    scale = " ".join(
        f"{number:.10g}"
        for number in (across.low, across.high, across.powers, up.low, up.high, up.powers, _LEFT, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, _TOP)
    )  # fmt: skip
    named = "".join(
        f'<span class="c{one.colour % COLOURS} {one.look.partition(" ")[0]}">{escaped(one.name)}</span>'
        for one in series
        if one.name and one.points
    )
    legend = f'<p class="legend">{named}</p>' if named else ""
    return f'{_opened(_HEIGHT, label)} data-scale="{scale}">{"".join(drawn)}</svg>{legend}'


def _opened(height: float, label: str) -> str:
    """The beginning of the tag."""
    return f'<svg viewBox="0 0 {_WIDTH:g} {height:g}" role="img" aria-label="{escaped(label)}"'


def _axes(across: _Scale, up: _Scale, x: Axis, y: Axis) -> Iterable[str]:
    foot, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    for value in up.ticks():
        at = up.place(value)
        yield f'<path class="grid" d="M{_LEFT} {at}H{right}"/><text x="{_LEFT - 6}" y="{at + 4}" text-anchor="end">{y.show(value)}</text>'
    yield f'<path class="axis" d="M{_LEFT} {_TOP}V{foot}H{right}"/>'
    free = -math.inf
    for value in across.ticks():
        at, shown = across.place(value), x.show(value)
        half = len(shown) * _TICK_APART / 2
        if at - half < free:
            continue
        free = at + half
        yield f'<text x="{at}" y="{_HEIGHT - 6}" text-anchor="middle">{shown}</text>'


def _drawn(one: Series, across: _Scale, up: _Scale) -> str:
    places = [(across.place(x), up.place(y)) for x, y in one.points]
    parts = []
    if one.look != "dots" and len(places) > 1:
        parts.append(f'<polyline points="{" ".join(f"{x:g},{y:g}" for x, y in places)}"/>')
    if "dots" in one.look or len(places) == 1:
        radii = one.radii or [2.5] * len(places)
        for number, ((x, y), radius) in enumerate(zip(places, radii, strict=True)):
            if one.look != "dots" and len(places) > _MOST_DOTS and number not in one.stands_out:
                continue
            parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:.1f}"/>')
            if number in one.stands_out:
                parts.append(f'<circle class="ring" cx="{x:g}" cy="{y:g}" r="{radius + 4:.1f}"/>')
    name = f' data-name="{escaped(one.name)}"' if one.name else ""
    return f'<g class="c{one.colour % COLOURS} {one.look.partition(" ")[0]}"{name}>{"".join(parts)}</g>'


def bars(counts: Sequence[tuple[str, int]], *, label: str = "") -> str:
    """A bar for each count, the first and the last named below."""
    most = max((count for _, count in counts), default=0)
    if not most:
        return ""
    height, foot = 110.0, 110.0 - 22
    width = (_WIDTH - 4) / len(counts)
    drawn = []
    for number, (name, count) in enumerate(counts):
        tall = round(count / most * (foot - 16), 1)
        x = round(2 + number * width, 1)
        box = f'x="{x + 1:g}" y="{foot - tall:g}" width="{max(1, width - 2):.1f}" height="{tall:g}"'
        drawn.append(f"<rect {box}><title>{escaped(name)}: {count:,}</title></rect>")
        if len(counts) <= _MOST_COUNTED and count:
            drawn.append(f'<text x="{x + width / 2:.1f}" y="{foot - tall - 4:g}" text-anchor="middle">{count:,}</text>')
    drawn.append(f'<path class="axis" d="M2 {foot}H{_WIDTH - 2}"/>')
    drawn.append(f'<text x="2" y="{height - 6}">{escaped(counts[0][0])}</text>')
    if len(counts) > 1:
        drawn.append(f'<text x="{_WIDTH - 2}" y="{height - 6}" text-anchor="end">{escaped(counts[-1][0])}</text>')
    return f'{_opened(height, label)}><g class="c0">{"".join(drawn)}</g></svg>'


_MOST_COUNTED = 16
