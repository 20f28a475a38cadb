"""Settings of tiny models of the families that are tested against transformers."""

from __future__ import annotations

from typing import Any

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

_NO_PADDING = {"pad_token_id": None}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
_OF_GEMMA = {"tie_word_embeddings": True, "query_pre_attn_scalar": 16, "pad_token_id": None}

_LINEAR_ATTENTION = {
    "num_hidden_layers": 4,
    "layer_types": [LINEAR, FULL, LINEAR, FULL],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

TORCH_FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {},
    "llama": {},
    "mistral": {"sliding_window": None},
    "gemma2": _OF_GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "sliding_window": 64},
    "gemma3_text": _OF_GEMMA
    | {
        "num_hidden_layers": 4,
        "sliding_window": 8,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 3_000.0},
            FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 50_000.0},
        },
    },
    "phi3": _NO_PADDING | {"original_max_position_embeddings": 512},
    "smollm3": _NO_PADDING | {"no_rope_layer_interval": 2},
    "olmo2": _NO_PADDING,
    "granite": _NO_PADDING
    | {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "glm4": _NO_PADDING | {"rope_parameters": {"rope_theta": 50_000.0, "partial_rotary_factor": 0.5}},
    "lfm2": _NO_PADDING
    | {
        "tie_word_embeddings": True,
        "num_hidden_layers": 4,
        "layer_types": ["conv", FULL, "conv", FULL],
        "block_auto_adjust_ff_dim": False,
    },
    "qwen3_5_text": _NO_PADDING
    | _LINEAR_ATTENTION
    | {"rope_parameters": {"rope_theta": 50_000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "qwen3_next": _NO_PADDING
    | _LINEAR_ATTENTION
    | _EXPERTS
    | {
        "shared_expert_intermediate_size": 40,
        "rope_parameters": {"rope_theta": 50_000.0, "partial_rotary_factor": 0.5},
    },
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 40, "norm_topk_prob": False},
    "qwen3_moe": _EXPERTS,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}
"""By type of model: what is not as in the other families."""

_ROUTED = {"num_local_experts": 4, "num_experts_per_tok": 2}

OTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "apertus": _NO_PADDING,
    "ernie4_5_moe": _NO_PADDING
    | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 0},
    "exaone4": _NO_PADDING | {"sliding_window": 8, "layer_types": [SLIDING, FULL]},
    "falcon_h1": _NO_PADDING
    | {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2},
    "gemma": {"pad_token_id": None},
    "glm": _NO_PADDING,
    "gpt_neox": _NO_PADDING,
    "gpt_oss": _NO_PADDING | _ROUTED | {"sliding_window": 8, "layer_types": [SLIDING, FULL]},
    "granitemoe": _NO_PADDING | _ROUTED,
    "granitemoehybrid": _NO_PADDING
    | _ROUTED
    | {
        "layer_types": [LINEAR, FULL],
        "shared_intermediate_size": 48,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
    },
    "hunyuan_v1_dense": _NO_PADDING,
    "jamba": _NO_PADDING
    | {
        "num_experts": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "minimax_m2": _NO_PADDING | _ROUTED,
    "ministral3": _NO_PADDING | {"sliding_window": None},
    "nemotron_h": _NO_PADDING
    | {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "num_hidden_layers": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "sliding_window": None,
    },
    "olmo3": _NO_PADDING | {"sliding_window": 8, "layer_types": [SLIDING, FULL]},
    "starcoder2": _NO_PADDING,
}
"""Families of which single properties are tested."""
