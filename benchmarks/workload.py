"""What a benchmark runs on: a checkpoint of a known shape with random weights, and rows of known lengths.

Pure NumPy and safetensors. Knows nothing of trainers.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

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

PAIR_LENGTHS = (
    (0, 31),
    (0.05, 39),
    (0.25, 49),
    (0.5, 100),
    (0.75, 150),
    (0.9, 179),
    (0.95, 198),
    (0.99, 349),
    (1, 467),
)
"""Quantiles of a short instruction pair's length in tokens, as measured on 1,800 real ones."""
PROMPT_LENGTHS = ((0, 14), (0.05, 15), (0.5, 19), (0.95, 26), (1, 31))
"""Of these, the tokens up to the answer."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_checkpoint(folder: Path, tokenizer: Path, layers: int, seed: int = 0) -> Path:
    """Write Qwen3-0.6B's shape, cut to `layers`, with random float32 weights and the tokenizer's files; keep what is there."""
    config = QWEN3_600M | {"num_hidden_layers": layers, "torch_dtype": "float32"}
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    rng = np.random.default_rng(seed)
    weights = {name: random_weight(shape, rng) for name, shape in weight_shapes(config).items()}
    unfinished = folder / "unfinished.safetensors"
    save_file(weights, unfinished, metadata={"format": "pt"})
    unfinished.rename(folder / "model.safetensors")
    return folder


def random_weight(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Norms of one, matrices from N(0, 0.02), as transformers starts them."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    return rng.standard_normal(shape, np.float32) * np.float32(0.02)


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
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def rows_from(file: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows of a .jsonl file with `messages`, or `prompt` and `completion`, drawn without replacement."""
    lines = file.read_text(encoding="utf-8").splitlines()
    if len(lines) < count:
        raise SystemExit(f"error: {file}: {len(lines)} rows, but --rows {count}")
    chosen = np.random.default_rng(seed).permutation(len(lines))[:count]
    return [as_messages(json.loads(lines[index])) for index in chosen]


def as_messages(row: dict[str, Any]) -> dict[str, Any]:
    if "messages" in row:
        return {"messages": row["messages"]}
    user = {"role": "user", "content": row["prompt"]}
    return {"messages": [user, {"role": "assistant", "content": row["completion"]}]}


def short_pairs(tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[dict[str, Any]]:
    """Question and answer pairs of random words, their lengths spread evenly over the quantiles above."""
    rng = np.random.default_rng(seed)
    words = single_token_words(tokenizer)
    at = (np.arange(count) + 0.5) / count
    lengths = rng.permutation(np.interp(at, *zip(*PAIR_LENGTHS, strict=True)).astype(int))
    prompts = rng.permutation(np.interp(at, *zip(*PROMPT_LENGTHS, strict=True)).astype(int))
    frame = template_tokens(tokenizer)

    def text(tokens: int) -> str:
        return "".join(rng.choice(words, max(1, tokens))).strip()

    return [
        as_messages({"prompt": text(prompt - frame), "completion": text(length - prompt - 2)})
        for length, prompt in zip(lengths, prompts, strict=True)
    ]


def single_token_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Short lower-case words that are one token after a space."""
    candidates = (tokenizer.decode([token_id]) for token_id in range(min(len(tokenizer), 8000)))
    return [w for w in candidates if w[:1] == " " and w[1:].isascii() and w[1:].isalpha() and w.islower()]


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that the template puts around a one-word question."""
    question = [{"role": "user", "content": "a"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    return len(ids) - 1


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)
