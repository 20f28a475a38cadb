"""`python -m benchmarks.run`: the cases, one after another; each one's JSON is written to benchmarks/results/ when it is done.

Measures nothing by itself: `point`, `longest` and `first_step` do.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.cases import Case, Point, measured_cases
from benchmarks.first_step import measure_first_step
from benchmarks.longest import measure_longest
from benchmarks.machine import code_digest, environment, fast_blas
from benchmarks.merging import measure_merge
from benchmarks.point import WORK, Settings, measure_point
from benchmarks.process import Broken
from benchmarks.summary import summarize

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("mlx", "mlx-lm", "mlx-sft", "numpy", "torch", "transformers", "peft", "trl", "unsloth-zoo")
SPECIAL = ("first-step", "longest", "merge")
"""Cases that are no list of points."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description="Our trainer beside its peers.")
    parser.add_argument(
        "--quick", action="store_true", help="6 layers, few and short rows: under ten minutes on two cores"
    )
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="only these")
    parser.add_argument("--trainers", nargs="+", metavar="NAME", help="only these: ours mlx-lm trl unsloth")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers in every case")
    parser.add_argument("--up-to", type=float, help="leave out the points of a sweep beyond this")
    parser.add_argument("--repeat", type=int, help="rounds of each point (default 3, the quick run's sweeps 1)")
    parser.add_argument(
        "--timeout", type=float, default=3600, help="seconds after which a run is given up (default 3600)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the weights (default float32 on the CPU)")
    parser.add_argument(
        "--memory", type=float, default=4.0, help="of the case longest, in GB above the weights (default 4)"
    )
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    return parser.parse_args(arguments)


def chosen_cases(arguments: argparse.Namespace) -> list[Case]:
    """The cases as asked for, in their order."""
    cases = measured_cases(arguments.quick)
    known = {case.name for case in cases} | set(SPECIAL)
    unknown = set(arguments.cases or ()) - known
    if unknown:
        raise SystemExit(
            f"error: no such case: {', '.join(sorted(unknown))}\nhint: there are {', '.join(sorted(known))}"
        )
    if arguments.cases:
        cases = [case for case in cases if case.name in arguments.cases]
    if arguments.trainers:
        cases = [replace(case, trainers=tuple(n for n in case.trainers if n in arguments.trainers)) for case in cases]
    if arguments.up_to:
        cases = [
            replace(case, points=tuple(p for p in case.points if not case.axis or p.x <= arguments.up_to))
            for case in cases
        ]
    if arguments.layers:
        cases = [replace(case, points=cut(case, arguments.layers)) for case in cases]
    return cases


def cut(case: Case, layers: int) -> tuple[Point, ...]:
    """A case's points on fewer layers; of those that differ in nothing else the first is kept."""
    points: dict[str, Point] = {}
    for point in case.points:
        label = re.sub(r"^\d+ layers", f"{layers} layers", point.label)
        points.setdefault(label, replace(point, layers=layers, label=label))
    return tuple(points.values())


def measure_case(case: Case, settings: Settings) -> dict[str, Any]:
    settings = replace(settings, repeat=settings.repeat or case.rounds)
    points = []
    for point in case.points:
        measured = measure_point(point, case.trainers, settings, halve=case.halve, limited=case.limited)
        points.append(measured | {"summary": summarize(measured["rounds"])})
    return {"title": case.title, "axis": case.axis, "points": points}


def measure_special(name: str, arguments: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    layers = arguments.layers or (6 if arguments.quick else 28)
    if name == "first-step":
        repeat = settings.repeat or (1 if arguments.quick else 3)
        return measure_first_step(2000 if arguments.quick else 10_000, layers, replace(settings, repeat=repeat))
    if name == "merge":
        return measure_merge(layers, replace(settings, repeat=settings.repeat or 3))
    return measure_longest(arguments.memory * 1e9, layers, 1408, 0.04, settings)


def write(name: str, quick: bool, measured: dict[str, Any], seconds: float) -> Path:
    about = environment(PACKAGES) | {"LD_PRELOAD": fast_blas(), "code": code_digest()}
    stamp = about["time"].replace(":", "").partition("+")[0]
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{name}-{'quick' if quick else 'full'}-{stamp}.json"
    result = {"case": name, "quick": quick, "seconds": round(seconds, 1), "environment": about, **measured}
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return file


def main() -> None:
    arguments = parse()
    cases = chosen_cases(arguments)
    special = [name for name in SPECIAL if not arguments.cases or name in arguments.cases]
    if arguments.quick and not arguments.cases:
        special = [name for name in special if name == "first-step"]
    if arguments.list:
        print("\n".join([f"{case.name:12}{case.title}" for case in cases] + special))
        return
    WORK.mkdir(exist_ok=True)
    settings = Settings(
        arguments.repeat or 0, arguments.timeout, arguments.dtype or default_dtype(), quick=arguments.quick
    )
    broken = []
    for name in [case.name for case in cases] + special:
        print(name, file=sys.stderr, flush=True)
        started, code = time.perf_counter(), code_digest()
        case = next((case for case in cases if case.name == name), None)
        try:
            measured = measure_case(case, settings) if case else measure_special(name, arguments, settings)
            if code_digest() != code:
                raise Broken("mlx_sft was edited while it was measured")
        except Broken as error:
            print(f"{error}\nerror: no result of {name}", file=sys.stderr, flush=True)
            broken.append(name)
            continue
        file = write(name, arguments.quick, measured, time.perf_counter() - started)
        print(report.section(json.loads(file.read_text(encoding="utf-8"))), flush=True)
        print(f"  written to {file}", file=sys.stderr, flush=True)
    if broken:
        raise SystemExit(f"error: no result of {', '.join(broken)}")


def default_dtype() -> str:
    import mlx.core as mx

    return "bfloat16" if mx.default_device() == mx.Device(mx.gpu) else "float32"


if __name__ == "__main__":
    main()
