"""Families of which mlx-lm's code, as it is, computes or reads another model: here they are transformers', or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx_lm.models.gemma3_text import Gemma3Model
from transformers import AutoConfig, AutoModelForImageTextToText

from mlx_sft import train
from mlx_sft.config import TrainConfig
from mlx_sft.convert.targets.mlx import convert
from mlx_sft.errors import UserError
from mlx_sft.model.load import load_model
from mlx_sft.model.outline import outline
from mlx_sft.model.stored_form import give_mlx_form
from tests.parity import assert_close
from tests.torch_families import FULL, LINEAR, SLIDING

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}


_MULTIPLIERS = {
    "embedding_multiplier": 1.5, "lm_head_multiplier": 0.7, "mlp_multipliers": [0.8, 0.9], "key_multiplier": 0.6,
    "attention_in_multiplier": 1.2, "attention_out_multiplier": 0.9, "ssm_multipliers": [0.9, 0.8, 0.7, 1.2, 1.1],
    "ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        # Another GELU.
        ("gemma", {"tie_word_embeddings": True}),
        ("starcoder2", {"hidden_act": "gelu_pytorch_tanh", "sliding_window": None}),
        ("gpt_neox", {"hidden_act": "gelu", "intermediate_size": 256}),
        # The scale of embeddings, whose root is no number of bfloat16.
        ("gemma3_text", {"tie_word_embeddings": True, "hidden_size": 96}),
        # The routing bias.
        ("ernie4_5_moe", {}),
        # A gated norm in groups, and the types of layers by other names.
        ("granitemoehybrid", {"mamba_n_groups": 2}),
        ("granitemoehybrid", {"mamba_n_groups": 1, "num_local_experts": 0, "position_embedding_type": "rope"}),
        ("nemotron_h", {"time_step_min": 0.5}),
        # Multipliers.
        ("falcon_h1", _MULTIPLIERS),
        ("falcon_h1", _MULTIPLIERS | {"tie_word_embeddings": True}),
        # Rotations.
        ("gpt_oss", {"rope_parameters": YARN | {"truncate": False}}),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 1.5}}),
        ("llama", {"rope_parameters": YARN | {"truncate": False, "beta_fast": 16.0, "mscale": 0.7, "mscale_all_dim": 0.3}}),
        ("ministral3", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.3, "mscale": 1.0, "mscale_all_dim": 1.0}}),
        ("olmo3", {"rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 1e4}}}),
        ("glm", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("gpt_neox", {
            "intermediate_size": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.5},
        }),
        ("hunyuan_v1_dense", {"rope_parameters": {
            "rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "mscale": 1.0,
        }}),
        # Settings that a config of transformers 5 says in other words.
        ("apertus", {}),
        ("exaone4", {}),
        ("minimax_m2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ],
)  # fmt: skip
def test_the_logits_are_those_of_transformers(
    family: str,
    settings: dict[str, Any],
    make_base: Callable[..., Path],
    torch_model: Callable,
    torch_logits: Callable,
    mlx_logits: Callable,
    token_ids: list,
) -> None:
    base = make_base(family, tied=family.startswith("gemma"), **settings)
    model = load_model(str(base), "float32").model
    assert_close(mlx_logits(model, token_ids), torch.tensor(torch_logits(torch_model(base), token_ids)))
    assert outline(base, "float32").model is not None


@pytest.mark.parametrize(("dtype", "same"), [("bfloat16", True), ("float16", False), ("float32", False)])
def test_only_in_bfloat16_gemma_3_is_mlx_lms_own(
    dtype: str, same: bool, make_base: Callable[..., Path], token_ids: list
) -> None:
    """There the root of the width is the same number, so that what is written in mlx-lm's form is computed there as here."""
    model = load_model(str(make_base("gemma3_text", tied=True, hidden_size=96)), dtype).model
    theirs = Gemma3Model.__call__(model.model, mx.array(token_ids))
    assert bool(mx.array_equal(model.model(mx.array(token_ids)), theirs)) == same
    give_mlx_form(model)
    model.set_dtype(mx.float32)  # as where MLX computes on a CPU what will be computed in bfloat16
    theirs = Gemma3Model.__call__(model.model, mx.array(token_ids))
    assert bool(mx.array_equal(model.model(mx.array(token_ids)), theirs)) == same


@pytest.mark.parametrize(
    ("family", "settings", "what"),
    [
        ("jamba", {}, "sum to one"),
        ("phimoe", {"num_experts_per_tok": 3, "attention_bias": True, "lm_head_bias": True}, "two experts"),
        ("falcon_h1", {"mamba_rms_norm": True}, "groups"),
    ],
)
def test_what_is_not_computed_here_either_is_refused_by_name(
    family: str, settings: dict[str, Any], what: str, make_base: Callable[..., Path]
) -> None:
    base = make_base(family, **settings)
    for load in (lambda: load_model(str(base), "float32"), lambda: outline(base, "float32")):
        with pytest.raises(
            UserError, match=rf"computes models of type {family} otherwise than transformers: .*{what}"
        ) as caught:
            load()
        assert caught.value.where == str(base)
        assert "newer mlx-lm" in caught.value.hint


def test_a_model_whose_attention_scales_positions_is_trained_with_its_rows_apart(
    make_base: Callable[..., Path], settings: dict[str, Any]
) -> None:
    """Rows that are joined end to end would have other positions."""
    base = make_base("ministral3", rope_parameters=YARN | {"llama_4_scaling_beta": 0.3})
    assert train(TrainConfig(**settings | {"model": str(base), "max_steps": 1})).run_dir.is_dir()


def test_what_mlx_lm_would_compute_otherwise_is_not_written_in_its_form(
    make_base: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="computes models of this family otherwise") as caught:
        convert(str(make_base("ernie4_5_moe")), tmp_path / "mlx")
    assert "--format merged" in caught.value.hint


_SEES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    "depth": 1, "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0],
}  # fmt: skip
_SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


@pytest.mark.parametrize(
    ("whole", "family", "more"),
    [
        ("qwen2_5_vl", "qwen2_5_vl_text", {"rope_parameters": _SECTIONS}),
        ("qwen3_vl", "qwen3_vl_text", {"rope_parameters": _SECTIONS}),
        ("qwen3_vl_moe", "qwen3_vl_moe_text", {"rope_parameters": _SECTIONS, "num_experts": 4, "moe_intermediate_size": 24}),
        ("qwen3_5_moe", "qwen3_5_moe_text", {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
            "layer_types": [LINEAR, FULL],
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        }),
        ("mistral3", "mistral", {"sliding_window": None}),
        ("mistral3", "ministral3", {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.3}}),
    ],
)  # fmt: skip
def test_the_text_of_one_that_sees_is_transformers(
    whole: str,
    family: str,
    more: dict[str, Any],
    make_base: Callable[..., Path],
    tmp_path: Path,
    mlx_logits: Callable,
    token_ids: list,
) -> None:
    text = json.loads((make_base("llama") / "config.json").read_text())
    kept = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    text = (
        {name: text[name] for name in kept}
        | {"model_type": family, "max_position_embeddings": 512, "pad_token_id": None}
        | more
    )
    torch.manual_seed(0)
    tied = {"tie_word_embeddings": False}
    config = AutoConfig.for_model(whole, text_config=text, vision_config=_SEES, **tied)
    reference = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.copy_(
                0.1 * torch.randn_like(parameter)
                if parameter.ndim > 1
                else parameter + 0.2 * torch.randn_like(parameter)
            )
    base = tmp_path / "base"
    reference.save_pretrained(base)
    for file in make_base("llama").glob("*token*"):
        shutil.copy(file, base)
    with torch.no_grad():
        theirs = reference(input_ids=torch.tensor(token_ids)).logits
    tolerance = 1e-4 if family.startswith("qwen3_5") else 1e-5
    ours = mlx_logits(load_model(str(base), "float32").model, token_ids)
    assert_close(ours, theirs, tolerance)

    # transformers 4 wrote the settings of Qwen 2.5 VL's text beside those of what sees.
    if whole == "qwen2_5_vl":
        written = json.loads((base / "config.json").read_text())
        flat = {name: value for name, value in written["text_config"].items() if name != "model_type"}
        flat |= {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
        del flat["rope_parameters"], written["text_config"]
        (base / "config.json").write_text(json.dumps(flat | written))
        assert np.array_equal(mlx_logits(load_model(str(base), "float32").model, token_ids), ours)
