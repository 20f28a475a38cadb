"""Several runs beside each other: how they ended, the settings in which they differ, and their curves in one chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlx_sft.charts import COLOURS, STYLE, Look, Series, chart
from mlx_sft.console import columns, duration, size
from mlx_sft.errors import USAGE, UserError
from mlx_sft.report import samples
from mlx_sft.report.metrics import Point
from mlx_sft.report.page import LOSS, STEPS
from mlx_sft.report.run import RunFiles, differing
from mlx_sft.report.runs import read
from mlx_sft.run_folder import RunFolder
from mlx_sft.web_page import escaped, page
from mlx_sft.writing import place_for_file, write_file

_BODY = Path(__file__).with_name("side_by_side.html")

OUTCOME = (
    "run",
    "state",
    "rows",
    "steps",
    "time",
    "loss",
    "last validation",
    "best validation",
    "at step",
    "peak memory",
)
_LEFT = ("run", "state")


class SideBySide:
    """Runs that are compared.

    Raises:
        UserError: For fewer than two, one that is named twice, and what is no run or cannot be read.
    """

    def __init__(self, names: Sequence[str]) -> None:
        places = [RunFolder(name).path.resolve() for name in names]
        if len(set(places)) < max(2, len(places)):
            what = "fewer than two runs" if len(places) < 2 else "a run is named twice"
            raise UserError(
                f"{what}, so that there is nothing to compare", hint="name two runs or more", exit_code=USAGE
            )
        self.runs = dict(zip(_short(names), (read(RunFolder(name)) for name in names), strict=True))

    @property
    def outcome(self) -> list[list[str]]:
        """A row for each run, in the order of `OUTCOME`."""
        return [_ended(name, files) for name, files in self.runs.items()]

    @property
    def settings(self) -> list[list[str]]:
        """A row for each setting that is not alike in all: its name, and its value in each run."""
        return [[name, *values] for name, values in differing(self.runs).items()]

    def text(self) -> str:
        """For a terminal."""
        parts = [columns(OUTCOME, self.outcome, _LEFT)]
        if found := self.settings:
            header = ["setting", *self.runs]
            parts.append(columns(header, found, header))
        else:
            parts.append("All settings are alike.\n")
        return "\n".join([*parts, "".join(f"{sentence}\n" for sentence in self.remarks())])

    def remarks(self) -> list[str]:
        """What the numbers alone do not say."""
        measured = {name: run.metrics.best.loss for name, run in self.runs.items() if run.metrics.best}
        found = []
        held_out = {str(run.data.get("valid")) for run in self.runs.values()}
        if len(held_out) > 1:
            found.append(
                "They were not validated on the same rows, so that their validation losses cannot be compared."
            )
        elif len(measured) > 1:
            best = min(measured, key=lambda name: measured[name])
            found.append(f"{best} has the lowest validation loss, {measured[best]:.4f}.")
        if any(state != "finished" for state in (run.state for run in self.runs.values())):
            found.append("Not all have finished: what is compared is what they have done so far.")
        return found

    def write_page(self, to: str | Path) -> Path:
        """Write it as one self-contained page, and return its path."""
        target = place_for_file(to)
        validated = [_curve(run, "validation") for run in self.runs.values()]
        smoothed = [run.metrics.smoothed["loss"].curve.points for run in self.runs.values()]
        header = ["setting", *self.runs]
        bests = {name: run.metrics.best for name, run in self.runs.items()}
        answers = samples.beside_each_other(
            {name: (samples.prompts_of(run.run), best.step if (best := bests[name]) else None) for name, run in self.runs.items()}
        )  # fmt: skip
        parts = {
            "what": escaped(", ".join(str(run.run.path) for run in self.runs.values())),
            "verdict": "".join(f"<li>{escaped(sentence)}</li>" for sentence in self.remarks()),
            "outcome": _table(OUTCOME, self.outcome, coloured=True),
            "training": self._chart(smoothed, "line", "Training loss, smoothed"),
            "validation": self._chart(validated, "line and dots", "Validation loss"),
            "samples": f"<h2>What they answer</h2>{answers}" if answers else "",
            "settings": _table(header, self.settings) if self.settings else "<p>All settings are alike.</p>",
        }
        write_file(target, page(_BODY, f"Runs: {', '.join(self.runs)}", parts, style=STYLE))
        return target

    def _chart(self, curves: Sequence[Sequence[Point]], look: Look, label: str) -> str:
        named = zip(self.runs, curves, strict=True)
        series = [Series(points, name, at, look) for at, (name, points) in enumerate(named)]
        return chart(series, STEPS, LOSS, label=label)


def _short(names: Sequence[str]) -> list[str]:
    """The names of the folders; with those above them where several are alike."""
    paths = [RunFolder(name).path.absolute() for name in names]
    parts = 1
    while len({path.parts[-parts:] for path in paths}) < len(paths):
        parts += 1
    return ["/".join(path.parts[-parts:]) for path in paths]


def _curve(run: RunFiles, name: str) -> list[Point]:
    curve = run.metrics.curves.get(name)
    return curve.points if curve else []


def _ended(name: str, files: RunFiles) -> list[str]:
    metrics, totals = files.metrics, files.metrics.totals
    steps = f"{totals.step:,} of {files.planned:,}" if files.planned else f"{totals.step:,}"
    loss = f"{metrics.last_loss:.4f}" if metrics.last_loss is not None else "-"
    last, best = (f"{one.loss:.4f}" if one else "-" for one in (metrics.last, metrics.best))
    at = f"{metrics.best.step:,}" if metrics.best else "-"
    peak = size(totals.peak_bytes) if totals.peak_bytes else "-"
    return [name, files.state, f"{files.rows:,}", steps, duration(totals.seconds), loss, last, best, at, peak]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, coloured: bool = False) -> str:
    head = "".join(f'<th scope="col">{escaped(name)}</th>' for name in header)
    body = []
    for at, (first, *rest) in enumerate(rows):
        cells = "".join(f"<td>{escaped(cell)}</td>" for cell in rest)
        body.append(f'<tr class="c{at % COLOURS}"><th scope="row">{escaped(first)}</th>{cells}</tr>')
    kind = "" if coloured else ' class="plain"'
    return f"<table{kind}><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
