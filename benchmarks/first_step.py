"""Seconds from the start to the first step, above loading the weights: many rows, tokenized and cached before.

`python -m benchmarks.first_step SPEC.json RESULT.json` starts one trainer, or only loads the weights, in this process.
"""

import time

BEGAN = time.perf_counter()

import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from benchmarks.cases import Point  # noqa: E402
from benchmarks.point import TINY_TOKENIZER, WORK, Settings, environment_of, prepare  # noqa: E402
from benchmarks.process import Broken, run_watched  # noqa: E402
from benchmarks.rows import PAIR_LENGTHS, PROMPT_LENGTHS, spread  # noqa: E402
from benchmarks.task import Task  # noqa: E402


def measure_first_step(rows: int, layers: int, settings: Settings) -> dict[str, Any]:
    """Of each repetition: ours with an empty cache, ours with a full one, mlx-lm, and the weights alone."""
    rounds = []
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        point = Point("1 row", 1, "pairs", 1, 1, layers)
        task = prepare(point, Path(folder), settings.dtype).task
        chats = Path(folder) / "chats.jsonl"
        write_chats(chats, rows)
        for number in range(settings.repeat):
            cache = Path(folder) / f"cache-{number}"
            one = {}
            for name in ("weights", "ours, first time", "ours, cached", "mlx-lm"):
                one[name] = start(name, replace(task, data=str(chats)), cache, Path(folder), settings)
                print(f"  round {number + 1}, {name}: {one[name]:.2f} s", file=sys.stderr, flush=True)
            rounds.append(one)
    above = {
        name: statistics.median(one[name] - one["weights"] for one in rounds) for name in rounds[0] if name != "weights"
    }
    weights = statistics.median(one["weights"] for one in rounds)
    return {
        "rows": rows,
        "layers": layers,
        "rounds": rounds,
        "weights_seconds": weights,
        "seconds_above_weights": above,
    }


def write_chats(file: Path, count: int) -> None:
    """Short pairs as text, to be tokenized."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY_TOKENIZER, local_files_only=True)
    rng = np.random.default_rng(0)
    candidates = (tokenizer.decode([token_id]) for token_id in range(len(tokenizer)))
    words = [w for w in candidates if w[:1] == " " and w[1:].isascii() and w[1:].isalpha() and w.islower()]
    lengths, prompts = rng.permutation(spread(PAIR_LENGTHS, count)), spread(PROMPT_LENGTHS, count)
    with file.open("w", encoding="utf-8") as out:
        for length, prompt in zip(lengths, prompts, strict=True):
            asked, answered = (
                "".join(rng.choice(words, max(1, n))).strip() for n in (prompt - 12, length - prompt - 2)
            )
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            out.write(json.dumps({"messages": messages}) + "\n")


def start(name: str, task: Task, cache: Path, folder: Path, settings: Settings) -> float:
    """Seconds from the start of a process to its first step, or to the weights being in memory."""
    spec_file, result_file = folder / "start.json", folder / "start-result.json"
    spec_file.write_text(json.dumps({"name": name.partition(",")[0], "task": task.__dict__}), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.first_step", str(spec_file), str(result_file)]
    environment = environment_of(name) | {"MLX_SFT_CACHE": str(cache)}
    ended = run_watched(command, environment, settings.timeout)
    if ended.failure:
        raise Broken(f"{name}: {ended.failure}")
    seconds: float = json.loads(result_file.read_text(encoding="utf-8"))
    return seconds


# One process


def load_weights(task: Task) -> float:
    """To all weights in memory, imports included, by the loader that both trainers use."""
    import mlx.core as mx
    from mlx_lm.utils import load

    model, _ = load(task.model)
    mx.eval(model.parameters())
    return time.perf_counter() - BEGAN


def start_ours(task: Task) -> float:
    import contextlib

    from benchmarks.trainers.ours import Stamped, settings
    from mlx_sft import TrainConfig, train

    stdout = Stamped()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(stdout):
        asked = settings(task) | {"data_cache": True, "out": str(Path(folder) / "run")}
        finished = train(TrainConfig(**asked)).run_dir
        first = json.loads((finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return float(stdout.stamps[0] - first["seconds"] - BEGAN)


class Begun(BaseException):
    """The first step would begin now."""


def start_mlx_lm(task: Task) -> float:
    """To its first batch; its own data set tokenizes the rows when it sorts them by length."""
    import mlx.optimizers as optim
    from mlx_lm.tuner import datasets, trainer
    from mlx_lm.utils import load_tokenizer

    from benchmarks.trainers.mlx_lm import load_adapted

    model = load_adapted(task)
    rows = [json.loads(line) for line in Path(task.data).read_text(encoding="utf-8").splitlines()]
    tokenizer = load_tokenizer(Path(task.model))
    dataset = datasets.CacheDataset(datasets.ChatDataset(rows, tokenizer, mask_prompt=True))

    def first_batch(*args: Any, **kwargs: Any) -> Any:
        next(trainer.iterate_batches(*args, **kwargs))
        raise Begun

    try:
        trainer.train(
            model, optim.AdamW(learning_rate=1e-6), dataset, args=trainer.TrainingArgs(batch_size=1, iters=1),
            iterate_batches=first_batch,
        )  # fmt: skip
    except Begun:
        return time.perf_counter() - BEGAN
    raise RuntimeError("mlx-lm took no batch")


def main() -> None:
    spec_file, result_file = sys.argv[1:]
    spec = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    starts = {"weights": load_weights, "ours": start_ours, "mlx-lm": start_mlx_lm}
    seconds = starts[spec["name"]](Task(**spec["task"]))
    Path(result_file).write_text(json.dumps(seconds), encoding="utf-8")
    os._exit(0)  # nothing is left to wait for


if __name__ == "__main__":
    main()
