"""One trainer on one task, in this process: `python benchmarks/trainers.py ours|mlx-lm TASK.json RESULT.json`.

Both get the same checkpoint, rows, adapter shape, optimizer and rows a step, and report the same things. Each makes its own
batches and its own loss: that is what is compared.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Task:
    """What both trainers are asked to do."""

    model: str
    data: str
    rows_per_step: int
    steps: int
    rank: int
    alpha: float
    learning_rate: float
    max_length: int
    grad_checkpoint: bool
    seed: int


@dataclass(frozen=True)
class Result:
    """What one of them did.

    Attributes:
        tokens: Of the rows, without padding.
        supervised_tokens: As each trainer counts them: mlx-lm's mask takes in the line break after the end of turn and one
            position behind the row.
        computed_tokens: Of the rows, those that go through the model: none need be that predict nothing.
        padded_tokens: The same with padding.
        seconds: In optimizer steps, tracing and compiling included; loading, reading and saving left out.
        seconds_to_first_step: From the start of the process's work to the end of the first step.
        loss: Mean over the supervised tokens of all steps.
        weight_bytes: Of the base model.
        peak_bytes: Above `weight_bytes`.
    """

    tokens: int
    supervised_tokens: int
    computed_tokens: int
    padded_tokens: int
    seconds: float
    seconds_to_first_step: float
    loss: float
    first_loss: float
    weight_bytes: int
    peak_bytes: int


def weight_bytes(model: str) -> int:
    """Bytes of the float32 weights in the checkpoint."""
    arrays = mx.load(str(Path(model) / "model.safetensors"))
    return sum(4 * array.size for array in arrays.values())


def run_mlx_lm(task: Task) -> Result:
    """mlx-lm's own trainer with its own loss, batches and chat rows; the prompt is masked, so that both learn the same tokens."""
    import mlx.optimizers as optim
    import numpy as np
    from mlx_lm.tuner import datasets, trainer
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load

    started = time.perf_counter()
    model, tokenizer = load(task.model)
    mx.eval(model.parameters())
    model.freeze()
    mx.random.seed(task.seed)
    settings = {"rank": task.rank, "scale": task.alpha / task.rank, "dropout": 0.0}
    linear_to_lora_layers(model, len(model.layers), settings)
    lines = Path(task.data).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    chats = datasets.ChatDataset(rows, tokenizer, mask_prompt=True)
    dataset = [chats.process(row) for row in rows]
    np.random.seed(task.seed)  # mlx-lm draws the order of its batches from the global generator

    tokens = computed_tokens = padded_tokens = 0

    def counted_batches(*args: Any, **kwargs: Any) -> Iterator[tuple[mx.array, mx.array]]:
        nonlocal tokens, computed_tokens, padded_tokens
        for batch, bounds in trainer.iterate_batches(*args, **kwargs):
            rows, width = batch.shape
            lengths = bounds[:, 1]
            tokens += int(lengths.sum().item())
            computed_tokens += int(mx.minimum(lengths, width - 1).sum().item())
            padded_tokens += rows * (width - 1)  # the last column is only a target
            yield batch, bounds

    class Reports(TrainingCallback):
        """Seconds, mean loss and supervised tokens of every step."""

        def __init__(self) -> None:
            self.steps: list[tuple[float, float, int]] = []
            self.first_step_done = 0.0

        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            self.first_step_done = self.first_step_done or time.perf_counter()
            before = sum(step[2] for step in self.steps)
            supervised = int(train_info["trained_tokens"]) - before
            seconds = 1 / train_info["iterations_per_second"]
            self.steps.append((seconds, train_info["train_loss"], supervised))

    reports = Reports()
    with tempfile.TemporaryDirectory() as folder:
        arguments = trainer.TrainingArgs(
            batch_size=task.rows_per_step,
            iters=task.steps,
            steps_per_report=1,
            steps_per_save=task.steps + 1,
            max_seq_length=task.max_length,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
            grad_checkpoint=task.grad_checkpoint,
        )
        optimizer = optim.AdamW(learning_rate=task.learning_rate, weight_decay=0.0)
        trainer.train(
            model,
            optimizer,
            dataset,
            args=arguments,
            iterate_batches=counted_batches,
            training_callback=reports,
        )
    supervised = sum(step[2] for step in reports.steps)
    weights = weight_bytes(task.model)
    return Result(
        tokens=tokens,
        supervised_tokens=supervised,
        computed_tokens=computed_tokens,
        padded_tokens=padded_tokens,
        seconds=sum(step[0] for step in reports.steps),
        seconds_to_first_step=reports.first_step_done - started,
        loss=sum(step[1] * step[2] for step in reports.steps) / supervised,
        first_loss=reports.steps[0][1],
        weight_bytes=weights,
        peak_bytes=mx.get_peak_memory() - weights,
    )


class Stamped(io.StringIO):
    """Takes a run's lines of JSON and notes when the first step was reported."""

    first_step_done = 0.0

    def write(self, text: str) -> int:
        if not self.first_step_done and '"kind": "train"' in text:
            self.first_step_done = time.perf_counter()
        return super().write(text)


def run_ours(task: Task) -> Result:
    """mlx-sft by its public function; clipping and schedule are off, as they are in mlx-lm's trainer."""
    from mlx_sft import TrainConfig, train
    from mlx_sft.data import prepare
    from mlx_sft.data.batches import Plan, cut
    from mlx_sft.model.load import load_tokenizer

    started = time.perf_counter()
    stdout = Stamped()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(stdout):
        asked = TrainConfig(
            model=task.model,
            data=task.data,
            out=str(Path(folder) / "run"),
            dtype="float32",
            rank=task.rank,
            alpha=task.alpha,
            batch_size=task.rows_per_step,
            max_steps=task.steps,
            lr=task.learning_rate,
            scheduler="constant",
            warmup=0.0,
            max_grad_norm=0.0,
            max_length=task.max_length,
            grad_checkpoint="on" if task.grad_checkpoint else "off",
            save_every=task.steps,
            seed=task.seed,
            data_cache=False,
            json_lines=True,
        )
        run = train(asked).run_dir
        peak = mx.get_peak_memory()
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        chosen = TrainConfig.resolve(run / "config.yaml")
    steps = [json.loads(line) for line in lines]
    examples = prepare(chosen, load_tokenizer(Path(task.model))).train
    lengths = examples.needed_lengths
    plan = Plan(len(examples), batch_size=task.rows_per_step, max_steps=task.steps, seed=task.seed)
    micro_batches = [
        micro_batch for step in plan.steps() for micro_batch in cut(step.rows, lengths, chosen.micro_batch_tokens or 1)
    ]
    supervised = sum(step["supervised_tokens"] for step in steps)
    weights = weight_bytes(task.model)
    return Result(
        tokens=sum(step["tokens"] for step in steps),
        supervised_tokens=supervised,
        computed_tokens=sum(int(lengths[row]) for micro in micro_batches for row in micro.rows),
        padded_tokens=sum(len(micro.rows) * micro.width for micro in micro_batches),
        seconds=sum(step["seconds"] for step in steps),
        seconds_to_first_step=stdout.first_step_done - started,
        loss=sum(step["loss"] * step["supervised_tokens"] for step in steps) / supervised,
        first_loss=steps[0]["loss"],
        weight_bytes=weights,
        peak_bytes=peak - weights,
    )


RUNNERS = {"ours": run_ours, "mlx-lm": run_mlx_lm}


def main() -> None:
    name, task_file, result_file = sys.argv[1:]
    task = Task(**json.loads(Path(task_file).read_text(encoding="utf-8")))
    result = RUNNERS[name](task)
    Path(result_file).write_text(json.dumps(asdict(result)), encoding="utf-8")


if __name__ == "__main__":
    main()
