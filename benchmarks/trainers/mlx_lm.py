"""mlx-lm's own trainer, with its own loss and batches.

It learns from one place in a row to the row's end, and one position behind it, where its batches hold token 0. The rows
here end with a token 0 that is learnt, and mlx-lm gets them without: so the targets are the same. Of a chat with several
answers it learns only the last one, which is how its own `ChatDataset` masks a prompt.

It divides a batch's loss by the batch's learnt tokens, and takes the plain mean over the batches of an accumulated step; the others
weigh each token of a step alike.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import peak_resident_bytes
from benchmarks.task import ALLOCATED, Result, Stopwatch, Task, weighted_mean
from benchmarks.workload import adapter_arrays, answer_start, read_rows, weight_bytes


def unavailable() -> str | None:
    return None


def run(task: Task, began: float) -> Result:
    import mlx.core as mx
    import mlx.optimizers as optim
    import numpy as np
    from mlx_lm.tuner import trainer

    watch = Stopwatch(began)
    model = load_adapted(task)
    rows = read_rows(Path(task.data))
    dataset = [(row["input_ids"][:-1], answer_start(row)) for row in rows]
    tokens = needed = padded = 0

    def counted_batches(*args: Any, **kwargs: Any) -> Iterator[tuple[mx.array, mx.array]]:
        nonlocal tokens, needed, padded
        for number, (batch, bounds) in enumerate(trainer.iterate_batches(*args, **kwargs)):
            if number < task.steps * task.accumulation:
                count, width = batch.shape
                needed += int(bounds[:, 1].sum().item())
                tokens += int(bounds[:, 1].sum().item()) + count
                padded += count * (width - 1)  # the last column is only a target
            watch.start()
            yield batch, bounds

    class Reports:
        """Loss and learnt tokens of every batch."""

        def __init__(self) -> None:
            self.losses: list[float] = []
            self.learnt: list[int] = []

        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            self.losses.append(train_info["train_loss"])
            self.learnt.append(int(train_info["trained_tokens"]) - sum(self.learnt))
            if len(self.losses) % task.accumulation == 0:
                watch.step()

        def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
            """There is no validation."""

    reports = Reports()
    # It draws the order of its batches from NumPy's global generator.
    np.random.seed(task.seed)
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer.TrainingArgs(
            batch_size=task.rows_at_once,
            iters=task.steps * task.accumulation,
            steps_per_report=1,
            steps_per_save=task.steps * task.accumulation + 1,
            # Its batches are a multiple of 32 wide, plus the column of the last target.
            max_seq_length=task.max_length + 64,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
            grad_checkpoint=task.grad_checkpoint,
            grad_accumulation_steps=task.accumulation,
        )
        # The other trainers correct AdamW's moments for their start at zero.
        optimizer = optim.AdamW(learning_rate=task.learning_rate, weight_decay=0.0, bias_correction=True)
        trainer.train(
            model, optimizer, dataset, args=arguments, iterate_batches=counted_batches, training_callback=reports
        )
    weights = weight_bytes(task.model, task.dtype)
    return Result(
        tokens=tokens,
        supervised_tokens=sum(reports.learnt),
        needed_tokens=needed,
        padded_tokens=padded,
        batches=task.steps * task.accumulation,
        **watch.fields(),
        loss=weighted_mean(reports.losses, reports.learnt),
        step_losses=step_losses(reports.losses, reports.learnt, task.accumulation),
        weight_bytes=weights,
        peak_bytes=mx.get_peak_memory() - weights,
        peak_resident_bytes=peak_resident_bytes(),
        memory_is=ALLOCATED,
        notes={"batch_size": task.rows_at_once, "gradient_accumulation": task.accumulation},
    )


def load_adapted(task: Task) -> Any:
    """The model with mlx-lm's LoRA layers on every linear layer of its blocks, started from the task's adapter."""
    import mlx.core as mx
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load

    model, _ = load(task.model)
    model.set_dtype(getattr(mx, task.dtype))
    mx.eval(model.parameters())
    model.freeze()
    linear_to_lora_layers(
        model, len(model.layers), {"rank": task.rank, "scale": task.alpha / task.rank, "dropout": 0.0}
    )
    names = {"lora_A": "lora_a", "lora_B": "lora_b"}
    started = []
    for name, value in adapter_arrays(Path(task.adapter)).items():
        module, _, half = name.rpartition(".")
        started.append((f"{module}.{names[half]}", mx.array(value.T)))
    model.load_weights(started, strict=False)
    mx.eval(model.parameters())
    return model


def step_losses(losses: list[float], learnt: list[int], accumulation: int) -> list[float]:
    """Of each step, the mean over its learnt tokens."""
    starts = range(0, len(losses), accumulation)
    return [weighted_mean(losses[i : i + accumulation], learnt[i : i + accumulation]) for i in starts]
