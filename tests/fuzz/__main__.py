"""`make fuzz`: broken inputs for every parser. Each must be refused in words, or be read as a plain reader would read it.

make fuzz                                        some ten thousand, a few minutes on two cores
make fuzz ARGS="--count 100000 --seed 3"         so many in all
make fuzz ARGS="--only config"                   one parser
make fuzz ARGS="--seed 3 --only config:17"       one input again
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.harness import set_environment
from tests.faults.trial import make_lab
from tests.fuzz.parser import Materials
from tests.fuzz.runner import Fuzzing, report


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--count", type=int, help="inputs in all, shared among the parsers (default: as many as each has)"
    )
    parser.add_argument("--only", metavar="PARSER[:NUMBER]", help="one parser, or one input")
    parser.add_argument("--seed", type=int, help="decides over every input (default: another each time)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--folder", type=Path, help="where to work; inputs that fail are kept there")
    return parser.parse_args(arguments)


def planned(options: argparse.Namespace) -> dict[str, list[int]]:
    """The numbers of the inputs of each parser."""
    from tests.fuzz.parsers import PARSERS

    name, _, number = (options.only or "").partition(":")
    chosen = {name: PARSERS[name]} if name else PARSERS
    if number:
        return {name: [int(number)]}
    usual = sum(parser.inputs for parser in chosen.values())
    counts = {
        name: parser.inputs if options.count is None else -(-parser.inputs * options.count // usual)
        for name, parser in chosen.items()
    }
    return {name: list(range(1, count + 1)) for name, count in counts.items()}


def main() -> int:
    options = parse()
    set_environment()
    seed = options.seed if options.seed is not None else time.time_ns() % 10**6
    folder = Path(options.folder or tempfile.mkdtemp(prefix="mlx-sft-fuzz-")).resolve()
    materials = Materials(make_lab(folder / "lab", ["lora"]).folder)
    numbers = planned(options)
    print(f"seed {seed}, {sum(map(len, numbers.values())):,} inputs", flush=True)
    sound = [
        report(Fuzzing(name, seed, materials, folder), options.workers, inputs) for name, inputs in numbers.items()
    ]
    if all(sound):
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if all(sound) else 1


if __name__ == "__main__":
    sys.exit(main())
