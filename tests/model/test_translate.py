"""How far mlx-lm's code is the model that the checkpoint describes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlx_lm.utils import load_model
from transformers import AutoConfig, AutoModelForCausalLM

from mlx_sft.errors import UserError
from mlx_sft.model.translate import exact_length, translate_config

FULL, SLIDING = "full_attention", "sliding_attention"
DYNAMIC = {"type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({"model_type": "qwen3", "sliding_window": None, "max_position_embeddings": 64}, None),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 32}, None),
        # Read by no one in mlx-lm, or only with types of layers that the family does not have.
        ({"model_type": "mistral", "sliding_window": 4096}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mixtral", "sliding_window": 9}, 9),
        ({"model_type": "mixtral"}, None),
        ({"model_type": "phi3", "sliding_window": 2047}, 2047),
        ({"model_type": "phi3"}, None),
        ({"model_type": "starcoder2", "sliding_window": 4096}, 4096),
        ({"model_type": "gemma2", "sliding_window": 9}, 9),
        ({"model_type": "gemma2", "num_hidden_layers": 2, "layer_types": 2 * [FULL]}, None),
        # Read as it is meant.
        ({"model_type": "mistral", "sliding_window": 9, "num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}, None),
        ({"model_type": "olmo3", "sliding_window": 9}, None),
        ({"model_type": "gpt_oss", "sliding_window": 9, "num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}, None),
        ({"model_type": "cohere2", "sliding_window": 9, "num_hidden_layers": 8}, None),
        ({"model_type": "cohere2", "sliding_window": 9, "num_hidden_layers": 6, "sliding_window_pattern": 3}, None),
        # The types of layers are not those of the pattern that mlx-lm's code goes by.
        ({"model_type": "cohere2", "sliding_window": 9, "num_hidden_layers": 2, "layer_types": [FULL, SLIDING]}, 9),
        # transformers knows no window for llama, and mlx-lm would run one.
        ({"model_type": "llama", "sliding_window": 9, "num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}, 9),
        ({"model_type": "llama", "sliding_window": 9}, None),
        # A family that transformers does not have.
        ({"model_type": "xverse", "sliding_window": 9, "num_hidden_layers": 2}, 9),
        ({"model_type": "xverse", "sliding_window": 9, "num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}, None),
        # Sparse attention that chooses among positions.
        ({"model_type": "deepseek_v32", "index_topk": 32}, 32),
        ({"model_type": "llama", "rope_scaling": DYNAMIC, "max_position_embeddings": 64}, 64),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 64},
         64),
        ({"model_type": "mistral", "sliding_window": 32, "rope_scaling": DYNAMIC, "max_position_embeddings": 64}, 32),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "default"}, "max_position_embeddings": 64}, None),
    ],
)  # fmt: skip
def test_rows_may_be_as_long_as_the_arithmetic_is_the_models(
    tmp_path: Path, config: dict[str, Any], most: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert exact_length(tmp_path) == most


@pytest.mark.parametrize("family", ["mistral", "phi3", "gemma2", "starcoder2", "cohere2"])
def test_the_arithmetic_is_transformers_up_to_the_exact_length_and_not_beyond(
    family: str, tmp_path: Path, mlx_logits: Callable[..., np.ndarray], torch_logits: Callable[..., np.ndarray]
) -> None:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    more = {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 6, "pad_token_id": 0, "initializer_range": 0.5}
    more |= {"layer_types": 2 * [SLIDING, FULL]} if family == "gemma2" else {}
    config = AutoConfig.for_model(family, **shape, **more, bos_token_id=1, eos_token_id=2)
    reference = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    reference.save_pretrained(tmp_path)
    most = exact_length(tmp_path)
    assert most == (None if family == "cohere2" else 6)

    model, _ = load_model(tmp_path, model_config=translate_config(tmp_path))
    rows = np.random.default_rng(1).integers(3, 50, (1, 12)).tolist()
    apart = np.abs(mlx_logits(model, rows) - torch_logits(reference, rows)).max(axis=(0, 2))
    assert apart[: most or 12].max() < 2e-3
    assert most is None or apart[most:].max() > 2e-2


def test_what_transformers_does_not_take_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "rope_scaling": {"type": "dynamic"}}))
    with pytest.raises(UserError, match="transformers does not take it: Missing required keys"):
        translate_config(tmp_path)
