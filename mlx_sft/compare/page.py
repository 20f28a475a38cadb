"""The comparison as one self-contained page: the verdict, the table and two charts, drawn here, so that no script need run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from mlx_sft.compare.comparison import Comparison
from mlx_sft.compare.table import COLUMNS, rows, verdict
from mlx_sft.web_page import escaped, page
from mlx_sft.writing import write_file

FILE = "compare.html"
_COLOURS = 8
_WIDTH, _HEIGHT = 460.0, 220.0
_LEFT, _BOTTOM = 46.0, 24.0
_HERE = Path(__file__).parent

Point = tuple[float, float, float]
"""x, y, and the radius of a dot."""


def write_page(comparison: Comparison) -> Path:
    """Write it into the comparison's folder."""
    target = comparison.path / FILE
    write_file(target, page_html(comparison))
    return target


def page_html(comparison: Comparison) -> str:
    """The page."""
    record = comparison.record
    model, data = record.common.get("model", ""), record.common.get("data", "")
    named = [data] if isinstance(data, str) else data
    steps = sorted(set(record.steps.values()))
    equal = f"{steps[0]} steps of the same rows" if len(steps) == 1 else "the same time"
    finals = [record.finals.get(candidate.label) for candidate in comparison.candidates]
    curves: list[list[Point]] = [
        [(step, loss, 2.5) for step, loss in trial.curve if loss is not None] if trial else [] for trial in finals
    ]
    longest = max(steps, default=1)
    searched: list[list[Point]] = [
        sorted(
            (math.log10(trial.rate), trial.loss, 2 + 3 * math.sqrt(trial.steps / longest))
            for trial in record.trials
            if trial.candidate == candidate.label and trial.loss is not None
        )
        for candidate in comparison.candidates
    ]
    parts = {
        "what": escaped(f"{', '.join(map(str, named))} on {model}".strip()),
        "verdict": "".join(f"<li>{escaped(sentence)}</li>" for sentence in verdict(comparison)),
        "table": _table(rows(comparison)),
        "curves": chart(curves),
        "search": chart(searched, powers_of_ten=True, lines=False),
        "equal": equal,
        "seed": str(int(record.common.get("seed", 0))),
    }
    return page(_HERE, f"Methods on {', '.join(map(str, named))}", parts)


def _table(cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in COLUMNS)
    body, colour = [], 0
    for row in cells:
        of_base = row[0] == "base"
        kind = "base" if of_base else f"c{colour % _COLOURS}"
        colour += not of_base
        rest = "".join(f"<td>{escaped(cell)}</td>" for cell in row[1:])
        body.append(f'<tr class="{kind}"><th scope="row">{escaped(row[0])}</th>{rest}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def chart(series: Sequence[Sequence[Point]], *, powers_of_ten: bool = False, lines: bool = True) -> str:
    """Dots, and lines between them, as SVG; one colour a series."""
    points = [point for one in series for point in one]
    if not points:
        return "<p>Nothing to draw.</p>"
    (left, right), (low, high) = (_range([point[axis] for point in points]) for axis in (0, 1))

    def place(point: Point) -> tuple[float, float]:
        across = (point[0] - left) / (right - left) * (_WIDTH - _LEFT - 10) + _LEFT
        up = (point[1] - low) / (high - low) * (_HEIGHT - _BOTTOM - 10) + _BOTTOM
        return round(across, 1), round(_HEIGHT - up, 1)

    drawn = [f'<path class="axis" d="M{_LEFT} 10V{_HEIGHT - _BOTTOM}H{_WIDTH - 10}"/>']
    for share in (0.0, 0.5, 1.0):
        x, y = left + share * (right - left), low + share * (high - low)
        at_x, at_y = place((x, y, 0))
        shown = f"{10**x:.2g}" if powers_of_ten else f"{x:.4g}"
        drawn.append(f'<text x="{at_x}" y="{_HEIGHT - 6}" text-anchor="middle">{shown}</text>')
        drawn.append(f'<text x="{_LEFT - 6}" y="{at_y + 4}" text-anchor="end">{y:.3g}</text>')
    for number, one in enumerate(series):
        places = [place(point) for point in one]
        line = f'<polyline points="{" ".join(f"{x},{y}" for x, y in places)}"/>' if lines and len(places) > 1 else ""
        dots = "".join(
            f'<circle cx="{x}" cy="{y}" r="{point[2]:.1f}"/>' for (x, y), point in zip(places, one, strict=True)
        )
        drawn.append(f'<g class="c{number % _COLOURS}">{line}{dots}</g>')
    return f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img">{"".join(drawn)}</svg>'


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
