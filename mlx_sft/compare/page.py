"""The comparison as one self-contained page without a script: the verdict, the table and two charts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from mlx_sft.charts import COLOURS, STYLE, Axis, Series, chart
from mlx_sft.compare.comparison import Comparison
from mlx_sft.compare.table import COLUMNS, rows, verdict
from mlx_sft.console import many
from mlx_sft.web_page import escaped, page
from mlx_sft.writing import write_file

FILE = "compare.html"
_HERE = Path(__file__).parent


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
    equal = f"{many(steps[0], 'step')} of the same rows" if len(steps) == 1 else "the same time"
    finals = [record.finals.get(candidate.label) for candidate in comparison.candidates]
    curves = [
        Series(
            [(step, loss) for step, loss in trial.curve if loss is not None] if trial else [],
            colour=at,
            look="line and dots",
        )
        for at, trial in enumerate(finals)
    ]
    longest = max(steps, default=1)
    searched = []
    for at, candidate in enumerate(comparison.candidates):
        found = sorted(
            (trial.rate, trial.loss, 2 + 3 * math.sqrt(trial.steps / longest))
            for trial in record.trials
            if trial.candidate == candidate.label and trial.loss is not None
        )
        searched.append(Series([dot[:2] for dot in found], colour=at, look="dots", radii=[dot[2] for dot in found]))
    parts = {
        "what": escaped(f"{', '.join(map(str, named))} on {model}".strip()),
        "verdict": "".join(f"<li>{escaped(sentence)}</li>" for sentence in verdict(comparison)),
        "table": _table(rows(comparison)),
        "curves": chart(curves, label="Validation loss by step"),
        "search": chart(searched, Axis(powers=True, show="{:.2g}".format), label="Validation loss by learning rate"),
        "equal": equal,
        "seed": str(int(record.common.get("seed", 0))),
    }
    return page(_HERE / "page.html", f"Methods on {', '.join(map(str, named))}", parts, style=STYLE)


def _table(cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in COLUMNS)
    body, colour = [], 0
    for row in cells:
        of_base = row[0] == "base"
        kind = "base" if of_base else f"c{colour % COLOURS}"
        colour += not of_base
        rest = "".join(f"<td>{escaped(cell)}</td>" for cell in row[1:])
        body.append(f'<tr class="{kind}"><th scope="row">{escaped(row[0])}</th>{rest}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
