"""Adapters of others are, in our hands, the model that they are in those of who trained them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import peft
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm import load as load_in_mlx_lm
from mlx_lm.tuner.utils import linear_to_lora_layers
from transformers import AutoModelForCausalLM

from mlx_sft.convert.targets.mlx import convert
from mlx_sft.load import load_adapter
from tests.parity import assert_close

# PEFT asks a transformers model in a way that transformers has renamed, and says that embeddings are saved, or tied.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def of_peft(base: Path, folder: Path, **settings: Any) -> torch.nn.Module:
    """A model with an adapter that PEFT made and saved, with nothing zero in it."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(r=2, lora_alpha=5, task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(model, config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return adapted


def of_mlx_lm(base: Path, folder: Path, num_layers: int, kind: str = "lora", **parameters: Any) -> Any:
    """A model with an adapter that mlx-lm made, saved as its trainer saves it."""
    model, _ = load_in_mlx_lm(str(base))
    model.freeze()
    stated = {"rank": 3, "scale": 7.0, "dropout": 0.0} | parameters
    linear_to_lora_layers(model, num_layers, stated, use_dora=kind == "dora")
    mx.random.seed(0)
    drawn = {
        name: value + 0.1 * mx.random.normal(value.shape) for name, value in tree_flatten(model.trainable_parameters())
    }
    model.load_weights(list(drawn.items()), strict=False)
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), drawn)
    config = {
        "model": str(base),
        "fine_tune_type": kind,
        "num_layers": num_layers,
        "lora_parameters": stated,
        "iters": 100,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model.eval()


EMBEDDINGS = [
    {"target_modules": ["lm_head", "q_proj"]},
    {"target_modules": ["embed_tokens", "q_proj"]},
    {"target_modules": ["embed_tokens", "lm_head", "v_proj"], "use_rslora": True},
]


@pytest.mark.parametrize("settings", EMBEDDINGS)
@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("qwen3", False), ("gemma3_text", True)])
def test_adapters_on_embeddings_and_head(
    family: str, tied: bool, settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path, torch_logits: Callable,
    mlx_logits: Callable, token_ids: list,
) -> None:  # fmt: skip
    base = make_base(family, tied=tied)
    theirs = of_peft(base, tmp_path / "a", **settings)
    ours = load_adapter(tmp_path / "a", str(base), "float32").model
    assert_close(mlx_logits(ours, token_ids), torch.tensor(torch_logits(theirs, token_ids)))


MLX_LM: list[dict[str, Any]] = [
    {"num_layers": 1},
    {"num_layers": -1, "keys": ["self_attn.q_proj", "mlp.down_proj"]},
    {"num_layers": 1, "keys": ["self_attn.v_proj", "model.embed_tokens"]},
    {"num_layers": -1, "kind": "dora", "keys": ["self_attn.q_proj", "mlp.up_proj"]},
]


@pytest.mark.parametrize("settings", MLX_LM)
def test_adapters_of_mlx_lm(
    settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path, mlx_logits: Callable, token_ids: list
) -> None:
    base = make_base("qwen3", tied=True)
    theirs = of_mlx_lm(base, tmp_path / "a", **settings)
    ours = load_adapter(tmp_path / "a", dtype="float32").model
    assert_close(mlx_logits(ours, token_ids), torch.tensor(mlx_logits(theirs, token_ids)))


def test_experts_of_mlx_lm(
    make_base: Callable[..., Path], tmp_path: Path, mlx_logits: Callable, token_ids: list
) -> None:
    base = convert(
        str(make_base("qwen3_moe")), tmp_path / "base"
    )  # mlx-lm by itself does not read transformers 5's config
    theirs = of_mlx_lm(base, tmp_path / "a", 1)
    assert_close(
        mlx_logits(load_adapter(tmp_path / "a", dtype="float32").model, token_ids),
        torch.tensor(mlx_logits(theirs, token_ids)),
    )


PARAMETERS = [
    {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    {
        "target_modules": [],
        "target_parameters": ["1.mlp.experts.gate_up_proj"],
        "rank_pattern": {"experts.gate_up_proj": 4},
    },
]


@pytest.mark.parametrize("settings", PARAMETERS)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_adapters_on_parameters_of_experts(
    family: str, settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path, torch_logits: Callable,
    mlx_logits: Callable, token_ids: list,
) -> None:  # fmt: skip
    base = make_base(family)
    theirs = of_peft(base, tmp_path / "a", **settings)
    ours = load_adapter(tmp_path / "a", str(base), "float32").model
    assert_close(mlx_logits(ours, token_ids), torch.tensor(torch_logits(theirs, token_ids)))
