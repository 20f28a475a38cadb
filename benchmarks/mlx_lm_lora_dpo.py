"""One DPO run of mlx-lm-lora's own trainer, in a process of its own: `python -m benchmarks.mlx_lm_lora_dpo JOB.json RECORD.json`.

The job names the checkpoint, the adapter that policy and reference start from, token ids with the length of each prompt, steps and rate.
All pairs are one batch, as its batches are drawn anew for each step. On a CPU the trainer ends at its first line, which asks for the
working set of the GPU; here, in this process alone, that line is given one.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def main() -> None:
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm_lora.trainer.dpo_trainer import DPOTrainingArgs, train_dpo

    from benchmarks.trainers.mlx_lm import load_adapted

    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    known = mx.device_info()
    mx.device_info = lambda *_: known | {"max_recommended_working_set_size": 0}
    mx.set_wired_limit = lambda limit: limit
    task: Any = SimpleNamespace(**job)
    policy, reference = load_adapted(task), load_adapted(task)
    stamps, losses, margins = [time.perf_counter()], [], []

    class Reports:
        """Loss and margin of every step, and when it came."""

        def on_train_loss_report(self, info: dict[str, Any]) -> None:
            stamps.append(time.perf_counter())
            losses.append(info["train_loss"])
            margins.append(float(info["train_margins"]))

        def on_val_loss_report(self, info: dict[str, Any]) -> None:
            """There is no validation."""

    mx.reset_peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOTrainingArgs(
            batch_size=len(job["pairs"]), iters=job["steps"], steps_per_report=1, steps_per_save=job["steps"] + 1,
            max_seq_length=job["max_length"], adapter_file=str(Path(folder) / "adapters.safetensors"), beta=0.1,
        )  # fmt: skip
        optimizer = optim.AdamW(learning_rate=job["lr"], weight_decay=0.0, bias_correction=True)
        train_dpo(policy, reference, optimizer, job["pairs"], args=arguments, training_callback=Reports())
    seconds = [after - before for before, after in pairwise(stamps)]
    record = {"seconds": seconds, "losses": losses, "margins": margins, "peak_bytes": mx.get_peak_memory()}
    Path(sys.argv[2]).write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
