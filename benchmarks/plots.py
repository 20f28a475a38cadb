"""A sweep's result → one SVG: seconds a step and memory above the weights against the axis, all axes linear and from 0.

Readable on light and on dark pages: no background, grey text, colours of middle lightness. Knows results, not how they were made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.process import OUT_OF_MEMORY

COLOURS = {"ours": "#2f81f7", "mlx-lm": "#d9822b", "trl": "#3fa45b", "unsloth": "#b35cc4", "limit": "#8b8b8b"}
NAMES = {"ours": "mlx-sft", "mlx-lm": "mlx-lm", "trl": "TRL", "unsloth": "Unsloth", "limit": "limit"}
GREY = "#8b8b8b"


Line = list[tuple[float, float]]


def lines(result: dict[str, Any], key: str) -> dict[str, Line]:
    """(x, value) of every trainer that has any: `seconds` a step, or `peak_bytes`; the limit has seconds only."""
    found: dict[str, Line] = {}
    for point in result["points"]:
        x, steps = point["point"]["x"], point["task"]["steps"]
        scale = 1 / steps if key == "seconds" else 1e-9
        for name, run in point["summary"]["trainers"].items():
            if key in run:
                found.setdefault(name, []).append((x, run[key] * scale))
        limit = point["summary"]["limit"]
        if key == "seconds" and limit:
            found.setdefault("limit", []).append((x, limit["seconds"] * scale))
    return found


def failures(result: dict[str, Any]) -> dict[str, Line]:
    """Where a trainer ran out of memory, and how much it had taken beyond the weights by then."""
    found: dict[str, Line] = {}
    for point in result["points"]:
        weights = max((run.get("weight_bytes", 0) for run in point["summary"]["trainers"].values()), default=0)
        for name, run in point["summary"]["trainers"].items():
            if run.get("failed") == OUT_OF_MEMORY:
                reached = max(0, run["highest_bytes"] - weights) * 1e-9
                found.setdefault(name, []).append((point["point"]["x"], reached))
    return found


@contextmanager
def figure(file: Path, size: tuple[float, float], rows: int, columns: int) -> Iterator[Any]:
    """The axes of a figure, which is written as it is left; the same lines give the same bytes."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {
        "svg.hashsalt": "mlx-sft",
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), GREY),
    }
    with mpl.rc_context(style):
        drawn = Figure(figsize=size, layout="constrained")
        yield drawn.subplots(rows, columns)
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def draw(result: dict[str, Any], file: Path) -> Path:
    """Write the figure of a sweep."""
    with figure(file, (8, 3), 1, 2) as (time, memory):
        fill(time, lines(result, "seconds"), result["axis"], "seconds a step")
        fill(memory, lines(result, "peak_bytes"), result["axis"], "GB above the weights")
        for name, reached in failures(result).items():
            memory.plot(*zip(*reached, strict=True), "x", color=COLOURS[name], label=f"{NAMES[name]}: out of memory")
        for axes in (time, memory):
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False)
    return file


def fill(axes: Any, found: dict[str, Line], x_label: str, y_label: str) -> None:
    for name, points in found.items():
        form = ":" if name == "limit" else "-o"
        axes.plot(*zip(*points, strict=True), form, color=COLOURS[name], markersize=3, label=NAMES[name])
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
