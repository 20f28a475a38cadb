"""What the curves of a run say, in sentences: how far it came, whether it learned, and what to do next.

The bounds are rules of thumb, and wide ones, because a curve of one seed says nothing about small differences.
"""

from __future__ import annotations

import math
import shlex
from typing import Literal, NamedTuple

from mlx_sft.console import duration, epochs, many
from mlx_sft.registry import OBJECTIVES
from mlx_sft.report.metrics import Evaluation, Metrics
from mlx_sft.report.run import RunFiles, State, integer
from mlx_sft.settings import parse_duration

Weight = Literal["good", "plain", "warn", "bad"]

WORSE = 1.02
"""Times the best validation loss, from where on a later one is worse."""
FALLING = 0.02
"""Of the loss a fifth of the run before, and of how far the training loss has come in all: falling by more is still falling."""
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
        found += _of_forgetting(metrics)
        found += _of_what_happened(metrics)
    return found


def _how_far(files: RunFiles, state: State) -> Sentence:
    totals, planned, run = files.metrics.totals, files.planned, files.run.path
    of = f" of {planned:,}" if planned else ""
    took = f", {epochs(totals.epoch)} in {duration(totals.seconds)}" if totals.seconds else ""
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
        fell = Sentence("plain", _fell(files, metrics.first_loss, metrics.last_loss))
        return [fell, *_of_validation(files, metrics.best, metrics.last, state)]
    return _of_training(files, state)


def _fell(files: RunFiles, first: float, last: float) -> str:
    """From where to where the training loss went, and what that means where it is a mean of −log p."""
    text = f"The training loss went from {first:.4g} to {last:.4g}"
    objective = str(files.settings.get("objective") or "sft")
    if objective not in OBJECTIVES or OBJECTIVES[objective].first_pass or min(first, last) < 0:
        return f"{text}."
    before, after = (f"{100 * math.exp(-loss):.2g} %" for loss in (first, last))
    return f"{text}: to each next token of an answer the model now gives a chance of {after}, at first of {before}."


def _of_validation(files: RunFiles, best: Evaluation, last: Evaluation, state: State) -> list[Sentence]:
    metrics, first = files.metrics, files.metrics.first
    if metrics.evaluations == 1 or first is None:
        known = f"The validation loss is {best.loss:.4f} after step {best.step:,}"
        if state == "running":
            return [Sentence("plain", f"{known}; a second one will say where it goes.")]
        text = f"{known}, the only one: it is that of the result. --eval-every 10 measures it on the way too, and keeps the best step."
        return [Sentence("plain", text)]
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
        return [Sentence("good", f"{fell} It was still falling at the end: more epochs may help{_more_with(files)}.")]
    level = "It has levelled off"
    if state == "finished" and last.step == best.step and files.settings.get("scheduler") != "constant":
        why = "as any loss does while the learning rate goes to zero"
        level += f", {why}: where answers are not right yet, more epochs may still help{_more_with(files)}."
    else:
        level += "." if state == "running" else ": more of the same would change little."
    return [Sentence("good" if best.loss < first.loss else "plain", f"{fell} {level}")]


def _of_forgetting(metrics: Metrics) -> list[Sentence]:
    """What the divergence from the base on general texts means: by exp(−KL) its tokens are less likely, in the mean of logarithms."""
    of_result = metrics.best or metrics.last
    if of_result is None or of_result.forgetting is None:
        return []
    value = of_result.forgetting
    weight, how_far = next((weight, words) for most, weight, words in _FORGOTTEN if value < most)
    share = f"{-math.expm1(-max(0.0, value)):.1%}"
    text = (
        f"On general texts the model has {how_far} from the base: a token that the base would write has become {share} less likely "
        f"(forgetting {value:.3g} nats, step {of_result.step:,})."
    )
    ways = "fewer steps, a lower --lr, a smaller --rank or general rows among the data"
    more = f" Where it must do other things too, {ways} keep more of what it knew."
    return [Sentence(weight, text + (more if weight == "warn" else ""))]


_FORGOTTEN: tuple[tuple[float, Weight, str], ...] = (
    (0.02, "plain", "hardly moved"),
    (0.1, "plain", "moved a little"),
    (0.5, "plain", "moved noticeably"),
    (math.inf, "warn", "moved far"),
)
"""Nats a token, below which the words hold."""


def _of_training(files: RunFiles, state: State) -> list[Sentence]:
    metrics = files.metrics
    first, last = metrics.first_loss or 0.0, metrics.last_loss or 0.0
    fell = _fell(files, first, last)
    if state != "running" and last < _BY_HEART:
        found = [
            Sentence("warn", f"{fell} The model knows these rows by heart; on others it may be worse than before.")
        ]
    elif state != "running" and _still_falling(metrics, "loss"):
        found = [Sentence("plain", f"{fell} It was still falling at the end: more epochs may help{_more_with(files)}.")]
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
    """Whether a curve fell in the last fifth of the run: by a share of where it was then, and of how far the run has come in all."""
    curve = metrics.smoothed["loss"].curve if name == "loss" else metrics.curves[name]
    points = curve.points
    if len(points) < 2:
        return False
    x, end = points[-1]
    earlier = [value for at, value in points if at <= 0.8 * x]
    before = earlier[-1] if earlier else points[-2][1]
    return before - end > FALLING * max(before, (metrics.first_loss or before) - end)


def _more_with(files: RunFiles) -> str:
    """In brackets, how a run is given more; nothing where its time was given."""
    return "" if files.settings.get("for") else f" (`{more_with(files)}`)"


def more_with(files: RunFiles) -> str:
    """The command that gives a finished run half as many steps again or two more passes, and twice the time where its time was given."""
    if files.settings.get("max_steps"):
        longer = f"--max-steps {round(1.5 * files.planned)}"
    else:
        longer = f"--epochs {integer(files.settings, 'epochs') + 2}"
    if time := files.settings.get("for"):
        longer += f" --for {2 * parse_duration(str(time))}s"
    return f"mlx-sft train --resume {shlex.quote(str(files.run.path))} {longer}"


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
