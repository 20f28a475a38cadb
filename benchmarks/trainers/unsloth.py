"""Unsloth's MLX trainer (`unsloth_zoo.mlx`), where it is installed on a machine with Metal or CUDA.

Its fused loss and compilation stay as they are by default; clipping, schedule and checkpointing are the task's. Its adapters start
at random: it has no public way to begin from a PEFT folder with its own layers. Written against unsloth-zoo 2026.10.
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.machine import peak_resident_bytes
from benchmarks.task import ALLOCATED, Result, Stopwatch, Task, weighted_mean
from benchmarks.trainers.arguments import training_arguments
from benchmarks.workload import IGNORED, needed_tokens, read_rows, weight_bytes


def unavailable() -> str | None:
    import mlx.core as mx

    if mx.default_device() != mx.Device(mx.gpu):
        return "no Metal or CUDA on this machine"
    return "unsloth_zoo is not installed" if find_spec("unsloth_zoo") is None else None


def run(task: Task, began: float) -> Result:
    import mlx.core as mx
    from unsloth_zoo.mlx.loader import FastMLXModel
    from unsloth_zoo.mlx.trainer import MLXTrainer, MLXTrainingConfig

    watch = Stopwatch(began)
    model, tokenizer = FastMLXModel.from_pretrained(
        task.model, max_seq_length=task.max_length, dtype=task.dtype, load_in_4bit=False, text_only=True
    )
    model = FastMLXModel.get_peft_model(
        model,
        r=task.rank,
        lora_alpha=task.alpha,
        lora_dropout=0,
        use_gradient_checkpointing="mlx" if task.grad_checkpoint else False,
        random_state=task.seed,
        max_seq_length=task.max_length,
    )
    rows = read_rows(Path(task.data))
    losses: list[float] = []
    peaks = [mx.get_peak_memory()]

    class Begin:
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            watch.start()

    def report(step: int, steps: int, loss: float, rate: float, speed: float, peak: float, *rest: Any) -> None:
        watch.step()
        losses.append(loss)
        peaks.append(int(peak * 1e9))  # it counts each step's peak anew

    with tempfile.TemporaryDirectory() as folder:
        arguments = MLXTrainingConfig(
            output_dir=folder,
            **training_arguments(task),
            warmup_steps=0,
            max_grad_leaf_norm=0.0,
            max_seq_length=task.max_length,
            dataset_order="sequential" if task.in_order else "default",
            append_eos=False,
        )
        dataset = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
        trainer = MLXTrainer(model, tokenizer, dataset, args=arguments)
        trainer.add_callback(Begin())
        trainer.add_step_callback(report)
        trainer.train()
    weights = weight_bytes(task.model, task.dtype)
    learnt = sum(label != IGNORED for row in rows for label in row["labels"])
    return Result(
        tokens=sum(len(row["input_ids"]) for row in rows),
        supervised_tokens=learnt,
        needed_tokens=needed_tokens(rows),
        padded_tokens=None,
        batches=task.steps * task.accumulation,
        **watch.fields(),
        loss=weighted_mean(losses, [1] * len(losses)),
        step_losses=losses,
        weight_bytes=weights,
        peak_bytes=max(peaks) - weights,
        peak_resident_bytes=peak_resident_bytes(),
        memory_is=ALLOCATED,
        notes={"batch_size": task.rows_at_once, "gradient_accumulation": task.accumulation, "adapter": "its own start"},
    )
