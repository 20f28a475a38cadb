"""What the curves of a run say, in sentences: how far it came, whether it learned, and what to do next.

The bounds are rules of thumb, and wide ones, because a curve of one seed says nothing about small differences.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from mlx_sft.console import duration, many
from mlx_sft.report.metrics import Evaluation, Metrics
from mlx_sft.report.run import RunFiles, State, integer

Weight = Literal["good", "plain", "warn", "bad"]

WORSE = 1.02
"""Times the best validation loss, from where on a later one is worse."""
FALLING = 0.98
"""Times the loss a fifth of the run before, below which the loss is still falling."""
_DIVERGED = 1.0
"""Nats above the lowest smoothed loss, as the watch over divergence has it."""
_BY_HEART = 0.05
"""Nats: a mean loss below is that of rows that are known."""
_FEW_STEPS = 20
_UNMOVED = 0.02


class Sentence(NamedTuple):
    """A sentence, and whether it is good news."""

    weight: Weight
    text: str


def verdict(files: RunFiles, state: State) -> list[Sentence]:
    """The most important first."""
    metrics = files.metrics
    found = [_how_far(files, state)]
    if metrics.totals.steps:
        found += _of_the_loss(files, state)
        found += _of_what_happened(metrics)
    return found


def _how_far(files: RunFiles, state: State) -> Sentence:
    totals, planned, run = files.metrics.totals, files.planned, files.run.path
    of = f" of {planned:,}" if planned else ""
    took = f", {totals.epoch:.2f} epochs in {duration(totals.seconds)}" if totals.seconds else ""
    if state == "running":
        return Sentence("plain", f"It is training: step {totals.step:,}{of}{took}.")
    if state == "finished":
        early = f" It ended before the {planned:,} that were planned." if totals.step < planned else ""
        return Sentence("plain" if early else "good", f"Finished after step {totals.step:,}{took}.{early}")
    why = " error.log has the error that ended it." if files.run.error_log.is_file() else ""
    on = f"`mlx-sft train --resume {run}` goes on with it."
    return Sentence("warn", f"Stopped after step {totals.step:,}{of}{took}.{why} {on}")


def _of_the_loss(files: RunFiles, state: State) -> list[Sentence]:
    metrics = files.metrics
    now = metrics.smoothed["loss"].value
    if now is None or metrics.first_loss is None or metrics.last_loss is None:
        return [Sentence("bad", "No step had a finite loss: lower --lr, or train with --dtype float32.")]
    if metrics.lowest and now > metrics.lowest[1] + _DIVERGED:
        step, lowest = metrics.lowest
        text = f"The loss diverged: it was {lowest:.4g} around step {step:,.0f} and is {now:.4g} now."
        return [Sentence("bad", f"{text} Start a new run with a lower --lr, or with --on-divergence rollback.")]
    unmoved = abs(metrics.first_loss - metrics.last_loss) < _UNMOVED * metrics.first_loss
    if metrics.totals.steps >= _FEW_STEPS and unmoved:
        text = (
            f"The loss hardly moved, from {metrics.first_loss:.4g} to {metrics.last_loss:.4g}: a higher --lr may help."
        )
        return [Sentence("warn", text)]
    if metrics.best and metrics.last:
        return _of_validation(files, metrics.best, metrics.last, state)
    return _of_training(files, state)


def _of_validation(files: RunFiles, best: Evaluation, last: Evaluation, state: State) -> list[Sentence]:
    metrics, first = files.metrics, files.metrics.first
    if metrics.evaluations == 1 or first is None:
        return [
            Sentence(
                "plain",
                f"The validation loss is {best.loss:.4f} after step {best.step:,}; a second one will say where it goes.",
            )
        ]
    result = f"the result is that of step {best.step:,}"
    if last.loss > WORSE * best.loss:
        worse = f"Validation got worse after {_when(best)}: from {best.loss:.4f} to {last.loss:.4f}"
        text = f"{worse}, the sign of a model that begins to learn its rows by heart; {result}."
        more = " Fewer epochs, a lower --lr or more rows may do better." if state != "running" else ""
        return [Sentence("warn", text + more)]
    fell = f"The validation loss went from {first.loss:.4f} to {best.loss:.4f}; {result}."
    if last.step == best.step and _still_falling(metrics, "validation"):
        if state == "running":
            return [Sentence("good", f"{fell} It is still falling.")]
        return [Sentence("good", f"{fell} It was still falling at the end: more epochs may help{_more(files)}.")]
    level = (
        "It has levelled off: more of the same would change little." if state != "running" else "It has levelled off."
    )
    return [Sentence("good" if best.loss < first.loss else "plain", f"{fell} {level}")]


def _of_training(files: RunFiles, state: State) -> list[Sentence]:
    metrics = files.metrics
    first, last = metrics.first_loss or 0.0, metrics.last_loss or 0.0
    fell = f"The training loss went from {first:.4g} to {last:.4g}."
    if state != "running" and last < _BY_HEART:
        found = [
            Sentence("warn", f"{fell} The model knows these rows by heart; on others it may be worse than before.")
        ]
    elif state != "running" and _still_falling(metrics, "loss"):
        found = [Sentence("plain", f"{fell} It was still falling at the end: more epochs may help{_more(files)}.")]
    else:
        found = [Sentence("plain", fell)]
    if not integer(files.data, "valid", "rows"):
        text = "No rows are held out, so nothing here tells learning from learning by heart: --valid FILE or --valid-fraction 0.1 would."
        found.append(Sentence("plain", text))
    return found


def _when(evaluation: Evaluation) -> str:
    """`epoch 2`, where it was at the end of one; else the step."""
    nearest = round(evaluation.epoch)
    if nearest and abs(evaluation.epoch - nearest) < 1e-3:
        return f"epoch {nearest}"
    return f"step {evaluation.step:,}"


def _still_falling(metrics: Metrics, name: str) -> bool:
    """Whether a curve is lower at its end than a fifth of the run before."""
    curve = metrics.smoothed["loss"].curve if name == "loss" else metrics.curves[name]
    points = curve.points
    x, end = points[-1]
    before = [value for at, value in points if at <= 0.8 * x]
    return len(points) > 1 and end < FALLING * (before[-1] if before else points[-2][1])


def _more(files: RunFiles) -> str:
    """How a run is given more; nothing where its time was given."""
    if files.settings.get("for"):
        return ""
    steps = files.settings.get("max_steps")
    longer = (
        f"--max-steps {round(1.5 * files.planned)}" if steps else f"--epochs {integer(files.settings, 'epochs') + 2}"
    )
    return f" (`mlx-sft train --resume {files.run.path} {longer}`)"


def _of_what_happened(metrics: Metrics) -> list[Sentence]:
    found, totals = [], metrics.totals
    if totals.skipped:
        were = f"{many(totals.skipped, 'step')} {'was' if totals.skipped == 1 else 'were'}"
        found.append(
            Sentence(
                "warn",
                f"{were} skipped, because the loss or the gradient was not finite: see below.",
            )
        )
    if rollbacks := metrics.counts["rollback"]:
        found.append(Sentence("warn", f"The loss diverged, and the run went back, {_times(rollbacks)}."))
    if lacks := metrics.counts["out_of_memory"]:
        found.append(
            Sentence(
                "plain",
                f"Memory ran out {_times(lacks)}; the step was repeated in smaller parts, with the same result.",
            )
        )
    if taken := metrics.counts["interrupted"]:
        found.append(Sentence("plain", f"The system took the GPU away {_times(taken)}; the step was repeated."))
    return found


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number:,} times"
