"""What a run is about to train on, and how, shown before its first step."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from mlx_sft.config import TrainConfig
from mlx_sft.console import count, many, size
from mlx_sft.data.encode import decoded_segments
from mlx_sft.data.sources import split_weight
from mlx_sft.data.steps import shares
from mlx_sft.files import free_bytes
from mlx_sft.recommended import in_words
from mlx_sft.report.run import RunFiles
from mlx_sft.report.verdict import more_with
from mlx_sft.training.job import Job
from mlx_sft.training.recompute import Mode
from mlx_sft.training.resume import differences
from mlx_sft.training.schedule import learning_rate

_RECOMPUTED: dict[Mode, str] = {
    "off": "",
    "light": ", what lies between products computed again",
    "layers": ", layers computed again",
    "blocks": ", layers computed again in blocks",
}


def show_plan(job: Job) -> None:
    """Show it; of a run that has finished, that it has, and how to go on."""
    config, report, console, total = job.config, job.data.report, job.console, job.plan.total_steps
    if job.finished:
        taken = (
            f"its {total} steps are taken" if job.step == total else f"it was ended after step {job.step} of {total}"
        )
        console.note(f"this run is finished: {taken}; to go on with more: {more_with(RunFiles.of(job.run))}")
        return
    trainable = sum(value.size for value in job.parameters.values())
    text = "pair" if job.gradient_computer.objective.compares else "conversation"
    facts = {
        "model": f"{config.model} ({config.dtype})",
        **report.summary(),
        **_mixture(job),
        "trains": f"{count(trainable)} parameters ({config.method})",
        "steps": f"{total} of {many(config.batch_size, text)}, "
        f"up to {job.settings.micro_batch_tokens} tokens at once" + _RECOMPUTED[job.gradient_computer.mode],
        **_processes(job),
        **recommended(config),
        "memory": f"{size(mx.get_active_memory())} for the weights, up to {size(job.predicted.peak)} predicted with a step, "
        f"of {size(job.memory.machine.memory)} ({job.memory.machine.basis})",
        "disk": f"up to {size(job.disk.total)} with {many(job.disk.checkpoints, 'checkpoint')}, "
        f"of {size(free_bytes(job.run.path))} that is free",
        "run": str(job.run.path),
    }
    rows = job.data.train.rows
    for index in range(int((rows == rows[0]).sum()) if report.train.pairs else 1):
        example = job.data.train[index]
        answer = f", answer {index + 1}" if report.train.pairs else ""
        title = f"{example.origin}{answer}, with what will be trained on"
        console.conversation(title, decoded_segments(job.base.tokenizer, example))
    console.facts("Training on", facts)
    for warning in report.warnings():
        console.warn(warning)
    if job.split.body_name is None:
        console.warn(
            "this model's head cannot be told from its body; logits of every position are kept, "
            "which takes more memory and changes nothing else"
        )
    if config.lr and not any(learning_rate(config, step, total) for step in range(1, total + 1)):
        console.warn("the warm-up takes the whole run, so that nothing is trained; give --warmup 0, or more steps")
    if config.resume and (changed := differences(job.run, config)):
        console.warn(f"the last bits may not be the same: since the run began, {', '.join(changed)} changed")
    if job.progress.step:
        console.note(f"resuming after step {job.progress.step}")


def recommended(config: TrainConfig) -> dict[str, str]:
    """The settings that are as the model, the method or the objective recommends; empty where none is."""
    words = in_words(config.recommended())
    return {"settings": words} if words else {}


def _processes(job: Job) -> dict[str, str]:
    """How many share a step or the base; empty for one alone."""
    ranks = job.gradient_computer.ranks
    how = ", to the bits of one" if ranks.exact else ""
    words = f"{ranks.size} have a part of the base each" if ranks.sharded else f"{ranks.size} share each step{how}"
    return {"processes": words} if ranks.size > 1 else {}


def _mixture(job: Job) -> dict[str, str]:
    """How many rows of each source an epoch has, where sources are mixed by weight."""
    portions = job.plan.mixture
    if not portions:
        return {}
    names = [split_weight(spec)[0] for spec in job.config.data]
    parts = zip(names, portions, shares(job.plan.rows, [portion.weight for portion in portions]), strict=True)
    return {
        "mixture": "an epoch has "
        + ", ".join(
            f"{count(share)} of the {many(portion.rows, 'row')} of {Path(name).name}" for name, portion, share in parts
        )
    }
