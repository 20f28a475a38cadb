"""What several machines gain, from a cost model that is checked against processes here: `python -m benchmarks.several_machines`.

Only what `local_ranks.py` finds is measured; the rest is computed by `step_cost.py`. docs/several-machines.md says what it comes to.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.plots import figure
from benchmarks.report import table
from benchmarks.rows import CHAT_LENGTHS, CHAT_SHARE, PAIR_LENGTHS, spread
from benchmarks.step_cost import CUDA, LINKS, MESSAGES, Chip, Job, Link, Steps, chip, dealt, seconds_of, sent
from mlx_sft import TrainConfig

PLOT = Path(__file__).parents[1] / "docs" / "performance" / "several-machines.svg"

MACHINES = (2, 4, 8, 64, 512)
TRIED = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
BATCHES = (8, 32, 256)
ROWS = 2048
PAIR_SHARE = 0.81

Batches = dict[int, Steps]
"""The steps for each batch size."""


def simulated(
    jobs: Sequence[Job], links: Sequence[Link], mac_chip: Chip, steps_of: Batches, machines: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """For each job, batch size, number of machines and link: how many times as fast as one machine it is.

    `overlapped` is what it would be if gradients were exchanged while the last micro-batch is computed; `cut_as_on_one` with micro-batches
    that are cut no finer, as with dropout and `--exact-reduce`.
    """
    for job, (batch, steps), number in product(jobs, steps_of.items(), machines):
        for cuda in dict.fromkeys(link.tree for link in links):
            machine = CUDA if cuda else mac_chip
            alone = steps.dealt(job, machine, [1.0])
            shared, whole = (cut.dealt(job, machine, [1.0] * number) for cut in (steps.shared_by(number), steps))
            for link in (link for link in links if link.tree == cuda):
                one = seconds_of(alone, job, machine, link, 1)
                times = {
                    "speed_up": seconds_of(shared, job, machine, link, number),
                    "overlapped": seconds_of(shared, job, machine, link, number, overlaps=True),
                    "cut_as_on_one": seconds_of(whole, job, machine, link, number),
                }
                about = {
                    "job": job.name,
                    "link": link.name,
                    "chip": machine.name,
                    "batch_size": batch,
                    "machines": number,
                }
                ratios = {name: round(one / seconds, 3) for name, seconds in times.items()}
                yield about | {"seconds_on_one": round(one / len(alone), 4)} | ratios


def uneven(job: Job, link: Link, machine: Chip, steps_of: Batches) -> Iterator[dict[str, Any]]:
    """Of two machines one is half as fast: speed-ups over the faster one alone."""
    speeds = [1.0, 0.5]
    for batch, steps in steps_of.items():
        one = seconds_of(steps.dealt(job, machine, [1.0]), job, machine, link, 1)
        found = {"job": job.name, "link": link.name, "batch_size": batch}
        for name, by_speed in (("evenly", False), ("by_speed", True)):
            of_both = steps.shared_by(2).dealt(job, machine, speeds, by_speed=by_speed)
            found[name] = round(one / seconds_of(of_both, job, machine, link, 2), 3)
        yield found


def worth_it(found: Sequence[dict[str, Any]]) -> int:
    """The most machines of which each does at least half of what it does alone."""
    return max([1, *(point["machines"] for point in found if point["speed_up"] >= point["machines"] / 2)])


# Beside the measurement


def validated(measured: dict[str, Any], cores: int) -> list[dict[str, Any]]:
    """Of each measured run what a step takes, beside what the model says that is given what one process takes for a token.

    Bytes stand beside the law of the ring; the first process' time on the processor beside its share of the tokens; seconds beside
    those of the process that is done last, or of all tokens on all cores where that is more, and of the sums. Processor time is what it is
    whatever else the machine does, seconds are not.
    """
    found = []
    for run in measured["runs"]:
        tokens, ranks, seconds = run["micro_batches"], run["ranks"], sum(step["seconds"] for step in run["steps"])
        processor, steps = sum(run["processor_seconds"]), len(tokens)
        if ranks == 1:
            a_token = {"seconds": seconds / sum(map(sum, tokens)), "processor": processor / sum(map(sum, tokens))}
            continue
        size, sums = 4 * run["trained"], [len(step) if run["exact"] else 1 for step in tokens]
        times = {one["bytes"]: one["least_seconds"] for one in measured["sums"][str(ranks)]}
        of_sum = float(np.interp(size, list(times), list(times.values())))
        predicted, own = 0.0, 0
        for step, number in zip(tokens, sums, strict=True):
            shares = np.bincount(dealt(step, [1.0] * ranks), step, ranks)
            own += int(shares[0])
            predicted += a_token["seconds"] * max(shares.max(), sum(step) / cores)
            predicted += number * of_sum + MESSAGES * times[min(times)]
        found.append(
            {
                "model": run["model"], "ranks": ranks, "exact": run["exact"], "adapter_bytes": size,
                "received_bytes": sum(run["received"]) / steps, "law_bytes": sent(size, ranks) * sum(sums) / steps,
                "processor_seconds": processor / steps, "predicted_processor_seconds": a_token["processor"] * own / steps,
                "seconds": seconds / steps, "predicted_seconds": predicted / steps,
            }
        )  # fmt: skip
    return found


# The command


def row_kinds(data: str | None, tokenizer: str | None) -> dict[str, Batches]:
    """The steps of the rows of a file, or else of chats and of short pairs as the benchmarks have them."""
    if data is None:
        of_each = {"chats": (CHAT_LENGTHS, CHAT_SHARE), "short pairs": (PAIR_LENGTHS, PAIR_SHARE)}
        lengths = {name: spread(quantiles, ROWS).astype(np.int32) - 1 for name, (quantiles, _) in of_each.items()}
        return {name: batches(lengths[name], share) for name, (_, share) in of_each.items()}
    from mlx_sft.data.prepare import prepare
    from mlx_sft.model.load import load_tokenizer

    config = TrainConfig(model=str(tokenizer), data=data, valid_fraction=0, allow_lost_rows=True, data_cache=False)
    examples = prepare(config, load_tokenizer(Path(str(tokenizer)))).train
    own = examples.needed_lengths
    return {Path(data).name: batches(own, float(examples.supervised_tokens.sum() / own.sum()))}


def batches(lengths: NDArray[np.int32], supervised: float) -> Batches:
    return {size: Steps(lengths, supervised, size) for size in BATCHES}


def tables(found: Sequence[dict[str, Any]]) -> str:
    """In Markdown: a row a link and batch size, a column a number of machines; in brackets, of micro-batches that are cut no finer."""
    lines: list[str] = []
    for rows, job in dict.fromkeys((point["rows"], point["job"]) for point in found):
        of_job = [point for point in found if (point["rows"], point["job"]) == (rows, job)]
        cells = []
        for link, batch in dict.fromkeys((point["link"], point["batch_size"]) for point in of_job):
            own = [point for point in of_job if (point["link"], point["batch_size"]) == (link, batch)]
            ups = [
                f"{point['speed_up']:.2g} ({point['cut_as_on_one']:.2g})"
                for point in own
                if point["machines"] in MACHINES
            ]
            cells.append([link, str(batch), f"{own[0]['seconds_on_one']:.2f}", *ups, str(worth_it(own))])
        lines += ["", f"**{job}, {rows}** (in brackets: micro-batches cut no finer than on one)", ""]
        lines += table(["", "rows a step", "s on one", *map(str, MACHINES), "half used up to"], cells)
    return "\n".join(lines)


def draw(jobs: Sequence[Job], mac_chip: Chip, kinds: dict[str, Batches]) -> Path:
    """A panel a job, a line a link, 32 chats a step; and a panel with a line for other steps."""
    nothing = Link("no exchange", math.inf, 0.0, "what is dealt out alone")
    with figure(PLOT, (8, 6.4), 2, 2) as panels:
        *of_jobs, of_steps = panels.flat
        for axes, job in zip(of_jobs, jobs, strict=True):
            for link in (*LINKS, nothing):
                points = simulated([job], [link], mac_chip, {32: kinds["chats"][32]}, (1, *TRIED))
                fill(axes, points, link.name, ":" if link is nothing else "-")
            axes.set_title(f"{job.name}, 32 chats a step", fontsize=9)
        for rows, batch in (("chats", 256), ("chats", 32), ("chats", 8), ("short pairs", 32)):
            points = list(simulated(jobs[1:2], LINKS[1:2], mac_chip, {batch: kinds[rows][batch]}, (1, *TRIED)))
            fill(of_steps, points, f"{batch} {rows} a step", "-")
        fill(of_steps, points, "the same, cut no finer than on one", "--", "cut_as_on_one")
        of_steps.set_title(f"{jobs[1].name}, {LINKS[1].name}", fontsize=9)
        for axes in panels.flat:
            axes.set(xscale="log", yscale="log", xlim=(1, 512), ylim=(0.1, 100))
            axes.set(xlabel="machines", ylabel="times the speed of one")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.legend(frameon=False, fontsize=7)
    return PLOT


def fill(axes: Any, found: Iterable[dict[str, Any]], label: str, form: str, name: str = "speed_up") -> None:
    points = [(point["machines"], point[name]) for point in found]
    axes.plot(*zip(*points, strict=True), form, label=label, linewidth=1.2)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.several_machines", description=__doc__.partition(":")[0]
    )
    add = parser.add_argument
    add("--chip", default="M4 Max", help="of the Macs [%(default)s]")
    add("--tokens-per-second", type=float, help="of one of them with Qwen3-0.6B and LoRA, where you measured it")
    yours = {"nargs": 2, "type": float, "action": "append", "default": [], "metavar": ("GBIT", "MILLISECONDS")}
    add("--link", **yours, help="yours: speed, and latency of a hop")
    add("--data", help="rows of yours, with --tokenizer; else chats and short pairs, as the benchmarks have them")
    add("--tokenizer", help="a folder with tokenizer and chat template")
    add("--write", action="store_true", help="measure processes here too, write record and plot")
    arguments = parser.parse_args()
    if arguments.data and not arguments.tokenizer:
        parser.error("--data needs --tokenizer")
    if arguments.write and (arguments.data or arguments.link or arguments.tokens_per_second):
        parser.error("--write is for the benchmark's own rows, links and speeds")
    return arguments


def main() -> None:
    arguments = parse()
    began = time.perf_counter()
    kinds = row_kinds(arguments.data, arguments.tokenizer)
    jobs = [Job.of("0.6B", rank=8), Job.of("8B", rank=8), Job.of("0.6B", method="full")]
    machine = chip(arguments.chip)
    if arguments.tokens_per_second:
        steps = next(iter(kinds.values()))[32]
        reached = arguments.tokens_per_second * steps.operations(jobs[0]) / int(steps.lengths.sum())
        machine = Chip(machine.name, reached, machine.bandwidth, "given")
    yours = [Link(f"{gbit:g} Gbit/s", gbit * 1e9 / 8, ms / 1e3, "given") for gbit, ms in arguments.link]
    links = [*yours, *LINKS]
    found, of_uneven = list[dict[str, Any]](), list[dict[str, Any]]()
    for rows, steps_of in kinds.items():
        found += [{"rows": rows, **point} for point in simulated(jobs, links, machine, steps_of, TRIED)]
        for job in jobs[:2]:
            of_uneven += [{"rows": rows, **point} for point in uneven(job, LINKS[1], machine, steps_of)]
    print(tables(found))
    for one in of_uneven:
        gained = f"{one['evenly']} dealt evenly, {one['by_speed']} by speed"
        print(f"{one['job']}, {one['batch_size']} {one['rows']} a step, with a Mac that is half as fast: {gained}")
    if not arguments.write:
        return
    from benchmarks.local_ranks import measured
    from benchmarks.run import write

    record: dict[str, Any] = {
        "chips": [asdict(machine), asdict(CUDA)], "links": [asdict(link) for link in links],
        "trained": {job.name: job.footprint.trainable for job in jobs},
        "steps": {rows: {size: steps.about for size, steps in of.items()} for rows, of in kinds.items()},
        "simulated": [point for point in found if point["machines"] in MACHINES], "uneven": of_uneven, "measured": measured(),
    }  # fmt: skip
    record["validated"] = validated(record["measured"], os.cpu_count() or 1)
    draw(jobs, machine, kinds)
    print(write("several-machines", False, record, time.perf_counter() - began), file=sys.stderr)


if __name__ == "__main__":
    main()
