"""report.html: a run as one self-contained page. It asks for no network, and its few lines of script only tell values of charts."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mlx_sft.charts import SCRIPT, STYLE, Axis, Point, Series, bars, chart
from mlx_sft.console import count, duration, epochs, many, size
from mlx_sft.report import samples
from mlx_sft.report.metrics import Metrics, Own, moment, number
from mlx_sft.report.run import RunFiles, Setting, State, found, integer, texts
from mlx_sft.report.verdict import Sentence, verdict
from mlx_sft.run_folder import RunFolder
from mlx_sft.web_page import escaped, page
from mlx_sft.writing import place_for_file, write_file

_HERE = Path(__file__).parent
_LIVE = (_HERE / "live.js").read_text(encoding="utf-8")

_AGAIN = 30
"""Seconds after which the page of a run that trains is loaded again."""
_MOST_EVENTS = 40
_MOST_WARNINGS = 20
_NOTHING = ("", "null", "[]", "{}")

STEPS = Axis(show=lambda step: f"{step:,.0f}" if step < 1e4 else count(step))
Curves = Mapping[str, Sequence[Point]]

LOSS, _PLAIN = Axis(powers=None), Axis()
_BYTES = Axis(from_zero=True, show=lambda value: size(value) if value else "0")


def write_report(run: str | Path, to: str | Path | None = None) -> Path:
    """Write the page of a run, whether it trains or has ended, and return its path.

    Args:
        to: Another file than the run's own report.html.

    Raises:
        UserError: For a folder that is no run, and for files of it that cannot be read.
    """
    files = RunFiles.of(RunFolder.open(run))
    target = place_for_file(to) if to is not None else files.run.page
    write_file(target, page_html(files, files.state))
    return target


def page_html(files: RunFiles, state: State, *, live: bool = False) -> str:
    """The page, with what is new in the metrics; one that is served (`report/live.py`) has a line for what the server says."""
    files.follow()
    name = files.run.path.absolute().name
    parts = {
        "name": escaped(name),
        "state": state,
        "what": escaped(" · ".join(filter(None, (files.method, files.model, ", ".join(files.data_names))))),
        "verdict": "".join(map(_sentence, verdict(files, state))),
        "cards": _cards(files),
        "charts": "".join(_charts(files)),
        "samples": _samples(files),
        "events": _events(files),
        "data": _data(files.data),
        "settings": _settings(files.all_settings()),
        "commands": _commands(files, state),
        "written": escaped(_written(files)),
        "live": '<p class="soft" id="live" role="status"></p>\n' if live else "",
    }
    again = _AGAIN if state == "running" and not live else None
    script = SCRIPT + (_LIVE if live else "")
    return page(_HERE / "page.html", f"{name}: {state}", parts, style=STYLE, script=script, again=again, connects=live)


def _sentence(sentence: Sentence) -> str:
    pieces = sentence.text.split("`")
    text = "".join(f"<code>{escaped(piece)}</code>" if at % 2 else escaped(piece) for at, piece in enumerate(pieces))
    return f'<li class="{sentence.weight}">{text}</li>'


def _cards(files: RunFiles) -> str:
    metrics, totals = files.metrics, files.metrics.totals
    cards: list[tuple[str, str, str]] = [
        ("steps", f"{totals.step:,}", f"of {files.planned:,}, {epochs(totals.epoch)}" if files.planned else "")
    ]
    if metrics.last_loss is not None:
        cards.append(("training loss", f"{metrics.last_loss:.4g}", f"from {metrics.first_loss:.4g}"))
    if best := metrics.best:
        accuracy = f", {best.token_accuracy:.1%} of tokens right" if best.token_accuracy is not None else ""
        cards.append(("validation loss", f"{best.loss:.4g}", f"best, step {best.step:,}{accuracy}"))
    if totals.seconds:
        span = f", {_between(metrics.began, metrics.last_time)}" if metrics.began and metrics.last_time else ""
        a_step = f"{totals.seconds / max(1, totals.steps):.2g} s a step"
        cards.append(("time", duration(totals.seconds), f"{a_step}{span}"))
        share = f", {totals.supervised_tokens / totals.tokens:.0%} supervised" if totals.tokens else ""
        cards.append(("tokens", count(totals.tokens), f"{count(totals.tokens / totals.seconds)} a second{share}"))
    if totals.peak_bytes:
        predicted = integer(files.environment, "memory", "predicted_peak_bytes")
        cards.append(("peak memory", size(totals.peak_bytes), f"{size(predicted)} predicted" if predicted else ""))
    return "".join(
        f"<div><dt>{name}</dt><dd>{escaped(value)}<small>{escaped(more)}</small></dd></div>"
        for name, value, more in cards
    )


def _charts(files: RunFiles) -> Iterable[str]:
    curves = {name: curve.points for name, curve in files.metrics.curves.items()}
    yield _of_the_loss(files, curves)
    yield from _of_the_objective(files)
    yield from _of_the_steps(files, curves)
    yield _of_memory(files, curves)
    if forgotten := curves.get("forgetting"):
        yield _figure(
            "Forgetting: how far the model is from the base on general texts, in nats a token",
            [Series(forgotten, "forgetting", 6, "line and dots")],
            Axis(from_zero=True),
        )


def _of_the_loss(files: RunFiles, curves: Curves) -> str:
    metrics = files.metrics
    ends = [(float(step), 7) for step in metrics.epochs if step < metrics.totals.step]
    lost = [(float(event["step"]), 4) for event in metrics.events if event["kind"] in ("rollback", "skipped")]
    marked = ["grey: ends of epochs"] * bool(ends) + ["red: skipped steps and returns"] * bool(lost)
    marks, ended = ends + lost, f" ({'; '.join(marked)})" if marked else ""
    return _figure(
        f"Loss{', of the objective ' + str(files.settings.get('objective')) if metrics.own else ', in nats a token'}{ended}",
        [
            Series(curves.get("loss", []), "each step", 0, "faint"),
            Series(metrics.smoothed["loss"].curve.points, "smoothed", 0),
            Series(
                curves.get("validation", []), "validation, best ringed", 1, "line and dots",
                stands_out=_at(curves.get("validation", []), metrics),
            ),
        ],
        LOSS, marks,
    )  # fmt: skip


def _of_the_steps(files: RunFiles, curves: Curves) -> Iterable[str]:
    """How right it is, and how fast and by how much it moves."""
    metrics = files.metrics
    smooth = {name: one.curve.points for name, one in metrics.smoothed.items()}
    if metrics.evaluations > 1 and "token_accuracy" in curves:
        rows = [*curves.get("exact_match", [])] if any(share for _, share in curves.get("exact_match", [])) else []
        yield _figure(
            "Validation: share that the model, choosing the likeliest, writes as it stands",
            [
                Series(curves["token_accuracy"], "tokens", 2, "line and dots"),
                Series(rows, "whole rows", 3, "line and dots"),
            ],
            Axis(show="{:.0%}".format),
        )
    yield _figure(
        "Learning rate",
        [Series(curves.get("learning_rate", []), "learning rate", 5)],
        Axis(from_zero=True, show=lambda rate: f"{rate:.1e}" if rate else "0"),
    )
    limit = number(files.settings, "max_grad_norm")
    steps = [point[0] for point in curves.get("grad_norm", [])]
    clipped = [(steps[0], limit), (steps[-1], limit)] if steps and limit and _is_near(limit, metrics) else []
    yield _figure(
        "Gradient norm, before it is clipped",
        [
            Series(curves.get("grad_norm", []), "each step", 3, "faint"),
            Series(smooth["grad_norm"], "smoothed", 3),
            Series(clipped, "clipped above", 7, "dashed"),
        ],
        LOSS,
    )
    yield _figure(
        "Tokens a second",
        [
            Series(curves.get("tokens_per_second", []), "each step", 2, "faint"),
            Series(smooth["tokens_per_second"], "smoothed", 2),
        ],
        Axis(from_zero=True, show=count),
    )


def _of_memory(files: RunFiles, curves: Curves) -> str:
    predicted = integer(files.environment, "memory", "predicted_peak_bytes")
    active = curves.get("active_memory_bytes", [])
    return _figure(
        "Memory of MLX's arrays",
        [
            Series(curves.get("peak_memory_bytes", []), "peak", 4),
            Series(active, "active, after a step", 0),
            Series(curves.get("cache_memory_bytes", []), "kept for the next", 7, "faint"),
            Series([(active[0][0], predicted), (active[-1][0], predicted)] if active and predicted else [], "predicted peak", 1, "dashed"),
        ],
        _BYTES,
    )  # fmt: skip


def _of_the_objective(files: RunFiles) -> Iterable[str]:
    """A chart of each number that it tells beside the loss; of both answers of a pair, and of what is between them, one."""
    together: dict[str, dict[str, Own]] = {}
    for name, own in files.metrics.own.items():
        group, _, side = name.rpartition("/")
        together.setdefault(group if group and side in _SIDES else name, {})[name] = own
    for group, members in together.items():
        series = []
        for name, own in members.items():
            side = name.rpartition("/")[2]
            colour = _SIDES.get(side, 3)
            if len(members) == 1:
                series.append(Series(own.steps.points, "each step", colour, "faint"))
            series.append(Series(own.smoothed.curve.points, "smoothed" if len(members) == 1 else side, colour))
            series.append(Series(own.validation.points, "", colour, "dots"))
        dots = "; dots: validation" if any(own.validation.points for own in members.values()) else ""
        yield _figure(f"{group}, of the objective {files.settings.get('objective', '')}{dots}", series)


_SIDES = {"chosen": 2, "rejected": 4, "margins": 0}
"""What is told of pairs, and its colour."""


def _samples(files: RunFiles) -> str:
    best = files.metrics.best
    drawn = samples.table(samples.prompts_of(files.run), best.step if best else None)
    return f"<h2>What it answers</h2>{drawn}" if drawn else ""


def _figure(title: str, series: Sequence[Series], y: Axis = _PLAIN, marks: Sequence[Point] = ()) -> str:
    if not any(one.points for one in series):
        return ""
    drawn = chart(series, STEPS, y, label=title, marks=marks)
    return f"<figure><figcaption>{escaped(title)}</figcaption>{drawn}</figure>"


def _at(points: Sequence[Point], metrics: Metrics) -> frozenset[int]:
    """Which of the points is the best evaluation; the lowest of a stretch is always kept."""
    best = metrics.best
    return frozenset(place for place, point in enumerate(points) if best and point == (best.step, best.loss))


def _is_near(limit: float, metrics: Metrics) -> bool:
    """Whether a norm was ever half of the limit, so that a line for it tells something."""
    return any(value > limit / 2 for _, value in metrics.curves["grad_norm"].points)


def _events(files: RunFiles) -> str:
    metrics = files.metrics
    listed: list[tuple[int, str]] = [(event["step"], _told(event) + _time_of(event)) for event in metrics.events]
    if metrics.best:
        which = f"the best of {metrics.evaluations:,} evaluations" if metrics.evaluations > 1 else "an evaluation"
        listed.append((metrics.best.step, f"{which}, validation loss {metrics.best.loss:.4f}"))
    if metrics.last and metrics.last != metrics.best:
        listed.append((metrics.last.step, f"the last evaluation, validation loss {metrics.last.loss:.4f}"))
    listed += [(step, "a checkpoint that is kept") for step in files.run.checkpoint_steps()]
    listed.sort(key=lambda one: one[0])
    more = sum(metrics.counts.values()) - len(metrics.events) + max(0, len(listed) - _MOST_EVENTS)
    items = [f"<li><b>step {step:,}</b><span>{escaped(text)}</span></li>" for step, text in listed[:_MOST_EVENTS]]
    if more:
        items.append(f"<li><b></b><span>and {more:,} more, in metrics.jsonl</span></li>")
    return f'<ul class="events">{"".join(items)}</ul>' if items else '<p class="soft">Nothing yet.</p>'


def _between(first: datetime, last: datetime) -> str:
    """Two times, the day of the second where it is another one."""
    day = "" if first.date() == last.date() else "%-d %b "
    return f"{first:%-d %b %Y %H:%M} to {last:{day}%H:%M}"


def _time_of(event: Mapping[str, Any]) -> str:
    time = moment(dict(event))
    return f" ({time:%H:%M:%S})" if time else ""


def _told(event: Mapping[str, Any]) -> str:
    """What happened, in words."""
    kind = event["kind"]
    if kind == "skipped":
        rows = f"; rows {', '.join(event['rows_named'])}" if event["rows_named"] else ""
        return f"skipped, because its gradient was not finite{rows}"
    if kind == "rollback":
        diverged, factor = (event.get(name, "?") for name in ("diverged_at", "learning_rate_factor"))
        return f"back to here: the loss had diverged at step {diverged}; on with {factor} times the learning rate"
    tokens = event.get("micro_batch_tokens")
    smaller = f"; repeated with up to {tokens} tokens at once, and so from then on" if tokens is not None else ""
    if kind == "out_of_memory":
        return f"memory ran out{smaller}"
    if kind == "interrupted":
        return f"the system took the GPU away{smaller or '; repeated'}"
    return str(kind).replace("_", " ")


def _data(report: Mapping[str, Any]) -> str:
    totals = found(report, dict, "totals") or {}
    lost = [f"{integer(totals, fate):,} {fate}" for fate in ("truncated", "dropped", "bad") if integer(totals, fate)]
    train, valid = (found(report, dict, part) or {} for part in ("train", "valid"))
    facts = {
        "rows": f"{integer(totals, 'rows'):,} read, {integer(train, 'rows'):,} to train on, {integer(valid, 'rows'):,} held out",
        "lost": ", ".join(lost) or "none",
        "tokens": _of_tokens(train),
        "held out": _of_tokens(valid) if integer(valid, "rows") else "",
        "lengths": _of_lengths(found(train, dict, "lengths") or {}),
        "equal rows": f"{integer(train, 'duplicates'):,}" if integer(train, "duplicates") else "",
        "files": ", ".join(filter(None, (_source(one) for one in found(report, list, "sources") or []))),
    }  # fmt: skip
    warnings = texts(report, "warnings")[:_MOST_WARNINGS]
    warned = "".join(f"<li>{escaped(text)}</li>" for text in warnings)
    histogram = [
        (_from_to(integer(bar, "from"), integer(bar, "to")), integer(bar, "count"))
        for bar in found(train, list, "histogram") or []
    ]
    drawn = bars(histogram[:100], label="Rows by their length")
    return (
        (f'<ul class="warnings">{warned}</ul>' if warned else "")
        + _facts(facts)
        + (f"<p class='soft'>Rows by their length in tokens</p>{drawn}" if drawn else "")
    )


def _from_to(first: int, last: int) -> str:
    return f"{first:,}–{last:,}" if last > first else f"{first:,}"


def _of_tokens(part: Mapping[str, Any]) -> str:
    tokens, supervised = integer(part, "tokens"), integer(part, "supervised_tokens")
    return f"{tokens:,}, {supervised / tokens:.0%} of them supervised" if tokens else ""


def _of_lengths(lengths: Mapping[str, Any]) -> str:
    middle, most, longest = (integer(lengths, name) for name in ("p50", "p95", "max"))
    return f"{middle:,} (median), {most:,} (95 %), {longest:,} (longest) tokens" if longest else ""


def _source(source: Any) -> str:
    name = found(source, str, "name")
    return f"{Path(name).name or name} ({many(integer(source, 'rows'), 'row')})" if name else ""


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escaped(name)}</dt><dd>{escaped(value)}</dd>" for name, value in facts.items() if value)
    return f'<dl class="facts">{rows}</dl>'


def _remark(one: Setting) -> str:
    """For what a value is recommended, or what it would be by itself."""
    if one.recommended:
        return f" <small>recommended {escaped(one.recommended)}</small>"
    told = one.differs and not one.chosen and one.default not in _NOTHING
    return f" <small>default {escaped(one.default)}</small>" if told else ""


def _settings(settings: Sequence[Setting]) -> str:
    def listed(some: Iterable[Setting]) -> str:
        rows = "".join(f"<dt>{escaped(one.name)}</dt><dd>{escaped(one.value)}{_remark(one)}</dd>" for one in some)
        return f'<dl class="facts">{rows}</dl>'

    differing = [one for one in settings if one.differs and not one.chosen]
    chosen = [one for one in settings if one.differs and one.chosen]
    rest = [one for one in settings if not one.differs]
    shown = listed(differing) if differing else '<p class="soft">None.</p>'
    if chosen:
        shown += f"<h2>Chosen for the model and the machine</h2>{listed(chosen)}"
    return f"{shown}<details><summary>The {len(rest)} others</summary>{listed(rest)}</details>"


def _commands(files: RunFiles, state: State) -> str:
    run = shlex.quote(str(files.run.path))
    talk, on = f"mlx-sft chat {run}", f"mlx-sft train --resume {run}"
    if state == "finished":
        wanted = [
            ("talk with it", talk),
            ("one answer, for a script", f'mlx-sft generate {run} --prompt "..."'),
            ("a folder that PyTorch and others open", f"mlx-sft export {run} --out my-model"),
            ("measure it on other rows", f"mlx-sft eval {run} --data held_out.jsonl"),
        ]
    else:
        wanted = [] if state == "running" else [("go on with it", on)]
        steps = files.run.checkpoint_steps()
        if steps:
            wanted.append(("try its newest checkpoint", f"{talk} --step last"))
        wanted.append(("write this page anew", f"mlx-sft report {run}"))
    return "".join(f"<li>{escaped(why)}<code>{escaped(command)}</code></li>" for why, command in wanted)


def _written(files: RunFiles) -> str:
    packages = found(files.environment, dict, "packages") or {}
    versions = [
        f"{name} {packages[name]}" for name in ("mlx-sft", "mlx", "mlx-lm") if isinstance(packages.get(name), str)
    ]
    device = found(files.environment, str, "device", "device_name") or found(
        files.environment, str, "device", "architecture"
    )
    about = " · ".join(filter(None, (*versions, device, found(files.environment, str, "platform"))))
    return f"As of {datetime.now():%Y-%m-%d %H:%M:%S}. The run: {about}."
