"""Full fine-tuning with masters in float32 and in bfloat16: the loss beside each other, same rows in the same order.

`python -m benchmarks.masters` trains the model that ships with the package on examples/chats.jsonl, four minutes a run on a CPU of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import environment
from mlx_sft import TrainConfig, train
from mlx_sft.training.callbacks import Callback

RESULTS = Path(__file__).parent / "results"
EXAMPLES = Path(__file__).parents[1] / "examples"

FORMS: dict[str, dict[str, Any]] = {
    "float32, AdamW": {"optimizer": "adamw"},
    "float32, AdamW in 8 bits": {"optimizer": "adamw8bit"},
    "bfloat16 rounded stochastically, AdamW in 8 bits": {"optimizer": "adamw8bit", "master_dtype": "bfloat16"},
    "bfloat16 rounded to nearest, AdamW in 8 bits": {"optimizer": "adamw8bit", "master_dtype": "bfloat16"},
}
"""What is compared; the last rounds as a cast does."""


class Watch(Callback):
    """Losses of steps and of evaluations; and how steps are rounded."""

    name = "watch"

    def __init__(self, *, nearest: bool) -> None:
        super().__init__()
        self.nearest = nearest
        self.losses: list[float] = []
        self.evaluations: list[float] = []

    def on_start(self, run: Any, record: dict[str, Any]) -> None:
        update = run.optimizer.update
        if self.nearest:
            run.optimizer.update = lambda *given: update(*given[:4])  # without the key

    def on_step(self, run: Any, record: dict[str, Any]) -> None:
        self.losses.append(record["loss"])

    def on_evaluation(self, run: Any, record: dict[str, Any]) -> None:
        self.evaluations.append(record["loss"])


def measure(name: str, settings: dict[str, Any], steps: int, learning_rate: float, seed: int) -> dict[str, Any]:
    """One run; the losses are nats a supervised token."""
    watch = Watch(nearest="nearest" in name)
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model="tiny", data=str(EXAMPLES / "chats.jsonl"), valid=str(EXAMPLES / "held_out.jsonl"), method="full",
            dtype="bfloat16", lr=learning_rate, batch_size=4, max_steps=steps, seed=seed, eval_every=steps // 2, warmup=0.03,
            out=f"{folder}/run", quiet=True, **settings,
        )  # fmt: skip
        train(config, callbacks=[watch])
    tail = watch.losses[-steps // 4 :]
    return {
        "masters": name, "seed": seed, "first_loss": watch.losses[0], "last_quarter_loss": sum(tail) / len(tail),
        "held_out_loss": watch.evaluations,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    runs = []
    for seed in range(arguments.seeds):
        for name, settings in FORMS.items():
            runs.append(measure(name, settings, arguments.steps, arguments.lr, seed))
            print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"masters-full-{time.strftime('%Y-%m-%dT%H%M%S')}.json"
    found = {"steps": arguments.steps, "learning_rate": arguments.lr, "environment": environment(["mlx"]), "runs": runs}
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
