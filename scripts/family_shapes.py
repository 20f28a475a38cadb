"""Small sizes for every family of models, for `families.py`: what a config is given, and what a family needs besides.

No factor is left at one, and no two sizes are the same by accident, so that what is not read, or read in the wrong place, shows.
"""

from __future__ import annotations

from typing import Any

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"

VOCABULARY = 4096
"""Of the tokenizer of the tiny model."""

WINDOW = 8

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": WINDOW,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 4072,
    # Experts.
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "shared_expert_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 40,
    # Latent attention.
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    # Linear attention and state spaces.
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_d_ssm": 128,
    "mamba_expand": 2,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "state_size": 8,
    "n_groups": 2,
}
"""Given to each config that knows the name."""

_TIED = {"tie_word_embeddings": True}
_LATENT = {"head_dim": 8, "num_key_value_heads": 4}
_INDEXED = _LATENT | {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 32}
_LINEAR = {"layer_types": [LINEAR, FULL, LINEAR, FULL]}
_CONVOLUTIONS = _TIED | {"layer_types": ["conv", FULL, "conv", FULL]}
_WITHOUT_WINDOW = {"sliding_window": 64}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "mrope_section": [2, 3, 3]}}
_GRANITE = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
}
_GEMMA = _TIED | {"query_pre_attn_scalar": 12}

FAMILIES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": _LATENT | _LINEAR,
    "cohere": {"logit_scale": 0.5},
    "cohere2": {"logit_scale": 0.5},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v2": _LATENT
    | {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "deepseek_v3": _LATENT,
    "deepseek_v32": _INDEXED,
    "falcon_h1": {
        "embedding_multiplier": 1.5,
        "lm_head_multiplier": 0.7,
        "mlp_multipliers": [0.8, 0.9],
        "key_multiplier": 0.6,
        "attention_out_multiplier": 0.9,
        "attention_in_multiplier": 1.2,
        "ssm_multipliers": [0.9, 0.8, 0.7, 1.2, 1.1],
        "ssm_in_multiplier": 1.3,
        "ssm_out_multiplier": 0.8,
    },
    "gemma": _TIED,
    "gemma2": _GEMMA | _WITHOUT_WINDOW | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": _GEMMA | {"hidden_size": 96, "layer_types": [SLIDING, SLIDING, SLIDING, FULL]},
    "gemma3n_text": _TIED
    | {
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, FULL] * 3,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
    },
    "gemma4_text": _TIED
    | {
        "num_kv_shared_layers": 1,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "pad_token_id": 0,
    },
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _INDEXED,
    "gpt_neox": {"intermediate_size": 256},
    "gptj": {"rotary_dim": 8},
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoehybrid": _GRANITE | _LINEAR | {"shared_intermediate_size": 48, "intermediate_size": 24},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "kimi_linear": _LATENT | _LINEAR,
    "lfm2": _CONVOLUTIONS | {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": _CONVOLUTIONS | {"num_dense_layers": 2},
    "llama4_text": {
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
        "intermediate_size_mlp": 96,
        "intermediate_size": 24,
        "no_rope_layers": [1, 1, 1, 0],
        "moe_layers": [1, 3],
    },
    "longcat_flash": _LATENT
    | {
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "expert_ffn_hidden_size": 24,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "zero_expert_type": "identity",
    },
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minicpm3": _LATENT
    | {
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
            "short_factor": 4 * [1.1],
            "long_factor": 4 * [3.0],
        }
    },
    "ministral3": {
        "sliding_window": None,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "max_position_embeddings": 32,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "mistral": _WITHOUT_WINDOW,
    "mistral4": _LATENT,
    "mixtral": _WITHOUT_WINDOW,
    "nemotron_h": {"sliding_window": None, "moe_shared_expert_intermediate_size": 40, "moe_latent_size": None},
    "olmo_hybrid": _LINEAR,
    "phi3": _WITHOUT_WINDOW,
    "phimoe": _WITHOUT_WINDOW | {"attention_bias": True, "lm_head_bias": True},
    "qwen2_5_vl_text": _SECTIONS,
    "qwen2_vl_text": _SECTIONS,
    "qwen3_vl_moe_text": _SECTIONS | _WITHOUT_WINDOW,
    "qwen3_vl_text": _SECTIONS,
    "recurrent_gemma": {"num_key_value_heads": 1},
    "starcoder2": _WITHOUT_WINDOW,
}
"""By type of model: what it needs besides."""

SEES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
}
"""Of the part that sees."""

WHOLES: dict[str, dict[str, Any]] = {
    "gemma3": _TIED,
    "gemma4": _TIED | {"pad_token_id": 0},
    "mistral3": {"tie_word_embeddings": False},
    "mistral3+ministral3": {"tie_word_embeddings": False},
    "mistral3+mistral4": {"tie_word_embeddings": False},
    "qwen2_5_vl": {},
    "qwen2_vl": {"vision_config": {"embed_dim": 32, "hidden_size": 64}},
    "qwen3_5": {},
    "qwen3_5_moe": {},
    "qwen3_vl": {},
    "qwen3_vl_moe": {},
}
"""Models that see besides; after a plus, the type of the text where it is not the usual one."""

OF_TEXT: dict[str, tuple[str, str, str]] = {
    "gemma3n": ("gemma3n_text", "model.", "model.language_model."),
    "llama4": ("llama4_text", "", "language_model."),
}
"""Wholes whose other parts transformers does not make here: the text's type, and how its tensors' names begin alone and in the whole."""
