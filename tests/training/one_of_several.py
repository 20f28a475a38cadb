"""One of several processes that do several things together one after another: Python starts once, and not for each.

    python -m tests.training.one_of_several '[["train", "--data", ...], ["load", "FOLDER"], ...]'

`train` is what `mlx.launch` would start, and `killed` the same with a process besides 0 that is lost after some steps. `load` gives bytes:
of the part of a base that this process has loaded, and the most that it took to load it. `compare` gives by how much loss and gradients
of adapters on the parts differ from those on the whole base. After each, a line on stderr has the exit code, or the numbers.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_sft.cli import main
from mlx_sft.config import TrainConfig
from mlx_sft.data.batches import MicroBatch, collate
from mlx_sft.data.example import Example
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.model.head import SplitModel, training_mode
from mlx_sft.model.load import load_model
from mlx_sft.training.step import GradientComputer

ENDED = "=== "
"""How the line begins that says what came of it."""


def _made(do: str, *arguments: str) -> object:
    if do in _OTHERS:
        return _OTHERS[do](*arguments)
    return main.main([do, *arguments], standalone_mode=False) or 0


def _load(folder: str) -> tuple[int, int]:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loaded = load_model(folder, group=_group())
    taken = mx.get_active_memory() - before, mx.get_peak_memory() - before
    del loaded
    return taken


def _compare(folder: str, target: str) -> float:
    (loss, expected), (found_loss, parts) = _gradients(folder, target, None), _gradients(folder, target, _group())
    differences = [abs(found_loss - loss) / abs(loss)]
    for name, gradient in expected.items():
        found = np.array(mx.distributed.all_sum(parts[name], group=_group()))
        differences.append(np.abs(found - gradient).max() / np.abs(gradient).max())
    return float(max(differences))


def _gradients(folder: str, target: str, group: Any) -> tuple[float, dict[str, mx.array]]:
    base = load_model(folder, "float32", group=group)
    method = Lora(TrainConfig(data="-", rank=2, target=target).settings(LoraSettings))
    random = np.random.default_rng(0)
    start = method.attach(base.model, 0)
    parameters = {name: mx.array(random.normal(0, 0.1, value.shape), mx.float32) for name, value in start.items()}
    method.bind(base.model, parameters)
    computer = GradientComputer(SplitModel(base.model), method, base.config["vocab_size"], recompute="light")
    rows = [Example("a row", random.integers(0, 200, n).astype(np.int32), np.ones(n, np.float32)) for n in (9, 14)]
    batch = collate(rows, MicroBatch((0, 1), 13))
    with training_mode(base.model):
        loss, gradients = computer.micro_step(parameters, batch, batch.weights / np.float32(21), None)
        mx.eval(loss, gradients)
    return float(loss.item()), gradients


def _killed(*arguments: str) -> object:
    def once_there_are_steps() -> None:
        metrics = Path(arguments[arguments.index("--out") + 1]) / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    if _group().rank():
        threading.Thread(target=once_there_are_steps, daemon=True).start()
    return _made("train", *arguments)


def _group() -> Any:
    return mx.distributed.init(strict=True)


_OTHERS = {"load": _load, "compare": _compare, "killed": _killed}

if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        sys.stderr.write(f"{ENDED}{json.dumps(_made(*one))}\n")
