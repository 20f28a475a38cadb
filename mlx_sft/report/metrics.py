"""metrics.jsonl, read in one pass: curves of a bounded number of points, and what happened when. A run that goes on is read on."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from mlx_sft.run_folder import LONGEST_METRIC, RunFolder

Point = tuple[float, float]
Record = dict[str, Any]

MOST_POINTS = 1024
"""Of a curve; twice as many pixels as a chart has."""
MOST_EVENTS = 20
"""Of each kind that are shown one by one; all are counted."""
_MOST_OF_OBJECTIVE = 12
_SHARE_SMOOTHED, _LEAST_SMOOTHED, _MOST_SMOOTHED = 1 / 20, 5.0, 400.0
"""Of the planned steps, and in steps: what the smoothed curve is a mean over."""

OF_STEP = (
    *(
        "kind",
        "time",
        "skipped_rows",
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "supervised_tokens",
        "computed_tokens",
    ),
    *("padded_tokens", "micro_batches", "tokens_per_second", "peak_memory_bytes", "active_memory_bytes"),
    *("cache_memory_bytes", "footprint_bytes", "seconds", "data_wait_seconds", "traces", "trace_seconds"),
)
"""What every step has; a number of another name is one of the objective's own."""


class Curve:
    """Points in the order of their x, thinned as they come: of each stretch the lowest and the highest are kept.

    A stretch is so many points; where there are too many stretches, two neighbours become one.
    """

    def __init__(self, most: int = MOST_POINTS) -> None:
        self._most = most // 2
        self._length = 1
        self._left = 0
        """Points that the last stretch still takes."""
        self._stretches: list[list[Point]] = []

    def add(self, x: float, y: float) -> None:
        if self._left:
            self._left -= 1
            last = self._stretches[-1]
            if y < last[0][1]:
                last[0] = (x, y)
            elif y > last[1][1]:
                last[1] = (x, y)
            return
        if len(self._stretches) == self._most:
            pairs = zip(self._stretches[::2], self._stretches[1::2], strict=True)
            self._stretches = [[min(a[0], b[0], key=_height), max(a[1], b[1], key=_height)] for a, b in pairs]
            self._length *= 2
        self._stretches.append([(x, y), (x, y)])
        self._left = self._length - 1

    @property
    def points(self) -> list[Point]:
        """The lowest and highest of each stretch, in their order."""
        return [point for low, high in self._stretches for point in ([low] if low == high else sorted((low, high)))]


def _height(point: Point) -> float:
    return point[1]


class Smoothed:
    """A curve of means: exponentially weighted, over about `span` values, without the bias of the first (Kingma & Ba 2015, section 3)."""

    def __init__(self, span: float) -> None:
        self.curve = Curve()
        self.value: float | None = None
        self._keep = 1 - 2 / (max(1.0, span) + 1)
        self._sum = self._weight = 0.0

    def add(self, x: float, y: float) -> None:
        self._sum = self._keep * self._sum + (1 - self._keep) * y
        self._weight = self._keep * self._weight + (1 - self._keep)
        self.value = self._sum / self._weight
        self.curve.add(x, self.value)


def smoothed(planned: int) -> Smoothed:
    """The means over a twentieth of so many planned steps, within bounds."""
    return Smoothed(min(_MOST_SMOOTHED, max(_LEAST_SMOOTHED, planned * _SHARE_SMOOTHED)))


@dataclass(frozen=True)
class Evaluation:
    """One evaluation; what the file does not say is None."""

    step: int
    epoch: float
    loss: float
    perplexity: float | None = None
    token_accuracy: float | None = None
    exact_match: float | None = None
    forgetting: float | None = None


@dataclass
class Own:
    """A number that the objective tells beside the loss: smoothed over the steps, of each step, and of each evaluation."""

    smoothed: Smoothed
    steps: Curve = field(default_factory=Curve)
    validation: Curve = field(default_factory=Curve)


@dataclass
class Totals:
    """Sums over all steps."""

    step: int = 0
    epoch: float = 0.0
    steps: int = 0
    tokens: float = 0.0
    supervised_tokens: float = 0.0
    seconds: float = 0.0
    peak_bytes: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass
class Metrics:
    """What metrics.jsonl of a run says, as far as it was read.

    Attributes:
        planned: Steps, by which the smoothing is chosen; 0 where that is not known.
        began, last_time: Of the first line and the last, in local time; None where lines do not say so.
        first_loss: The mean of the first few.
        lowest: The step at which the smoothed loss was lowest, and that loss.
        best, last, first: Evaluations with a finite loss.
        evaluations: How many there were.
        epochs: The steps that ended the first passes over the data.
        events: What else happened, the first of each kind; `counts` counts all.
        own: What the objective tells beside the loss, by its name.
    """

    run: RunFolder
    planned: int = 0
    totals: Totals = field(default_factory=Totals)
    began: datetime | None = None
    last_time: datetime | None = None
    first_loss: float | None = None
    last_loss: float | None = None
    lowest: Point | None = None
    first: Evaluation | None = None
    best: Evaluation | None = None
    last: Evaluation | None = None
    evaluations: int = 0
    epochs: list[int] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    curves: defaultdict[str, Curve] = field(default_factory=lambda: defaultdict(Curve))
    own: dict[str, Own] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.smoothed = {name: smoothed(self.planned) for name in ("loss", "grad_norm", "tokens_per_second")}
        self._few = round(min(50, max(1, self.planned * _SHARE_SMOOTHED)))
        self._first_losses: list[float] = []
        self._last_losses: deque[float] = deque(maxlen=self._few)
        self._read = 0
        self._last_line = b""
        self._heard: dict[str, Callable[[Record, int], None]] = {
            "train": self._add_step,
            "evaluation": self._add_evaluation,
        }

    def follow(self) -> None:
        """Read what is new in the file, up to its last whole line.

        Raises:
            UserError: If it cannot be read.
        """
        if not self.run.metrics.is_file():
            return
        for line in self.run.metric_lines(self._read):
            if not line.endswith(b"\n") and len(line) < LONGEST_METRIC:
                break  # it is being written
            self._read, self._last_line = self._read + len(line), line
            with suppress(ValueError, RecursionError):  # a damaged line says nothing
                self.add(json.loads(line))

    @property
    def is_cut(self) -> bool:
        """Whether the line that was read last no longer stands where it stood."""
        if not self._last_line:
            return False
        lines = self.run.metric_lines(self._read - len(self._last_line)) if self.run.metrics.is_file() else iter(())
        return next(lines, b"") != self._last_line

    def add(self, record: Any) -> None:
        """One line; what is none of a run's is left out."""
        if not isinstance(record, dict) or not isinstance(kind := record.get("kind"), str):
            return
        step = record.get("step")
        if (time := moment(record)) is not None:
            self.began, self.last_time = self.began or time, time
        if isinstance(step, int) and 0 <= step < 2**53:
            self._heard.get(kind, self._add_event)(record, step)

    def _add_step(self, record: Record, step: int) -> None:
        totals, loss = self.totals, number(record, "loss")
        before, totals.step, totals.epoch = totals.epoch, step, number(record, "epoch") or 0.0
        if math.floor(totals.epoch) > math.floor(before) and len(self.epochs) < MOST_EVENTS:
            self.epochs.append(step)
        totals.steps += 1
        totals.tokens += number(record, "tokens") or 0
        totals.supervised_tokens += number(record, "supervised_tokens") or 0
        totals.seconds += number(record, "seconds") or 0
        totals.peak_bytes = max(totals.peak_bytes, number(record, "peak_memory_bytes") or 0)
        for name in ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_bytes",
                     "active_memory_bytes", "cache_memory_bytes"):  # fmt: skip
            if (value := number(record, name)) is not None:
                self.curves[name].add(step, value)
                if name in self.smoothed:
                    self.smoothed[name].add(step, value)
        for one, value in self._own_numbers(record):
            one.steps.add(step, value)
            one.smoothed.add(step, value)
        if loss is None:
            totals.skipped += 1
            totals.skipped_in_a_row += 1
            self._add_event({**record, "kind": "skipped"}, step)
            return
        totals.skipped_in_a_row = 0
        if len(self._first_losses) < self._few:
            self._first_losses.append(loss)
            self.first_loss = sum(self._first_losses) / len(self._first_losses)
        self._last_losses.append(loss)
        self.last_loss = sum(self._last_losses) / len(self._last_losses)
        smooth = self.smoothed["loss"].value
        if smooth is not None and (self.lowest is None or smooth < self.lowest[1]):
            self.lowest = (step, smooth)

    def _own_numbers(self, record: Record) -> Iterator[tuple[Own, float]]:
        for name in record:
            if name in _OF_ANY or (value := number(record, name)) is None:
                continue
            if name not in self.own and len(self.own) < _MOST_OF_OBJECTIVE:
                self.own[name] = Own(smoothed(self.planned))
            if name in self.own:
                yield self.own[name], value

    def _add_evaluation(self, record: Record, step: int) -> None:
        self.totals.seconds += number(record, "seconds") or 0
        loss = number(record, "loss")
        self.evaluations += 1
        if loss is None:
            self._add_event({"kind": "evaluation without a finite loss"}, step)
            return
        found = Evaluation(
            step, number(record, "epoch") or 0.0, loss, *(number(record, name) for name in _OF_EVALUATION)
        )
        self.first, self.last = self.first or found, found
        if self.best is None or loss < self.best.loss:
            self.best = found
        self.curves["validation"].add(step, loss)
        for name in ("token_accuracy", "exact_match", "forgetting"):
            if (value := number(record, name)) is not None:
                self.curves[name].add(step, value)
        for one, value in self._own_numbers(record):
            one.validation.add(step, value)

    def _add_event(self, record: Record, step: int) -> None:
        kind = str(record["kind"])
        if kind == _SAMPLE or (len(self.counts) > MOST_EVENTS and kind not in self.counts):
            return
        self.counts[kind] += 1
        if self.counts[kind] <= MOST_EVENTS:
            rows = record.get("skipped_rows")
            short = {name: value for name, value in record.items() if isinstance(value, int | float | str)}
            kept = {name: value[:_MOST_TEXT] if isinstance(value, str) else value for name, value in short.items()}
            named = (
                [row[:_MOST_TEXT] for row in rows[:_MOST_ROWS] if isinstance(row, str)]
                if isinstance(rows, list)
                else []
            )
            self.events.append({**kept, "step": step, "rows_named": named})


_SAMPLE = "sample"
_MOST_TEXT, _MOST_ROWS = 300, 5
_OF_EVALUATION = ("perplexity", "token_accuracy", "exact_match", "forgetting")
_OF_ANY = {*OF_STEP, *_OF_EVALUATION, "best"}
_LARGEST = 1e200


def moment(record: Record) -> datetime | None:
    """When something was, in local time; None where the record does not say."""
    with suppress(ValueError, TypeError, OverflowError, OSError):
        return datetime.fromisoformat(record.get("time", "")).astimezone()
    return None


def number(record: Record, name: str) -> float | None:
    """A finite number of a record; None for anything else."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_LARGEST < value < _LARGEST:
        return None
    return float(value)
