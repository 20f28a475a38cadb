"""Preferences beside TRL and mlx-lm-lora: the same pairs, start and steps, and SFT on the same texts for what a step takes in memory.

    python -m benchmarks.preferences --data pairs.json --tokenizer path/to/checkpoint

Ours trains in this process; TRL carries out the script that `--format trl` writes of that run, in one of its own. So both have the very
token ids, and the losses and margins of each step must agree. mlx-lm-lora draws its batches itself: it is measured where all pairs are
one step, in an environment of one's own (`pip install --no-deps --target FOLDER mlx-lm-lora`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import environment, fast_blas
from benchmarks.process import family_bytes
from benchmarks.workload import make_adapter, make_checkpoint, shape, weight_bytes

VOCABULARY = 151_936
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="pairs, in any form that mlx-sft reads")
    parser.add_argument("--tokenizer", required=True, type=Path, help="a folder with tokenizer and chat template")
    parser.add_argument("--layers", type=int, default=6, help="of Qwen3-0.6B's 28 [%(default)s]")
    parser.add_argument("--pairs", type=int, default=16, help="the first so many of the file [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs a step [%(default)s]")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a text [%(default)s]")
    parser.add_argument("--steps", type=int, help="so many instead of one pass over the pairs")
    parser.add_argument("--mlx-lm-lora", type=Path, metavar="FOLDER", help="where mlx-lm-lora lies, to measure it too")
    options = parser.parse_args()
    if options.mlx_lm_lora and options.pairs > options.batch_size:
        parser.error("--mlx-lm-lora needs all pairs in one step: --batch-size as large as --pairs")
    blas = fast_blas()
    if blas and blas not in os.environ.get("LD_PRELOAD", ""):
        again = [sys.executable, "-m", "benchmarks.preferences", *sys.argv[1:]]
        raise SystemExit(subprocess.call(again, env=os.environ | {"LD_PRELOAD": blas}))
    with tempfile.TemporaryDirectory() as folder:
        found = compared(options, Path(folder))
    named = vars(options) | {
        "mlx_lm_lora": bool(options.mlx_lm_lora),
        "data": Path(options.data).name,
        "tokenizer": options.tokenizer.name,
    }
    record = {"environment": environment(["mlx", "mlx-lm", "torch", "trl", "peft"]), "options": named, **found}
    file = RESULTS / f"preferences-{time.strftime('%Y-%m-%dT%H%M%S')}.json"
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name in ("ours", "sft", "trl", "mlx-lm-lora"):
        if (one := found.get(name)) is None:
            continue
        print(f"{name:11} {median(one['seconds']):8.2f} s a step  {one['peak_bytes'] / 1e9:6.2f} GB above the weights")
    print(f"losses and margins differ by {found['difference']:.1e} at most; {file}")


def compared(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from mlx_sft import TrainConfig, export, train
    from mlx_sft.data.prepare import prepare
    from mlx_sft.model.load import load_tokenizer

    config = shape(options.layers, VOCABULARY)
    base = make_checkpoint(folder / "base", options.tokenizer, config)
    common: dict[str, Any] = {
        "model": str(base), "init_adapter": str(make_adapter(folder / "adapter", config, 16, 32.0)), "dtype": "float32", "lr": 1e-3,
        "scheduler": "constant", "warmup": 0.0, "max_grad_norm": 0.0, "weight_decay": 0.0, "max_length": options.max_length,
        "grad_checkpoint": "off", "micro_batch_tokens": 1024, "shuffle": False, "data_cache": False, "allow_lost_rows": True,
        "max_steps": options.steps,
        "valid_fraction": 0,
    }  # fmt: skip
    rows = json.loads(Path(options.data).read_text(encoding="utf-8"))[: options.pairs]
    pairs = common | {
        "objective": "dpo",
        "batch_size": options.batch_size,
        "out": str(folder / "dpo"),
        "data": str(folder / "pairs.json"),
    }
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    weights = weight_bytes(str(base), "float32")
    run = train(TrainConfig(**pairs)).run_dir
    ours = steps_of(run)
    texts = prepare(TrainConfig(**pairs), load_tokenizer(base)).train
    tokenized = [{"input_ids": one.token_ids.tolist(), "labels": one.labels.tolist()} for one in texts]
    sft = TrainConfig(**common, batch_size=2 * options.batch_size, out=str(folder / "sft"))
    supervised = steps_of(train(sft, data=tokenized).run_dir)
    exported = export(run, folder / "trl", format="trl").path
    seconds, peak = timed(exported)
    theirs = steps_of(exported)
    if options.mlx_lm_lora:
        given = [(texts[index], texts[index + 1]) for index in range(0, len(texts), 2)]
        job = common | {
            "adapter": common["init_adapter"], "rank": 16, "alpha": 32.0, "steps": len(ours),
            "pairs": [of_pair(chosen, rejected) for chosen, rejected in given],
        }  # fmt: skip
        lora = of_mlx_lm_lora(job, options.mlx_lm_lora, folder)
        lora["peak_bytes"] -= weights
    names = ("loss", "rewards/margins")
    differences = [abs(one[name] - other[name]) for one, other in zip(ours, theirs, strict=True) for name in names]
    return ({"mlx-lm-lora": lora} if options.mlx_lm_lora else {}) | {
        "ours": of_ours(ours, weights),
        "sft": of_ours(supervised, weights),
        "trl": {"seconds": seconds, "peak_bytes": peak, "losses": [step["loss"] for step in theirs]},
        "difference": max(differences),
    }


def of_pair(chosen: Any, rejected: Any) -> dict[str, Any]:
    """As its dataset gives a pair; nothing stands behind the last token that is learnt, as it would learn that too."""
    pair: dict[str, Any] = {}
    for name, one in (("chosen", chosen), ("rejected", rejected)):
        pair[name] = one.token_ids[: one.needed_length + 1].tolist()
        pair[f"{name}_prompt_length"] = int((one.loss_weights != 0).argmax())
    return pair


def of_mlx_lm_lora(job: dict[str, Any], installed: Path, folder: Path) -> dict[str, Any]:
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    path = os.pathsep.join([str(Path.cwd()), str(installed.resolve())])
    command = [sys.executable, "-m", "benchmarks.mlx_lm_lora_dpo", str(folder / "job.json"), str(folder / "found.json")]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return found


def steps_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def of_ours(steps: list[dict[str, Any]], weights: int) -> dict[str, Any]:
    return {
        "seconds": [step["seconds"] for step in steps],
        "peak_bytes": max(step["peak_memory_bytes"] for step in steps) - weights,
        "losses": [step["loss"] for step in steps],
    }


def timed(exported: Path) -> tuple[list[float], int]:
    """Seconds of each step of a TRL export's script, by when its lines come, and its memory above what it had before the first."""
    metrics, stamps, before, highest = exported / "metrics.jsonl", list[float](), 0, 0
    script = subprocess.Popen([sys.executable, "train.py"], cwd=exported, stdout=subprocess.DEVNULL)
    while script.poll() is None:
        now = family_bytes(script.pid)
        if metrics.exists():  # from the beginning of training on
            if not stamps:
                stamps, before = [time.perf_counter()], now
            if metrics.read_bytes().count(b"\n") >= len(stamps):
                stamps.append(time.perf_counter())
            highest = max(highest, now)
        time.sleep(0.01)
    if script.returncode:
        raise SystemExit("TRL's script failed")
    return [after - earlier for earlier, after in pairwise(stamps)], highest - before


if __name__ == "__main__":
    main()
