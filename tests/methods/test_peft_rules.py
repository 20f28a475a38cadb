"""The rules by which PEFT opens an adapter, written down without it, are PEFT's and transformers' own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from mlx_lm import models as models_of_mlx_lm
from mlx_lm import utils as mlx_lm_utils
from peft.tuners import tuners_utils
from peft.utils import transformers_weight_conversion as conversion
from transformers import AutoConfig, conversion_mapping, core_model_loading

from mlx_sft.errors import UserError
from mlx_sft.load import load_adapter
from mlx_sft.methods.lora import LoraSettings
from mlx_sft.methods.peft_base import peft_base
from mlx_sft.methods.peft_files import lost_by_peft, write_adapter
from mlx_sft.methods.peft_rules import _MAMBA, _NOT_IN_MAMBA, _OF_EXPERTS, _PUT_TOGETHER, _RENAMED, renamed
from mlx_sft.model import names
from mlx_sft.model.names import opening
from tests.torch_families import TORCH_FAMILIES
from tests.wrappers import WRAPPERS, make_wrapper

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
    # What PEFT says of what it loses, where it says anything.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

FAMILIES_OF_MLX_LM = {
    *(path.stem for path in Path(models_of_mlx_lm.__path__[0]).glob("*.py")),
    *mlx_lm_utils.MODEL_REMAPPING,
}

# --- the tables ---------------------------------------------------------------------------------------------------------------------


def test_the_names_of_experts_are_those_that_peft_puts_together() -> None:
    assert _OF_EXPERTS == conversion._MOE_TARGET_MODULE_MAPPING
    halves = {
        kind: {"gate_up_proj": [name for name, place in of.items() if place == "gate_up_proj"]}
        for kind, of in _OF_EXPERTS.items()
    }
    assert halves == conversion._MOE_FUSED_TARGETS


def test_the_families_whose_experts_are_put_together_are_pefts() -> None:
    patterns = conversion._MODEL_TO_CONVERSION_PATTERN
    for kind, families in _PUT_TOGETHER.items():
        known = {family for family in FAMILIES_OF_MLX_LM if patterns.get(family) == kind}
        assert set(families) == known


def _names_of_modules() -> set[str]:
    """Such as checkpoints have: every part that a pattern of transformers may look for, in every place."""
    parts = {
        "self_attn",
        "attn.attention",
        "attention",
        "mlp",
        "block_sparse_moe",
        "feed_forward",
        "mixer",
        "linear_attn",
    }
    parts |= {
        f"{part}.{shared}" for part in ("mlp", "block_sparse_moe") for shared in ("shared_expert", "shared_experts")
    }
    last = {
        "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "in_proj", "qkv_proj", "kv_b_proj", "f_proj", "f_a_proj", "f_b_proj", "dense",
        "gate", "router", "router.layer", "gate_proj", "up_proj", "down_proj", "gate_up_proj", "c_fc_0", "c_fc_1", "c_proj", "w1", "w2",
    }  # fmt: skip
    layers = ("model.layers.0", "transformer.h.0", "backbone.layers.0", "model.h.0")
    inside = {f"{layer}.{part}.{name}" for layer, part, name in itertools.product(layers, parts, last)}
    return inside | {
        "lm_head",
        "model.norm",
        "model.embed_tokens",
        "transformer.wte",
        "transformer.ln_f",
        "model.word_embeddings",
    }


def test_transformers_5_renames_the_modules_of_these_families_so_and_of_no_other() -> None:
    known = {name for name in FAMILIES_OF_MLX_LM if not names.opening({"model_type": name, "text_config": {}})}
    for family in known:
        transforms = conversion_mapping.get_checkpoint_conversion_mapping(family) or []
        renamings = [one for one in transforms if isinstance(one, core_model_loading.WeightRenaming)]
        for name in _names_of_modules():
            theirs, _ = core_model_loading.rename_source_key(f"{name}.weight", renamings, [])
            if family.startswith("granitemoe") and ".router.layer" in name:
                continue  # beside experts that are one tensor, which no adapter is trained on
            if family == "laguna" and ".shared_experts." in name:
                continue  # as transformers calls them, and its checkpoints do not
            assert f"{renamed(family, name)}.weight" == theirs, family
    assert _RENAMED.keys() <= known


def test_the_models_with_modules_that_peft_leaves_out_are_pefts() -> None:
    class Model:
        config = type("Config", (), {})

    def refused(family: str, module: str) -> bool:
        model: Any = Model()
        model.config.model_type = family
        try:
            tuners_utils._check_lora_target_modules_mamba(peft.LoraConfig(), model, module)
        except ValueError:
            return True
        return False

    modules = (*_NOT_IN_MAMBA, "in_proj", "x_proj", "q_proj")
    for family in FAMILIES_OF_MLX_LM | _MAMBA:
        assert [module for module in modules if refused(family, module)] == (
            list(_NOT_IN_MAMBA) if family in _MAMBA else []
        )


_TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "depth": 1, "num_heads": 2,
    "out_hidden_size": 32, "image_size": 28, "patch_size": 14,
}  # fmt: skip
_NEEDS_MORE = {"gemma3n"}
"""Whose tower is of a package that is not installed."""


@pytest.mark.parametrize("family", sorted((names._TEXT_ALONE | names._WHOLE | names._NO_CAUSAL_LM) - _NEEDS_MORE))
def test_the_class_that_opens_a_model_that_can_also_see(family: str) -> None:
    experts = {"moe_intermediate_size": 24, "num_experts": 4} if "moe" in family else {}
    tower = {} if family == "gemma4_unified" else {"vision_config": _TOWER}
    config = AutoConfig.for_model(family, text_config=_TEXT | experts, **tower)
    with torch.device("meta"):
        try:
            model = transformers.AutoModelForCausalLM.from_config(config)
            auto_class = "AutoModelForCausalLM"
        except ValueError:
            model = transformers.AutoModelForImageTextToText.from_config(config)
            auto_class = "AutoModelForImageTextToText"
    found = opening({"model_type": family, "text_config": {"model_type": config.text_config.model_type}})
    assert found is not None
    assert (found.auto_class, found.family) == (auto_class, model.config.model_type)
    modules = {name for name, _ in model.named_modules()}
    assert {found.name("model.layers.0"), found.name("model.layers.1"), "lm_head"} <= modules
    assert found.name("model.layers.2") not in modules


# --- a verdict, beside what PEFT does ---------------------------------------------------------------------------------------------------

_DENSE_FIRST = {
    "pad_token_id": None, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_key_value_heads": 4,
}  # fmt: skip
MIXTURES: dict[str, dict[str, Any]] = {
    "glm4_moe": _DENSE_FIRST,
    "dots1": _DENSE_FIRST,
    "deepseek_v3": _DENSE_FIRST
    | {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
    },
    "olmoe": {"pad_token_id": None, "num_experts": 4, "num_experts_per_tok": 2},
}
"""Families of experts that are not compared with transformers elsewhere, because PEFT has rules for them."""

GROUPS = ["all-linear", "attention", "qv"]
OF_EXPERTS: list[dict[str, Any]] = [
    {"target": target} | settings
    for target, settings in [
        (["experts.gate_proj", "experts.up_proj", "experts.down_proj", "q_proj"], {}),
        (["experts.gate_proj", "experts.up_proj", "experts.down_proj"], {"rslora": True}),
        (["experts.gate_proj", "experts.up_proj", "experts.down_proj"], {"dropout": 0.1}),
        (["experts.gate_proj", "experts.up_proj", "experts.down_proj"], {"rank_pattern": {"up_proj": 6}}),
        (
            ["experts.gate_proj", "experts.up_proj", "experts.down_proj", "o_proj"],
            {"alpha_pattern": {"experts.up_proj": 3.0}},
        ),
        (["experts.gate_proj", "experts.up_proj", "o_proj"], {}),
        (["experts.down_proj"], {"alpha_pattern": {"down_proj": 3.0}}),
        (["experts.down_proj", "o_proj"], {"rank_pattern": {"o_proj": 3}}),
        (["experts.w1", "experts.w2", "experts.w3"], {"rank_pattern": {"w2": 3}, "alpha_pattern": {"w2": 5.0}}),
        (["experts.w1", "experts.w3"], {}),
        (["experts.w1"], {}),
        (["experts.gate_proj"], {}),
        (["gate"], {}),
        (["shared_expert.up_proj"], {}),
        (["shared_experts.down_proj", "q_proj"], {}),
    ]
]
OTHERS: list[dict[str, Any]] = [
    {
        "target": ["o_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.o_proj": 3},
        "alpha_pattern": {"up_proj": 3.0},
    },
    {"target": ["layers.1.self_attn.q_proj", "lm_head"]},
    {"target": ["out_proj"]},
    {"target": "all-linear", "rslora": True},
]


@pytest.fixture(scope="session")
def base_of(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def base(family: str) -> Path:
        if family not in made:
            is_wrapper = family in WRAPPERS
            folder = tmp_path_factory.mktemp(family)
            if is_wrapper:
                made[family] = make_wrapper(family, make_base, folder)
            else:
                made[family] = make_base(family, **MIXTURES.get(family, {}))
        return made[family]

    return base


@cache
def _opened(base: Path, auto_class: str) -> torch.nn.Module:
    model: torch.nn.Module = getattr(transformers, auto_class).from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def _opened_as_trained(base: Path, folder: Path, ours: np.ndarray, token_ids: list[list[int]]) -> bool:
    """Whether PEFT itself puts every tensor in its place, puts an adapter on nothing else, and computes the same."""
    found = peft_base(str(base))
    assert found is not None
    assert found.opening is not None
    try:
        adapted = peft.PeftModel.from_pretrained(deepcopy(_opened(base, found.opening.auto_class)), folder).eval()
    except (ValueError, RuntimeError):
        return False
    if any(not value.any() for name, value in adapted.named_parameters() if "lora_B" in name):
        return False  # an adapter as it starts
    with torch.no_grad():
        theirs = adapted(input_ids=torch.tensor(token_ids)).logits.numpy()
    return bool(np.abs(theirs - ours).max() < 1e-3 * np.abs(theirs).max())


@pytest.mark.families
@pytest.mark.parametrize("family", [*TORCH_FAMILIES, *MIXTURES, *WRAPPERS])
def test_what_is_said_of_an_adapter_is_what_peft_makes_of_it(
    family: str,
    base_of: Callable[[str], Path],
    make_adapter: Callable,
    mlx_logits: Callable,
    token_ids: list[list[int]],
    tmp_path: Path,
) -> None:
    base = base_of(family)
    found = peft_base(str(base))
    assert found is not None
    shapes = [{"target": target} for target in GROUPS] + OTHERS + (OF_EXPERTS if found.experts else [])
    seen = 0
    for number, shape in enumerate(shapes):
        settings = LoraSettings(rank=2, alpha=4.0, **shape)
        try:
            parameters = make_adapter(base, settings)
        except UserError:
            continue  # this family has no module of that name
        folder = tmp_path / str(number)
        write_adapter(folder, settings, parameters, str(base))
        ours = mlx_logits(load_adapter(folder, dtype="float32").model, token_ids)
        lost = list(lost_by_peft(folder, found))
        assert _opened_as_trained(base, folder, ours, token_ids) == (not lost), (shape, lost)
        seen += 1
    assert seen >= len(GROUPS)
