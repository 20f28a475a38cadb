"""What llama.cpp takes to be otherwise than a checkpoint says is refused before the conversion; published models are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import UserError, export
from mlx_sft.convert.targets.gguf.assumed import notes_of, refuse_other_settings

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 4, "vocab_size": 128}
_27B = {"num_attention_heads": 32, "head_dim": 128}
SLIDING, FULL = "sliding_attention", "full_attention"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONG = {"max_position_embeddings": 256, "original_max_position_embeddings": 64, "sliding_window": None}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.1] * 8, "long_factor": [3.0] * 8,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def written(folder: Path, family: str, **settings: Any) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": family} | SHAPE | settings))
    return folder


@pytest.mark.parametrize(
    ("family", "settings", "taken"),
    [
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob to be True, and here it is False"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob to be False"),
        ("qwen3", {"attention_bias": True}, "attention_bias to be False"),
        ("gemma2", {"query_pre_attn_scalar": 12}, "query_pre_attn_scalar to be 16.0, and here it is 12"),
        ("gemma3_text", {"query_pre_attn_scalar": 16, "layer_types": [SLIDING, FULL] * 2}, "layer_types to be"),
        ("exaone4", {"sliding_window": 64, "layer_types": [SLIDING, SLIDING, SLIDING, FULL]}, "layer_types to be ['full"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 1]}, "no_rope_layers to be [1, 1, 1, 0]"),
        ("qwen2", {"rope_parameters": LLAMA_3}, "the type of rope_parameters to be default, and here it is llama3"),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 1.7}}, "attention_factor of rope_parameters to be 1.1386"),
        ("phi3", LONG | {"rope_parameters": LONGROPE | {"attention_factor": 1.5}}, "attention_factor of rope_parameters to be 1.1547"),
        ("phi3", LONG | {"rope_parameters": LONGROPE | {"factor": 8.0}}, "to be 1.1547, and here it is 1.2247"),
        ("qwen2", {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}, "to be 1.1386, and here it is 0.9635"),
    ],
)  # fmt: skip
def test_another_value_is_refused_by_name(family: str, settings: dict[str, Any], taken: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        refuse_other_settings(written(tmp_path, family, **settings))
    assert f"of models of type {family} it takes" in error.value.what
    assert taken in error.value.what
    assert "--format merged" in error.value.hint


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3_moe", {"norm_topk_prob": True}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        # The two of 27B: the share of the width, and not a head's size.
        ("gemma2", _27B | {"num_hidden_layers": 46, "hidden_size": 4608, "query_pre_attn_scalar": 144}),
        ("gemma3_text", _27B | {"num_hidden_layers": 62, "hidden_size": 5376, "query_pre_attn_scalar": 168}),
        ("gemma3_text", {"query_pre_attn_scalar": 16, "layer_types": [SLIDING] * 4}),
        ("smollm3", {}),
        ("llama", {"rope_parameters": LLAMA_3}),
        ("qwen2", {"rope_parameters": YARN}),
        ("phi3", LONG | {"rope_parameters": LONGROPE}),
        ("phi3", LONG | {"rope_parameters": LONGROPE | {"attention_factor": 1.1547005}}),
        ("qwen3", {"rope_parameters": YARN | {"attention_factor": 1.138629436}}),
    ],
)  # fmt: skip
def test_what_llama_cpp_computes_passes(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    refuse_other_settings(written(tmp_path, family, **settings))


def test_what_it_computes_within_limits_is_noted(tmp_path: Path) -> None:
    (window,) = notes_of(written(tmp_path, "phi3", sliding_window=2047, max_position_embeddings=4096))
    assert "up to 2047 tokens" in window
    assert not notes_of(written(tmp_path, "phi3", sliding_window=262144, max_position_embeddings=131072))
    assert not notes_of(written(tmp_path, "qwen2", use_sliding_window=False, sliding_window=64))
    (bounds,) = notes_of(written(tmp_path, "gpt_oss", rope_parameters=YARN | {"truncate": False}))
    assert "llama.cpp rounds YaRN's bounds" in bounds
    (context,) = notes_of(written(tmp_path, "phi3", **LONG, rope_parameters=LONGROPE))
    assert "a context (-c) of 64 tokens" in context


@pytest.mark.parametrize("form", ["gguf", "gguf-adapter"])
def test_nothing_is_converted_then(
    form: str, tmp_path: Path, make_base: Any, make_run: Any, make_llama_cpp: Any
) -> None:
    run = make_run(make_base("qwen2", rope_parameters=LLAMA_3))
    with pytest.raises(UserError, match=r"llama\.cpp would compute another model"):
        export(run.path, tmp_path / "out", format=form, llama_cpp=make_llama_cpp())
    assert not (tmp_path / "out").exists()
