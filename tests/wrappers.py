"""Tiny checkpoints that can also see, made by transformers, with a language model of a tested family inside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tests.torch_families import FULL, SLIDING

_SEES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    "depth": 2, "num_heads": 2, "out_hidden_size": 64,
}  # fmt: skip

_GEMMA_4 = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "layer_types": [SLIDING, FULL],
    "sliding_window": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 264,
    "eos_token_id": 257,
    "initializer_range": 0.1,
}

_PLAIN = {
    name: value for name, value in _GEMMA_4.items() if name not in ("global_head_dim", "layer_types", "sliding_window")
}

NO_CAUSAL_LM = ["mistral3", "qwen2_vl", "qwen3_vl"]
"""Families that AutoModelForCausalLM does not open."""

WRAPPERS = {"gemma3": "gemma3_text", "gemma4": None, "qwen3_5": "qwen3_5_text"}
"""By the family of the whole, that of the language model inside of it where that is one of the tested."""


def make_wrapper(kind: str, make_base: Callable[..., Path], folder: Path) -> Path:
    """A checkpoint in `folder` with nothing zero in it, also not in the tower that sees."""
    text = WRAPPERS.get(kind)
    tied = kind.startswith("gemma")
    alone = make_base(text or "qwen3", tied=tied)
    settings: dict[str, Any] = (
        AutoConfig.from_pretrained(alone).to_dict() if text else dict(_GEMMA_4 if tied else _PLAIN)
    )
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, text_config=settings, vision_config=_SEES, tie_word_embeddings=tied)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager")
    with torch.no_grad():  # transformers starts norms at one and biases at zero, which would hide a mistake in them
        for values in (
            *model.parameters(),
            *(buffer for _, buffer in model.named_buffers() if buffer.is_floating_point()),
        ):
            values.add_(0.1 * torch.randn_like(values)) if values.ndim else None
    model.save_pretrained(folder)
    if kind == "gemma4":  # as in its checkpoints on the Hub; transformers writes it layer by layer
        written = json.loads((folder / "config.json").read_text())
        written["text_config"]["global_head_dim"] = _GEMMA_4["global_head_dim"]
        (folder / "config.json").write_text(json.dumps(written))
    for file in (*alone.glob("*token*"), *alone.glob("*.jinja")):
        shutil.copy(file, folder)
    return folder
