"""What a run is about to learn, shown before it learns. Knows numbers, not how they came about."""

from __future__ import annotations

import mlx.core as mx

from mlx_sft.console import count, size
from mlx_sft.data.encode import decoded_segments
from mlx_sft.training.identity import differences
from mlx_sft.training.optim import learning_rate
from mlx_sft.training.setup import Job


def show_plan(job: Job) -> None:
    """Before anything is learnt: what from, and how."""
    config, report, console = job.config, job.data.report, job.console
    train = report.train
    trainable = sum(value.size for value in job.parameters.values())
    facts = {
        "model": f"{config.model} ({config.dtype})",
        "rows": f"{count(train.rows)} to learn from, {count(report.valid.rows)} held out"
        + "".join(
            f", {getattr(report, fate)} {fate}" for fate in ("truncated", "dropped", "bad") if getattr(report, fate)
        ),
        "tokens": f"{count(train.tokens)}, {train.supervised_share:.0%} supervised; "
        f"a row has {train.lengths['p50']:.0f} (median) to {train.lengths['max']:.0f}",
        "trains": f"{count(trainable)} parameters ({config.method})",
        "steps": f"{job.plan.total_steps} of {config.batch_size} conversations, "
        f"up to {config.micro_batch_tokens} tokens at once"
        + (", layers recomputed" if config.grad_checkpoint == "on" else ""),
        "memory": f"{size(mx.get_active_memory())} for the weights",
        "run": str(job.run.path),
    }
    console.conversation(
        f"{job.data.train[0].origin}, with what will be learnt",
        decoded_segments(job.base.tokenizer, job.data.train[0]),
    )
    console.facts("Learning from", facts)
    if report.shared:
        console.warn(f"{report.shared} validation rows are also training rows")
    if report.turns_with_text_left_out:
        console.warn(
            f"the chat template leaves out words (reasoning, tool calls) of {report.turns_with_text_left_out} "
            "assistant turns; they cannot be learnt"
        )
    if job.split.body_name is None:
        console.warn(
            "this model's head cannot be told from its body; logits of every position are kept, "
            "which takes more memory and changes nothing else"
        )
    total = job.plan.total_steps
    if config.lr and not any(learning_rate(config, step, total) for step in range(1, total + 1)):
        console.warn("the warm-up takes the whole run, so that nothing is learnt; give --warmup 0, or more steps")
    if config.resume and (changed := differences(job.run)):
        console.warn(f"the last bits may not be the same: since the run began, {', '.join(changed)} changed")
    if job.progress.step:
        console.note(f"resuming after step {job.progress.step}")
