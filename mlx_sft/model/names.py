"""The two names of a module or a weight: mlx-lm's, and that of transformers, which checkpoints and PEFT's adapters use.

    language_model.model.layers.0.self_attn.q_proj      model.layers.0.self_attn.q_proj
    model.layers.0.mlp.switch_mlp.up_proj               model.layers.0.mlp.experts.up_proj

mlx-lm stacks the experts of a layer into one module. Its name here is that of each expert's module without the expert's number.
Most names are the same in both.
"""

from __future__ import annotations

from collections.abc import Iterable

_BEGINNINGS = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head", "lm_head"),
)
"""How names begin in a model that holds a language model among others, and how in transformers."""

_PARTS = (
    (".block_sparse_moe.switch_mlp.gate_proj", ".block_sparse_moe.experts.w1"),
    (".block_sparse_moe.switch_mlp.down_proj", ".block_sparse_moe.experts.w2"),
    (".block_sparse_moe.switch_mlp.up_proj", ".block_sparse_moe.experts.w3"),
    (".feed_forward.switch_mlp.gate_proj", ".feed_forward.experts.w1"),
    (".feed_forward.switch_mlp.down_proj", ".feed_forward.experts.w2"),
    (".feed_forward.switch_mlp.up_proj", ".feed_forward.experts.w3"),
    (".mixer.switch_mlp.fc1", ".mixer.experts.up_proj"),
    (".mixer.switch_mlp.fc2", ".mixer.experts.down_proj"),
    (".mlp.switch_mlp.", ".mlp.experts."),
)
"""mlx-lm's names of experts' modules, and those in transformers; the first that is found in a name is replaced."""

EXPERTS_PART = ".experts."
"""What stands before the number of an expert."""


def transformers_name(name: str) -> str:
    """The name in transformers of what mlx-lm, or a checkpoint, calls `name`; also for the beginning of a name."""
    for ours, theirs in _BEGINNINGS:
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    for ours, theirs in _PARTS:
        if ours in name:
            return name.replace(ours, theirs, 1)
    return name


def mlx_names(names: Iterable[str]) -> dict[str, str]:
    """transformers' names → mlx-lm's, for the names in a model of mlx-lm: the inverse of `transformers_name`."""
    return {transformers_name(name): name for name in names}


def expert_name(name: str, expert: int) -> str:
    """`model.layers.0.mlp.experts.up_proj` and 3 → `model.layers.0.mlp.experts.3.up_proj`."""
    before, experts, after = name.rpartition(EXPERTS_PART)
    return f"{before}{experts}{expert}.{after}"


def split_expert(name: str) -> tuple[str, int] | None:
    """The inverse of `expert_name`; None for a name that has no number of an expert."""
    before, experts, after = name.rpartition(EXPERTS_PART)
    number, _, rest = after.partition(".")
    if not experts or not number.isdecimal() or not rest or len(number) > _MOST_DIGITS:
        return None
    return f"{before}{experts}{rest}", int(number)


_MOST_DIGITS = 6
