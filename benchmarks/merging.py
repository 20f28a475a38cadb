"""What a merge takes: memory above the process before it, and time, beside copying the same bytes to the same disk.

`python -m benchmarks.merging MODEL ADAPTER FOLDER RESULT.json` merges once in this process.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import Point
from benchmarks.machine import peak_resident_bytes, reset_peak, resident_bytes
from benchmarks.point import WORK, Settings, environment_of, prepare
from benchmarks.process import Broken, run_watched

BLOCK = 2**24


def measure_merge(layers: int, settings: Settings) -> dict[str, Any]:
    """In turns: the checkpoint copied and synced, and merged with an adapter on every linear layer."""
    rounds = []
    with tempfile.TemporaryDirectory(dir=WORK) as name:
        folder = Path(name)
        task = prepare(Point("1 row", 1, "pairs", 1, 1, layers), folder, "float32").task
        file = Path(task.model) / "model.safetensors"
        for number in range(settings.repeat):
            one = {"copy_seconds": copy(file, folder / "copy")} | merge_once(task, folder, settings)
            print(f"  round {number + 1}: {one}", file=sys.stderr, flush=True)
            rounds.append(one)
        size, largest = file.stat().st_size, largest_tensor(file)
    medians = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    return {"layers": layers, "checkpoint_bytes": size, "largest_tensor_bytes": largest, "rounds": rounds, **medians}


def copy(source: Path, target: Path) -> float:
    """Seconds of reading and writing a file block by block until the disk has it."""
    began = time.perf_counter()
    with source.open("rb") as read, target.open("wb") as written:
        while block := read.read(BLOCK):
            written.write(block)
        written.flush()
        os.fsync(written.fileno())
    seconds = time.perf_counter() - began
    target.unlink()
    return seconds


def merge_once(task: Any, folder: Path, settings: Settings) -> dict[str, float]:
    result = folder / "result.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.merging",
        task.model,
        task.adapter,
        str(folder / "merged"),
        str(result),
    ]
    ended = run_watched(command, environment_of("ours"), settings.timeout)
    if ended.failure:
        raise Broken(f"the merge: {ended.failure}")
    measured: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))
    return measured


def largest_tensor(file: Path) -> int:
    from mlx_sft.safetensors_file import open_safetensors

    return max(tensor.size for tensor in open_safetensors(file).tensors)


def main() -> None:
    from mlx_sft.convert.merge import merge
    from mlx_sft.methods import method_in
    from mlx_sft.model.weights import Checkpoint
    from mlx_sft.writing import write_folder

    model, adapter, folder, result = sys.argv[1:]
    edits = method_in(Path(adapter)).edits(Path(adapter))
    checkpoint = Checkpoint.open(model)
    before = resident_bytes()
    reset_peak()
    began = time.perf_counter()
    with write_folder(Path(folder), parents=True) as temporary:
        merge(checkpoint, edits, temporary)
    measured = {"merge_seconds": time.perf_counter() - began, "above_bytes": peak_resident_bytes() - before}
    Path(result).write_text(json.dumps(measured), encoding="utf-8")
    for file in Path(folder).iterdir():
        file.unlink()
    Path(folder).rmdir()


if __name__ == "__main__":
    main()
