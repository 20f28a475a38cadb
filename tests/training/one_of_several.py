"""One of several processes that make several runs one after another, as `mlx.launch` would start them for each: Python starts once.

    python -m tests.training.one_of_several '[["train", "--data", ...], ["load", "FOLDER"], ...]'

After what each says, a line on stderr gives its exit code. `load` gives bytes instead: of the part of a base that this process has loaded,
and the most that it took to load it.
"""

from __future__ import annotations

import json
import sys

import mlx.core as mx

from mlx_sft.cli import main
from mlx_sft.model.load import load_model

ENDED = "=== "
"""How the line begins that says what came of a run."""


def _made(command: list[str]) -> object:
    if command[0] != "load":
        return main.main(command, standalone_mode=False) or 0
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loaded = load_model(command[1], group=mx.distributed.init(strict=True))
    taken = mx.get_active_memory() - before, mx.get_peak_memory() - before
    del loaded
    return taken


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        sys.stderr.write(f"{ENDED}{json.dumps(_made(one))}\n")
