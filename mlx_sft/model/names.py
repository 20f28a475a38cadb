"""The two names of a module or a weight: mlx-lm's, and that of transformers, which checkpoints and PEFT's adapters use.

    language_model.model.layers.0.self_attn.q_proj      model.layers.0.self_attn.q_proj
    model.layers.0.mlp.switch_mlp.up_proj               model.layers.0.mlp.experts.up_proj

mlx-lm stacks the experts of a layer into one module. Its name here is that of each expert's module without the expert's number.
Most names are the same in both.

A language model inside of one that can also see has the names of the text alone here. What they are in the class with which transformers
opens such a checkpoint, its `Opening` says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True, slots=True)
class Opening:
    """The class with which transformers opens a checkpoint.

    Attributes:
        auto_class: Its class that finds that one by config.json.
        family: The `model_type` in the config of the model that comes out.
        begins: How the names of the language model's modules begin in it: `model.`, or longer where other modules stand beside them.
        alone: Whether it takes the language model alone out of a checkpoint that can also see; in a class for the whole, names are others.
    """

    auto_class: str
    family: str
    begins: str = "model."
    alone: bool = False

    def name(self, name: str) -> str:
        """The name there of what is called `name` here."""
        return self.begins + name.removeprefix("model.") if name.startswith("model.") else name


def opening(config: Mapping[str, Any]) -> Opening | None:
    """How transformers opens a checkpoint with this `config.json`; None for one that can also see and whose class is not known.

    Several classes open some of the checkpoints that can also see; this is the one of AutoModelForCausalLM, where that finds one.
    """
    family = str(config.get("model_type"))
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return Opening(CAUSAL_LM, family)
    if family in _TEXT_ALONE:
        return Opening(CAUSAL_LM, str(text.get("model_type") or f"{family}_text"), alone=True)
    if family in _WHOLE:
        return Opening(CAUSAL_LM, family, INSIDE)
    return Opening(_SEEING, family, INSIDE) if family in _NO_CAUSAL_LM else None


CAUSAL_LM, _SEEING = "AutoModelForCausalLM", "AutoModelForImageTextToText"
"""The classes of transformers that find a model's own by its config.json."""

INSIDE = "model.language_model."
"""How names of a language model's modules begin where other modules stand beside them."""

_TEXT_ALONE = frozenset({"llama4", "qwen3_5", "qwen3_5_moe"})
"""Families that can also see, of which AutoModelForCausalLM takes the language model alone."""

_WHOLE = frozenset({"gemma3", "gemma3n", "gemma4", "gemma4_unified"})
"""Families of which it takes the whole."""

_NO_CAUSAL_LM = frozenset({
    "kimi_k25", "lfm2_vl", "llava", "minimax_m3_vl", "mistral3", "muse_glimmer", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe",
})  # fmt: skip
"""Families that it does not open."""


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
