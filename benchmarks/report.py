"""Results → the tables and plots of docs/performance.md: `python -m benchmarks.report`.

Takes the newest result of each case, of the whole run where there is one, else of the quick one; writes between the two markers and
nowhere else. Knows nothing of measuring.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- results: begin (written by `make bench-report`) -->", "<!-- results: end -->"
ORDER = (
    "equal-work", "pairs", "pairs-whole", "chats", "chats-whole", "sorted", "documents",
    "lengths", "vocabulary", "ranks", "rows", "longest", "first-step", "merge",
)  # fmt: skip
METRICS = (
    ("real tokens a second", "tokens_per_second", "{:,.1f}", 1.0),
    ("supervised tokens a second", "supervised_tokens_per_second", "{:,.1f}", 1.0),
    ("peak memory above the weights, GB", "peak_bytes", "{:,.2f}", 1e9),
    ("peak of the whole process, GB", "peak_resident_bytes", "{:,.2f}", 1e9),
    ("padding, % of what was computed", "padding_share", "{:.1f}", 0.01),
    ("seconds to the end of the first step", "seconds_to_first_step", "{:,.1f}", 1.0),
    ("supervised tokens", "supervised_tokens", "{:,.0f}", 1.0),
    ("mean loss", "loss", "{:.4f}", 1.0),
)


def newest(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Of each case, its newest result in a folder; whole runs go before quick ones."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if "case" not in result:
            continue
        before = found.get(result["case"])
        if before is None or rank(result) >= rank(before[1]):
            found[result["case"]] = (file, result)
    return found


def rank(result: dict[str, Any]) -> tuple[bool, str]:
    return not result["quick"], result["environment"]["time"]


# Text


def section(result: dict[str, Any], plot: str = "", source: str = "") -> str:
    """One case in Markdown."""
    writers = {"longest": longest_lines, "first-step": first_step_lines, "merge": merge_lines}
    title = (
        result.get("title")
        or {
            "longest": "The longest row within so much memory",
            "first-step": "To the first step",
            "merge": "A merge",
        }[result["case"]]
    )
    if result["case"] in writers:
        body = writers[result["case"]](result)
    elif result["axis"]:
        body = sweep_lines(result)
    else:
        body = [line for point in result["points"] for line in point_lines(point)]
    picture = [f"![{title}]({plot})", ""] if plot else []
    below = [f"[The record]({source}){' of the quick run' if result['quick'] else ''}; {machine(result)}.", ""]
    return "\n".join([f"### {title}", "", *picture, *body, "", *(below if source else [])])


def machine(result: dict[str, Any]) -> str:
    about = result["environment"]
    memory = f"{about['memory_bytes'] / 2**30:.0f} GB" if "memory_bytes" in about else ""
    return f"{about['time'][:10]}, {about['cores']} cores, {memory}, {about['platform'].partition('-with')[0]}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    line = "| " + " | ".join(header) + " |"
    return [line, "|---|" + "--:|" * (len(header) - 1), *("| " + " | ".join(row) + " |" for row in rows)]


def point_lines(point: dict[str, Any]) -> list[str]:
    """A point's metrics, a column a trainer, then ratios and limit."""
    summary = point["summary"]
    trainers = summary["trainers"]
    rows = [[title, *(cell(run, key, form, unit) for run in trainers.values())] for title, key, form, unit in METRICS]
    task = point["task"]
    shown = (
        f"**{point['point']['label']}**: {task['steps'] * task['rows_per_step']} rows, {task['rows_per_step']} a step"
    )
    rounds = len(point["rounds"])
    lines = [f"{shown}, rank {task['rank']}, {task['dtype']}; {medians_of(rounds)}.", ""]
    lines += table(["", *(plots.NAMES[name] for name in trainers)], rows)
    remarks = [
        *ratio_remarks(summary),
        *limit_remarks(summary),
        *prediction_remarks(summary),
        *other_remarks(point),
    ]
    return [*lines, "", *remarks, ""]


def cell(run: dict[str, Any], key: str, form: str, unit: float) -> str:
    if "failed" in run:
        reached = run["highest_bytes"] / 1e9
        return f"over {reached:,.1f}" if key == "peak_resident_bytes" else run["failed"]
    value = run.get(key)
    return "–" if value is None else form.format(value / unit)


def medians_of(rounds: int) -> str:
    return "one round" if rounds == 1 else f"medians of {rounds} rounds"


def ratio_remarks(summary: dict[str, Any]) -> list[str]:
    lines = []
    for peer, ratio in summary["ratios"].items():
        speed, memory = ratio["tokens_per_second"], ratio["peak_bytes"]
        lines.append(
            f"- {speed['median']:.2f} times {plots.NAMES[peer]}'s speed ({in_pairs(speed['pairs'])}) and "
            f"{memory['median']:.3f} times its memory ({in_pairs(memory['pairs'], 3)})"
        )
    return lines


def in_pairs(values: Sequence[float], digits: int = 2) -> str:
    return "pair by pair " + ", ".join(f"{value:.{digits}f}" for value in values)


def limit_remarks(summary: dict[str, Any]) -> list[str]:
    limit = summary["limit"]
    if not limit:
        return []
    parts = ", ".join(f"{part} {seconds:,.1f} s" for part, seconds in limit["parts"].items())
    share = limit["share"]
    return [
        f"- the limit: {limit['seconds']:,.1f} s for {limit['flops'] / 1e12:,.2f} TFLOP at "
        f"{limit['flops_per_second'] / 1e9:,.0f} GFLOP/s ({parts}); our share of it {100 * share['median']:.0f} % "
        f"({in_pairs([100 * value for value in share['pairs']], 0)})"
    ]


def prediction_remarks(summary: dict[str, Any]) -> list[str]:
    ratio = predicted_share(summary)
    return [f"- predicted peak, weights included: {ratio:.2f} times the measured one"] if ratio else []


def predicted_share(summary: dict[str, Any]) -> float | None:
    """Our predicted peak beside the measured one, both with the weights; None where nothing was measured."""
    ours = summary["trainers"].get("ours", {})
    predicted = ours.get("notes", {}).get("predicted_bytes")
    if predicted is None:
        return None
    weights = ours["weight_bytes"]
    return float((weights + predicted) / (weights + ours["peak_bytes"]))


def other_remarks(point: dict[str, Any]) -> list[str]:
    """Rounds that failed, batches that a peer was given, losses of the steps, and who was not there."""
    lines = []
    for number, one in enumerate(point["rounds"][1:], 2):
        failed = [f"{plots.NAMES[name]} {run['failed']}" for name, run in one.items() if "failed" in run]
        lines += [f"- round {number}: {', '.join(failed)}"] if failed else []
    for name, run in point["summary"]["trainers"].items():
        accumulation = run.get("notes", {}).get("gradient_accumulation", 1)
        if accumulation > 1:
            batch = point["task"]["rows_per_step"] // accumulation
            lines.append(
                f"- {plots.NAMES[name]} with {batch} rows at once and {accumulation} batches accumulated a step"
            )
    for attempt in point["did_not_fit"]:
        rows, reached = attempt["rows_at_once"], attempt["highest_bytes"] / 1e9
        lines.append(
            f"- {plots.NAMES[attempt['trainer']]} with {rows} rows at once: out of memory at {reached:,.1f} GB"
        )
    if point["point"]["in_order"]:
        for name, run in point["rounds"][0].items():
            if "step_losses" in run:
                losses = ", ".join(f"{loss:.5f}" for loss in run["step_losses"])
                lines.append(f"- losses of the steps, {plots.NAMES[name]}: {losses}")
    lines += [f"- {plots.NAMES[name]} was not measured: {why}" for name, why in point["not_here"].items()]
    return lines


def sweep_lines(result: dict[str, Any]) -> list[str]:
    """A row a point; seconds a step and GB above the weights of each trainer, and our share of the limit."""
    names = list(dict.fromkeys(name for point in result["points"] for name in point["summary"]["trainers"]))
    header = [result["axis"]]
    header += [f"{plots.NAMES[name]}, {what}" for what in ("s a step", "GB") for name in names]
    rows = []
    for point in result["points"]:
        trainers, limit = point["summary"]["trainers"], point["summary"]["limit"]
        runs = [trainers.get(name, {}) for name in names]
        row = [point["point"]["label"]]
        row += [cell(run, "seconds", "{:,.2f}", point["task"]["steps"]) for run in runs]
        row += [cell(run, "peak_bytes", "{:,.2f}", 1e9) for run in runs]
        predicted = predicted_share(point["summary"])
        row += [f"{100 * limit['share']['median']:.0f} %" if limit else "–", f"{predicted:.2f}" if predicted else "–"]
        rows.append(row)
    absent = {name: why for point in result["points"] for name, why in point["not_here"].items()}
    remarks = [f"- {plots.NAMES[name]} was not measured: {why}" for name, why in absent.items()]
    rounds = medians_of(min(len(point["rounds"]) for point in result["points"]))
    return [
        f"{rounds[0].upper()}{rounds[1:]}.",
        "",
        *table([*header, "our share of the limit", "predicted / measured peak"], rows),
        "",
        *remarks,
    ]


def longest_lines(result: dict[str, Any]) -> list[str]:
    rows = [
        (plots.NAMES[name], f"{run['tokens']:,}", f"{run['peak_bytes'] / 1e9:.2f}" if run["peak_bytes"] else "–")
        for name, found in result["trainers"].items()
        for run in sorted(found["tried"], key=lambda run: run["tokens"])
    ]
    budget, layers = result["budget_bytes"] / 1e9, result["layers"]
    said = (
        f"{layers} layers, layers recomputed. Within {budget:g} GB above the weights mlx-lm takes a row of "
        f"{result['trainers']['mlx-lm']['tokens']:,} tokens; ours was tried at multiples of that, and takes "
        f"{result['ratio']:.0f} times as many."
    )
    return [said, "", *table(["", "tokens of the row", "peak above the weights, GB"], rows)]


def first_step_lines(result: dict[str, Any]) -> list[str]:
    rows = [(name, f"{seconds:,.2f}") for name, seconds in result["seconds_above_weights"].items()]
    said = f"{result['rows']:,} rows; the weights alone ({result['layers']} layers) take {result['weights_seconds']:.2f} s."
    return [said, "", *table(["", "seconds above the weights"], rows)]


def merge_lines(result: dict[str, Any]) -> list[str]:
    copied, merged = result["copy_seconds"], result["merge_seconds"]
    said = (
        f"A checkpoint of {result['checkpoint_bytes'] / 1e9:.2f} GB ({result['layers']} layers, float32), whose largest tensor has "
        f"{result['largest_tensor_bytes'] / 1e9:.2f} GB, merged with an adapter of rank 16 on every linear layer, until the disk has it; "
        f"{medians_of(len(result['rounds']))}."
    )
    rows = [
        ("copied byte by byte", f"{copied:.1f}", ""),
        ("merged", f"{merged:.1f}", f"{result['above_bytes'] / 1e9:.2f}"),
    ]
    speed = f"The merge has {copied / merged:.0%} of the speed of the copy."
    return [said, "", *table(["", "seconds", "memory above the process before it, GB"], rows), "", speed]


# The page


def between_markers(page: str, text: str) -> str:
    """The page with the text between its two markers exchanged."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"error: the page has no `{BEGIN}` with an `{END}` behind it")
    return f"{before}{BEGIN}\n\n{text.strip()}\n\n{END}{after}"


def main() -> None:
    found = newest(HERE / "results")
    sections = []
    for name in ORDER:
        if name not in found:
            continue
        file, result = found[name]
        plot = ""
        if result.get("axis"):
            plot = plots.draw(result, PAGE.parent / "performance" / f"{name}.svg").relative_to(PAGE.parent).as_posix()
        sections.append(section(result, plot, f"../benchmarks/results/{file.name}"))
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(between_markers(page, "\n".join(sections)), encoding="utf-8")
    print(f"written to {PAGE}", file=sys.stderr)


if __name__ == "__main__":
    main()
