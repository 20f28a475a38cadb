"""Tiny models with random weights of several families, straight from mlx-lm's definitions."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

VOCABULARY = 64

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {},
    "llama": {},
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "olmo2": {},
    "phi3": {"head_dim": 8, "original_max_position_embeddings": 512},
    "glm4": {"attention_bias": False, "partial_rotary_factor": 0.5, "rope_traditional": True},
    "smollm3": {"no_rope_layer_interval": 2},
    "cohere": {"logit_scale": 0.5},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
}


def tiny_model(family: str, **changes: Any) -> nn.Module:
    """A frozen model with weights from N(0, 0.1), and norms near one."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    settings = _SHAPE | {"model_type": family} | FAMILIES[family] | changes
    model: nn.Module = module.Model(module.ModelArgs.from_dict(settings))
    keys = iter(mx.random.split(mx.random.key(0), 1000))

    def drawn(_: str, array: mx.array) -> mx.array:
        return 0.1 * mx.random.normal(array.shape, key=next(keys)) + (1.0 if array.ndim == 1 else 0.0)

    model.update(tree_map_with_path(drawn, model.parameters()))
    model.freeze()
    mx.eval(model.parameters())
    return model
