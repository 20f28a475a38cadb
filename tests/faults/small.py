"""A model of 150,000 parameters: a run of twelve steps on a few conversations takes half a second.

The tokenizer and the chat template are the embedded model's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from mlx_sft.recommended import TINY

_WIDTH, _HEADS, _HEAD = 32, 2, 16


def make_model(folder: Path, *, layers: int = 1) -> Path:
    """A Qwen3 checkpoint with random weights, float32."""
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    config = json.loads((TINY / "config.json").read_text())
    config |= {
        "hidden_size": _WIDTH,
        "intermediate_size": _WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": 1,
        "head_dim": _HEAD,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    random = np.random.default_rng(0)
    shapes = dict(_shapes(config["vocab_size"], layers))
    weights = {name: random.normal(len(shape) == 1, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _shapes(vocabulary: int, layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The name and shape of each weight; norms are around one."""
    yield "model.embed_tokens.weight", (vocabulary, _WIDTH)
    yield "model.norm.weight", (_WIDTH,)
    for layer in range(layers):
        attention, feed, norm = (f"model.layers.{layer}.{part}" for part in ("self_attn.", "mlp.", ""))
        for name, rows in (("q_proj", _HEADS * _HEAD), ("k_proj", _HEAD), ("v_proj", _HEAD)):
            yield f"{attention}{name}.weight", (rows, _WIDTH)
        yield f"{attention}o_proj.weight", (_WIDTH, _HEADS * _HEAD)
        for name in ("q_norm", "k_norm"):
            yield f"{attention}{name}.weight", (_HEAD,)
        for name in ("gate_proj", "up_proj", "down_proj"):
            yield f"{feed}{name}.weight", (_WIDTH, _WIDTH)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{norm}{name}.weight", (_WIDTH,)
