"""Our trainer beside mlx-lm's: same rows, checkpoint, adapter shape, optimizer and rows a step; alternating, each in its own process.

Writes a JSON file to benchmarks/results/ and a table to stdout. Medians of the repetitions, and the ratio pair by pair. Knows
nothing about how either trains: `trainers.py` does.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from machine import environment
from trainers import Task
from workload import load_tokenizer, make_checkpoint, rows_from, short_pairs

HERE = Path(__file__).parent
WORK = HERE / "work"
TINY_TOKENIZER = HERE.parent / "mlx_sft" / "model" / "tiny"
TRAINERS = ("ours", "mlx-lm")


def fast_blas() -> str | None:
    """OpenBLAS on Linux, where there is one: MLX's CPU build there comes with the reference BLAS, which no one should time."""
    return ctypes.util.find_library("openblas") if sys.platform == "linux" else None


def run_trainer(name: str, task: Task, blas: str | None) -> dict[str, Any]:
    """One trainer in a process of its own; its result."""
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        task_file, result_file = Path(folder) / "task.json", Path(folder) / "result.json"
        task_file.write_text(json.dumps(asdict(task)), encoding="utf-8")
        environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({"LD_PRELOAD": blas} if blas else {})
        child = subprocess.run(
            [sys.executable, str(HERE / "trainers.py"), name, str(task_file), str(result_file)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if child.returncode != 0:
            raise SystemExit(f"{child.stdout[-4000:]}\nerror: {name} ended with code {child.returncode}")
        result: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
    return derived(result)


def derived(result: dict[str, Any]) -> dict[str, Any]:
    seconds = result["seconds"]
    return result | {
        "tokens_per_second": result["tokens"] / seconds,
        "supervised_tokens_per_second": result["supervised_tokens"] / seconds,
        "padding_share": 1 - result["computed_tokens"] / result["padded_tokens"],
    }


def summarize(runs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians of each trainer, and of the ratios pair by pair."""
    medians = {
        name: {key: statistics.median(run[name][key] for run in runs) for key in runs[0][name]} for name in TRAINERS
    }
    speeds = [r["ours"]["tokens_per_second"] / r["mlx-lm"]["tokens_per_second"] for r in runs]
    memory = [r["ours"]["peak_bytes"] / r["mlx-lm"]["peak_bytes"] for r in runs]
    ratios = {
        "tokens_per_second": {"median": statistics.median(speeds), "pairs": speeds},
        "peak_bytes": {"median": statistics.median(memory), "pairs": memory},
    }
    return {"medians": medians, "ratios": ratios}


def table(summary: dict[str, Any]) -> str:
    rows = [
        ("real tokens a second", "tokens_per_second", "{:,.1f}", 1),
        ("supervised tokens a second", "supervised_tokens_per_second", "{:,.1f}", 1),
        ("peak memory above the weights, GB", "peak_bytes", "{:,.2f}", 1e9),
        ("padding, % of what was computed", "padding_share", "{:.1f}", 0.01),
        ("seconds to the end of the first step", "seconds_to_first_step", "{:,.1f}", 1),
        ("real tokens", "tokens", "{:,.0f}", 1),
        ("supervised tokens", "supervised_tokens", "{:,.0f}", 1),
        ("mean loss", "loss", "{:.4f}", 1),
    ]
    lines = [f"{'':40}{'ours':>12}{'mlx-lm':>12}"]
    for title, key, form, unit in rows:
        cells = [form.format(summary["medians"][name][key] / unit) for name in TRAINERS]
        lines.append(f"{title:40}{cells[0]:>12}{cells[1]:>12}")
    for title, key in (("speed", "tokens_per_second"), ("memory above the weights", "peak_bytes")):
        ratio = summary["ratios"][key]
        pairs = ", ".join(f"{value:.2f}" for value in ratio["pairs"])
        lines.append(f"{title}: {ratio['median']:.2f} times mlx-lm's (pair by pair {pairs})")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train with mlx-sft and with mlx-lm, alternating.")
    parser.add_argument(
        "--data", type=Path, help="a .jsonl file of chats or prompt/completion pairs; else generated short pairs"
    )
    parser.add_argument(
        "--tokenizer", type=Path, default=TINY_TOKENIZER, help="a folder with tokenizer.json and a chat template"
    )
    parser.add_argument("--layers", type=int, default=6, help="of Qwen3-0.6B's 28 (default 6)")
    parser.add_argument("--rows", type=int, default=64, help="rows, each trained on once (default 64)")
    parser.add_argument("--rows-per-step", type=int, default=16, help="conversations an optimizer step (default 16)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3, help="pairs of runs (default 3)")
    parser.add_argument("--grad-checkpoint", action="store_true", help="for both")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.rows % arguments.rows_per_step:
        raise SystemExit("error: --rows must be a multiple of --rows-per-step: mlx-lm drops a remainder")
    WORK.mkdir(exist_ok=True)
    tokenizer = load_tokenizer(arguments.tokenizer)
    if arguments.data:
        rows = rows_from(arguments.data, arguments.rows, arguments.seed)
    else:
        rows = short_pairs(tokenizer, arguments.rows, arguments.seed)
    data = WORK / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    name = f"qwen3-0.6b-{arguments.layers}-layers-{arguments.tokenizer.resolve().name}"
    task = Task(
        model=str(make_checkpoint(WORK / name, arguments.tokenizer, arguments.layers)),
        data=str(data),
        rows_per_step=arguments.rows_per_step,
        steps=arguments.rows // arguments.rows_per_step,
        rank=arguments.rank,
        alpha=2.0 * arguments.rank,
        learning_rate=1e-4,
        max_length=2048,
        grad_checkpoint=arguments.grad_checkpoint,
        seed=arguments.seed,
    )
    blas = fast_blas()
    runs = []
    for repetition in range(arguments.repeat):
        order = TRAINERS if repetition % 2 == 0 else TRAINERS[::-1]
        pair = {}
        for trainer in order:
            pair[trainer] = run_trainer(trainer, task, blas)
            speed = pair[trainer]["tokens_per_second"]
            print(f"{repetition + 1}/{arguments.repeat} {trainer}: {speed:,.1f} real tokens a second", file=sys.stderr)
        runs.append(pair)
    summary = summarize(runs)
    about = environment(("mlx", "mlx-lm", "mlx-sft", "numpy")) | {"LD_PRELOAD": blas}
    source = arguments.data.name if arguments.data else "generated short pairs"
    shown = asdict(task) | {"model": name, "data": source}
    report = {"environment": about, "task": shown, **summary, "runs": runs}
    print(f"Qwen3-0.6B's shape with {arguments.layers} layers, float32, {arguments.rows} rows ({source}), "
          f"{arguments.rows_per_step} a step, LoRA rank {arguments.rank}; LD_PRELOAD={blas}")  # fmt: skip
    print(table(summary))
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    file = results / f"against-mlx-lm-{about['time'].replace(':', '').split('+')[0]}.json"
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {file}", file=sys.stderr)


if __name__ == "__main__":
    main()
