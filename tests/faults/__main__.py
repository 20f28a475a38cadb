"""`make faults`: runs that are killed, starved, damaged and misled, each of which must end as if nothing had been.

make faults                                     a hundred kills and some of every other kind: about ten minutes on two cores
make faults ARGS="--kills 1000 --seed 7"         so many, of this seed
make faults ARGS="--each 5"                     five of each kind
make faults ARGS="--seed 7 --only kill:17"      one trial again
make soak                                       3,000 steps with many resumes, and what they take of the machine
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.harness import report, set_environment, workers
from tests.faults.kinds import KINDS
from tests.faults.soak import STEPS, soak
from tests.faults.trial import make_lab


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, kind in KINDS.items():
        names = [f"--{name}", *(["--kills"] if name == "kill" else [])]
        parser.add_argument(*names, type=int, metavar="N", help=f"{kind.about} (default {kind.trials})")
    parser.add_argument("--each", type=int, metavar="N", help="so many of every kind that is not given a number")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one trial alone, or all of one KIND")
    parser.add_argument("--seed", type=int, default=None, help="decides over every choice (default: another each time)")
    parser.add_argument("--workers", type=int, default=2, help="trials at a time (default 2)")
    parser.add_argument("--folder", type=Path, help="where to work; what does not survive is kept there")
    parser.add_argument("--soak", action="store_true", help="the long run instead")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the long run (default {STEPS})")
    options = parser.parse_args(arguments)
    if options.folder and options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"{options.folder} already holds something")
    return options


def planned(options: argparse.Namespace) -> dict[str, list[int]]:
    """The numbers of the trials of each kind."""
    if options.only and ":" in options.only:
        kind, _, number = options.only.partition(":")
        return {kind: [int(number)]}
    planned = {}
    for name, kind in KINDS.items():
        given = getattr(options, name.replace("-", "_"))
        trials = next(number for number in (given, options.each, kind.trials) if number is not None)
        if trials and options.only in (None, name):
            planned[name] = list(range(1, trials + 1))
    return planned


def main() -> int:
    options = parse()
    set_environment()
    seed = options.seed if options.seed is not None else time.time_ns() % 10**6
    folder = Path(options.folder or tempfile.mkdtemp(prefix="mlx-sft-faults-")).resolve()
    if options.soak:
        survived = soak(folder / "soak", options.steps)
    else:
        print(f"seed {seed}", flush=True)
        lab = make_lab(folder / "lab")
        with workers(options.workers) as pool:
            survived = all([report(lab, kind, numbers, seed, pool) for kind, numbers in planned(options).items()])  # noqa: C419 (each)
    if survived:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if survived else 1


if __name__ == "__main__":
    sys.exit(main())
