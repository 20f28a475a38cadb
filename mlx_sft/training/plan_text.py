"""A plan as pieces of text, each with its look. Knows words and layout; knows nothing of how a plan is made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlx_sft.console import Look, count, duration, size
from mlx_sft.training.arithmetic import REACHED
from mlx_sft.training.batch_settings import configured
from mlx_sft.training.memory import MODES
from mlx_sft.training.plan import RunPlan

Pieces = Iterator[tuple[str, Look]]

_MODES = [configured(mode) for mode in MODES]


def plan_pieces(plan: RunPlan) -> Pieces:
    """What each part takes, what `train` would choose, what fits here and on common Macs."""
    yield from _facts(plan)
    yield from _lengths(plan)
    yield from _macs(plan)


def _facts(plan: RunPlan) -> Pieces:
    config, machine, parts, chosen = plan.config, plan.machine, plan.predicted, plan.settings
    yield f"{config.model} on {machine.name}\n", "title"
    rows = [
        ("may take", f"{size(machine.memory)} ({machine.basis})"),
        ("weights", f"{size(parts.weights)} in {plan.dtype}"),
        (
            "trained",
            f"{size(parts.trained)} for {count(plan.footprint.trainable)} parameters: value, gradient and two moments",
        ),
        ("kept", f"{size(parts.kept)} for the backward pass"),
        ("passing", f"{size(parts.passing)} for a layer's backward pass, or the logits of a tile"),
        ("peak", f"{size(parts.peak)} predicted"),
        ("longest row", f"{plan.longest.tokens:,} tokens ({plan.longest.origin})"),
    ]
    if chosen is not None:
        settings = f"--micro-batch-tokens {chosen.micro_batch_tokens} --grad-checkpoint {configured(chosen.mode)}"
        rows.append(("settings", f"{settings} --dtype {plan.dtype}"))
    rows += _time(plan)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        yield f"  {name:{width}}  ", "faint"
        yield f"{value}\n", "plain"
    if plan.refusal is not None:
        yield f"  train would refuse: {plan.refusal}\n", "bad"
    yield "\n", "plain"


def _time(plan: RunPlan) -> list[tuple[str, str]]:
    if plan.work is None:
        return [("time", "give --data for an estimate")]
    taken = plan.seconds()
    if taken is None:
        return [("time", "no estimate: this chip's speed is not known; name it, as in --machine 'M2 16GB'")]
    source = "measured now" if plan.measured else "from a table"
    basis = f"products at {plan.teraflops:.2g} TFLOP/s ({source}), of which steps reach {REACHED:.0%}"
    epochs = f"{plan.epochs:.3g} epoch{'' if plan.epochs == 1 else 's'}"
    tokens = f"{epochs} of {count(plan.work.tokens)} tokens"
    return [("time", f"about {duration(taken)} for {tokens}: an estimate from {basis}")]


def _lengths(plan: RunPlan) -> Pieces:
    yield f"Rows that fit at once on {plan.machine.name}, by their length and --grad-checkpoint\n", "title"
    head = ["tokens", *_MODES]
    rows = [
        [f"{found['length']:,}", *(f"{found[mode]['rows']:,}" if found[mode]["rows"] else "-" for mode in _MODES)]
        for found in plan.lengths()
    ]
    yield from _table(head, rows)


def _macs(plan: RunPlan) -> Pieces:
    yield "Common Macs: settings for the longest row, and the longest row that fits, by --grad-checkpoint\n", "title"
    head = ["memory", "may take", "settings", *_MODES]
    rows = []
    for found in plan.common_macs():
        settings = f"{found['micro_batch_tokens']} tokens, {found['grad_checkpoint']}"
        rows.append(
            [
                f"{found['gigabytes']} GB",
                size(found["working_set_bytes"]),
                settings if found["grad_checkpoint"] else "does not fit",
                *(f"{tokens:,}" if tokens else "-" for tokens in found["longest_row"].values()),
            ]
        )
    yield from _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Pieces:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for line, look in [(head, "faint"), *((row, "plain") for row in rows)]:
        text = "  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True))
        yield f"  {text}\n", "faint" if look == "faint" else "plain"
    yield "\n", "plain"
