"""What a benchmark runs on: a checkpoint of a known shape with random weights, an adapter to start from, and files of rows.

Pure NumPy and safetensors. Knows nothing of lengths (`rows.py` does), nor of trainers but mlx-lm's order of rows.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

IGNORED = -100
"""The label of a token that is not learnt."""

QWEN3_600M: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "use_cache": True,
    "use_sliding_window": False,
}
"""The shape of Qwen/Qwen3-0.6B."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def shape(layers: int, vocabulary: int) -> dict[str, Any]:
    """Qwen3-0.6B's configuration, cut to so many layers and tokens."""
    return QWEN3_600M | {"num_hidden_layers": layers, "vocab_size": vocabulary, "torch_dtype": "float32"}


def make_checkpoint(folder: Path, tokenizer: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Write this shape with random float32 weights and the tokenizer's files; keep what is there."""
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    rng = np.random.default_rng(seed)
    weights = {name: random_weight(dimensions, rng) for name, dimensions in weight_shapes(config).items()}
    unfinished = folder / "unfinished.safetensors"
    save_file(weights, unfinished, metadata={"format": "pt"})
    unfinished.rename(folder / "model.safetensors")
    return folder


def random_weight(dimensions: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Norms of one, matrices from N(0, 0.02), as transformers starts them."""
    if len(dimensions) == 1:
        return np.ones(dimensions, np.float32)
    return rng.standard_normal(dimensions, np.float32) * np.float32(0.02)


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for index in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{index}.{name}.weight": dimensions for name, dimensions in layer.items()}
    return shapes


def linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """[out, in] of the matrices of a block, by the end of their names: `self_attn.q_proj`."""
    prefix, suffix = "model.layers.0.", ".weight"
    return {
        name.removeprefix(prefix).removesuffix(suffix): (dimensions[0], dimensions[1])
        for name, dimensions in weight_shapes(config).items()
        if name.startswith(prefix) and len(dimensions) == 2
    }


@cache
def weight_bytes(model: str, dtype: str) -> int:
    """Bytes of a checkpoint's weights in this precision."""
    with safe_open(Path(model) / "model.safetensors", framework="numpy") as file:
        sizes = [int(np.prod(file.get_slice(name).get_shape())) for name in file.keys()]  # noqa: SIM118
    return sum(sizes) * (4 if dtype == "float32" else 2)


# Adapters


def make_adapter(folder: Path, config: dict[str, Any], rank: int, alpha: float, seed: int = 0) -> Path:
    """Write PEFT's files of an adapter on every linear layer, A and B both random, so that both learn from the first step on."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (out_features, in_features) in linear_shapes(config).items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            bound = 1 / np.sqrt(in_features)
            arrays[f"{module}.lora_A.weight"] = rng.uniform(-bound, bound, (rank, in_features)).astype(np.float32)
            arrays[f"{module}.lora_B.weight"] = random_weight((out_features, rank), rng)
    save_file(arrays, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(name.rpartition(".")[2] for name in linear_shapes(config)),
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return folder


def adapter_arrays(folder: Path) -> dict[str, np.ndarray]:
    """`model.layers.0.self_attn.q_proj.lora_A` [rank, in] and `.lora_B` [out, rank], and so on."""
    arrays = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix("base_model.model.").removesuffix(".weight"): array for name, array in arrays.items()}


# Rows


Row = dict[str, list[int]]
"""`input_ids` and `labels`, not shifted. Its last token is 0, and learnt."""


def write_rows(file: Path, rows: list[Row]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read_rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def needed_tokens(rows: list[Row]) -> int:
    """Tokens that must go through the model: the last one of a row predicts nothing."""
    return sum(len(row["input_ids"]) - 1 for row in rows)


def supervised_tokens(rows: list[Row]) -> int:
    return sum(label != IGNORED for row in rows for label in row["labels"])


def answer_start(row: Row) -> int:
    """Where the last answer of a row begins: behind the last token that is not learnt."""
    return max((index for index, label in enumerate(row["labels"]) if label == IGNORED), default=-1) + 1


def in_mlx_lm_order(rows: list[Row], rows_at_once: int, seed: int) -> list[Row]:
    """The rows as mlx-lm takes them in its first epoch: sorted by length and cut into batches, the batches drawn at random.

    Of rows of one length the file's order decides, so that a file in this order would be taken in another: none may be alike.
    """
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    if any(len(one["input_ids"]) == len(other["input_ids"]) for one, other in pairwise(ordered)):
        raise ValueError("two rows have the same length")
    batches = [ordered[i : i + rows_at_once] for i in range(0, len(ordered) - rows_at_once + 1, rows_at_once)]
    drawn = np.random.RandomState(seed).permutation(len(batches))
    return [row for index in drawn for row in batches[index]]
