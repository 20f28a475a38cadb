"""transformers with PEFT and TRL's SFTTrainer, float32 on the CPU.

The rows come tokenized with their labels, so that the learnt tokens are the same. Batches are padded to their longest row and drawn
at random, as by default; so are the fused loss and everything else that TRL chooses by itself, but for what the task says.
Memory is resident memory, because PyTorch does not count what it takes on a CPU.
"""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.machine import peak_resident_bytes, reset_peak, resident_bytes
from benchmarks.task import RESIDENT, Result, Stopwatch, Task, weighted_mean
from benchmarks.trainers.arguments import training_arguments
from benchmarks.workload import IGNORED, read_rows


def unavailable() -> str | None:
    missing = [name for name in ("torch", "transformers", "peft", "trl", "datasets") if find_spec(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else None


def run(task: Task, began: float) -> Result:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    watch = Stopwatch(began)
    model = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32, local_files_only=True)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    model = PeftModel.from_pretrained(model, task.adapter, is_trainable=True)
    for parameter in model.parameters():
        parameter.sum()  # read from the mapped file now, so that the weights do not count as training's memory
    loaded = resident_bytes()
    reset_peak()
    tokenizer = AutoTokenizer.from_pretrained(task.model, local_files_only=True)
    rows = read_rows(Path(task.data))
    counted: list[dict[str, int]] = []

    class Counting(DataCollatorForLanguageModeling):
        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = super().torch_call(examples)
            lengths = [len(example["input_ids"]) for example in examples]
            counted.append(
                {
                    "tokens": sum(lengths),
                    "needed": sum(lengths) - len(lengths),
                    "padded": batch["input_ids"].numel(),
                    "supervised": int((batch["labels"] != IGNORED).sum()),
                }
            )
            return batch

    class Reports(TrainerCallback):
        losses: list[float] = []  # noqa: RUF012

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            watch.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            watch.step()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            if "loss" in logs:
                self.losses.append(float(logs["loss"]))

    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            **training_arguments(task),
            max_grad_norm=0.0,
            max_length=task.max_length,
            bf16=False,
            use_cpu=True,
            train_sampling_strategy="sequential" if task.in_order else "random",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        reports = Reports()
        trainer = SFTTrainer(
            model,
            args=arguments,
            train_dataset=Dataset.from_list([{name: row[name] for name in ("input_ids", "labels")} for row in rows]),
            processing_class=tokenizer,
            data_collator=Counting(pad_token_id=0),
            callbacks=[reports],
        )
        trainer.train()
    counted = counted[: task.steps * task.accumulation]
    per_step = [
        sum(batch["supervised"] for batch in counted[i : i + task.accumulation])
        for i in range(0, len(counted), task.accumulation)
    ]
    return Result(
        tokens=sum(batch["tokens"] for batch in counted),
        supervised_tokens=sum(per_step),
        needed_tokens=sum(batch["needed"] for batch in counted),
        padded_tokens=sum(batch["padded"] for batch in counted),
        batches=len(counted),
        **watch.fields(),
        loss=weighted_mean(reports.losses, per_step),
        step_losses=reports.losses,
        weight_bytes=weights,
        peak_bytes=peak_resident_bytes() - loaded,
        peak_resident_bytes=peak_resident_bytes(),
        memory_is=RESIDENT,
        notes={
            "per_device_train_batch_size": task.rows_at_once,
            "gradient_accumulation": task.accumulation,
            "threads": torch.get_num_threads(),
        },
    )
