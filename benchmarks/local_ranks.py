"""Several processes of one run on this machine, over MLX's ring on 127.0.0.1: what a step sends, what a sum takes, what a step takes.

The processes are started as `mlx.launch` starts them, each with one thread. Bytes are those that the first process's own connections have
received (Linux counts them for each connection), so that nothing else on the machine is counted. Knows nothing of the cost model.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import yaml

from benchmarks.machine import fast_blas
from benchmarks.point import TINY_TOKENIZER
from benchmarks.process import ROOT, Broken, end
from benchmarks.rows import pairs
from benchmarks.workload import make_checkpoint, shape, write_rows
from mlx_sft import TrainConfig, train
from mlx_sft.data.batches import cut_step
from mlx_sft.launch import environments, own_rank
from mlx_sft.training.callbacks import Callback

MODELS: dict[str, dict[str, Any]] = {
    "small": {"num_hidden_layers": 2, "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2},
    "middle": {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4},
}  # fmt: skip
"""Qwen3-0.6B's shape, smaller; with 8,192 tokens."""

SIZES = tuple(1024 * 4**power for power in range(10))
"""Bytes of a sum: from 1 KB to 256 MB."""

STEPS, BATCH, ROUNDS = 4, 8, 2
SAME = 1e-5
"""Losses may differ by no more, relatively: sums of float32 in another order."""
LONGEST = 900.0
_RECEIVED = 128
"""Where Linux's `struct tcp_info` says how many bytes a connection has received: eight of them (<linux/tcp.h>)."""


# In a process


class Watch(Callback):
    """What each step received, what it took of the processor, and how it was cut."""

    name = "watch"

    def __init__(self) -> None:
        super().__init__()
        self.received: list[int] = []
        self.processor: list[float] = []
        self.steps: list[dict[str, Any]] = []
        self.micro_batches: list[list[int]] = []
        self.trained = 0

    def on_start(self, run: Any, record: dict[str, Any]) -> None:
        self.trained = sum(array.size for array in run.parameters.values())
        settings = run.settings
        for step in run.plan.steps():
            cut = cut_step(step.rows, run.data.train, settings.micro_batch_tokens, settings.layout)
            self.micro_batches.append([one.tokens for one in cut])

    def on_step(self, run: Any, record: dict[str, Any]) -> None:
        self.received.append(received_bytes())
        self.processor.append(time.process_time())
        self.steps.append({name: record[name] for name in ("loss", "seconds")})


def received_bytes() -> int:
    """What all TCP connections of this process have received so far, without headers."""
    total = 0
    for entry in Path("/proc/self/fd").iterdir():
        if not (entry.is_symlink() and str(entry.readlink()).startswith("socket:")):
            continue
        with closing(socket.socket(fileno=os.dup(int(entry.name)))) as connection:
            if connection.type == socket.SOCK_STREAM and connection.family == socket.AF_INET:
                facts = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("=Q", facts, _RECEIVED)[0]
    return total


def trained_steps(config: Path) -> dict[str, Any]:
    """Train as the first process, or alone."""
    watch = Watch()
    train(TrainConfig.resolve(config), callbacks=[watch])
    return {
        "trained": watch.trained,
        "micro_batches": watch.micro_batches[1:],
        "steps": watch.steps[1:],  # the first warms up
        "received": differences(watch.received),
        "processor_seconds": differences(watch.processor),
    }


def differences(counts: list[Any]) -> list[Any]:
    """What each step added."""
    return [after - before for before, after in pairwise(counts)]


def timed_sums() -> list[dict[str, float]]:
    """Seconds of an `all_sum` of each size: the median of several, and the least."""
    group = mx.distributed.init(strict=True)
    found = []
    for size in SIZES:
        array = mx.ones(size // 4)
        times = []
        for _ in range(4 + min(200, 2**24 // size)):
            mx.eval(array, mx.distributed.all_sum(mx.ones(1), group=group))  # so that all begin together
            started = time.perf_counter()
            mx.eval(mx.distributed.all_sum(array, group=group))
            times.append(time.perf_counter() - started)
        found.append({"bytes": size, "seconds": statistics.median(times[2:]), "least_seconds": min(times[2:])})
    return found


def main() -> None:
    what, config, result = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    if what == "sums":
        found: Any = timed_sums()
    elif not own_rank():
        found = trained_steps(config)
    else:
        from mlx_sft.cli import main as mlx_sft

        mlx_sft(["train", "--config", str(config)])
        return
    if not own_rank():
        result.write_text(json.dumps(found), encoding="utf-8")


# Outside


def together(ranks: int, what: str, config: Path, folder: Path) -> Any:
    """What the first of so many processes found.

    Raises:
        Broken: Where one of them failed, or took too long.
    """
    result = folder / "result.json"
    blas, threads = fast_blas(), {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    common = os.environ | threads | ({"LD_PRELOAD": blas} if blas else {})
    command = [sys.executable, "-m", "benchmarks.local_ranks", what, str(config), str(result)]
    with ExitStack() as held:
        said = held.enter_context(tempfile.TemporaryFile())
        children = []
        for own in environments(ranks, folder) if ranks > 1 else [{}]:
            child = subprocess.Popen(
                command, cwd=ROOT, env=common | own, stdout=said, stderr=said, start_new_session=True
            )
            held.callback(end, child)
            children.append(child)
        deadline = time.monotonic() + LONGEST
        try:
            codes = [child.wait(max(0.0, deadline - time.monotonic())) for child in children]
        except subprocess.TimeoutExpired as error:
            raise Broken(f"{ranks} processes took more than {LONGEST:.0f} s") from error
        if any(codes):
            said.seek(0)
            raise Broken(said.read().decode(errors="replace")[-4000:])
    return json.loads(result.read_text(encoding="utf-8"))


def measured(most: int = 3) -> dict[str, Any]:
    """Runs of each model with 1, 2, ... processes, plain and exact, in turns; and sums among 2, 3, ...

    Of each step the least seconds of all rounds count: whatever else the machine does makes it take longer, never shorter.

    Raises:
        Broken: Where the losses of several are not those of one.
    """
    found = []
    kinds = [(1, False), *((ranks, exact) for ranks in range(2, most + 1) for exact in (False, True))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_rows(folder / "rows.jsonl", pairs(STEPS * BATCH, 8192, seed=0))
        for model, changes in MODELS.items():
            checkpoint = make_checkpoint(folder / model, TINY_TOKENIZER, shape(1, 8192) | changes)
            rounds: dict[tuple[int, bool], list[dict[str, Any]]] = {kind: [] for kind in kinds}
            for number in range(ROUNDS):
                for ranks, exact in kinds:
                    out = folder / f"{model}-{ranks}-{exact}-{number}"
                    config = folder / "config.yaml"
                    config.write_text(yaml.safe_dump(settings(checkpoint, data, out, exact=exact)), encoding="utf-8")
                    load = os.getloadavg()[0]  # what others did to the machine just before
                    run = {"model": model, "ranks": ranks, "exact": exact, "load_before": round(load, 2)}
                    run |= together(ranks, "train", config, folder)
                    rounds[ranks, exact].append(run)
                    agree(rounds[1, False][0], run)
                    seconds = sum(step["seconds"] for step in run["steps"])
                    print(f"{model}, {ranks}{' exact' if exact else ''}: {seconds:.1f} s", file=sys.stderr, flush=True)
            found += [quickest(runs) for runs in rounds.values()]
        sums = {str(ranks): together(ranks, "sums", folder, folder) for ranks in range(2, most + 1)}
    return {"runs": found, "sums": sums}


def quickest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The first of several rounds, each step with the least that it took in any."""
    steps = [min(of, key=lambda step: step["seconds"]) for of in zip(*(run["steps"] for run in runs), strict=True)]
    processor = [min(of) for of in zip(*(run["processor_seconds"] for run in runs), strict=True)]
    return runs[0] | {"steps": steps, "processor_seconds": processor}


def settings(checkpoint: Path, data: Path, out: Path, *, exact: bool) -> dict[str, Any]:
    return {
        "model": str(checkpoint), "data": str(data), "out": str(out), "rank": 8, "batch_size": BATCH, "max_steps": STEPS,
        "micro_batch_tokens": 256, "grad_checkpoint": "off", "dtype": "float32", "lr": 1e-3, "valid_fraction": 0, "quiet": True,
        "data_cache": False, "exact_reduce": exact,
    }  # fmt: skip


def agree(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Two runs have the same losses; to the bit where one is exact."""
    most = 0.0 if other["exact"] else SAME
    for mine, theirs in zip(one["steps"], other["steps"], strict=True):
        if abs(mine["loss"] - theirs["loss"]) > most * abs(mine["loss"]):
            raise Broken(f"{other['ranks']} processes have the loss {theirs['loss']}, one {mine['loss']}")


if __name__ == "__main__":
    main()
