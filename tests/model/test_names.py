from __future__ import annotations

import pytest

from mlx_sft.model.names import expert_name, mlx_names, split_expert, transformers_name

pytestmark = pytest.mark.fast

PAIRS = {
    "model.layers.0.self_attn.q_proj": "model.layers.0.self_attn.q_proj",
    "lm_head": "lm_head",
    "language_model.model.layers.3.mlp.up_proj": "model.layers.3.mlp.up_proj",
    "language_model.lm_head": "lm_head",
    "model.layers.1.mlp.switch_mlp.up_proj": "model.layers.1.mlp.experts.up_proj",
    "language_model.model.layers.1.mlp.switch_mlp.up_proj.weight": "model.layers.1.mlp.experts.up_proj.weight",
    "model.layers.1.block_sparse_moe.switch_mlp.gate_proj": "model.layers.1.block_sparse_moe.experts.w1",
    "model.layers.1.block_sparse_moe.switch_mlp.down_proj": "model.layers.1.block_sparse_moe.experts.w2",
    "model.layers.1.block_sparse_moe.switch_mlp.up_proj": "model.layers.1.block_sparse_moe.experts.w3",
    "model.layers.1.feed_forward.switch_mlp.up_proj": "model.layers.1.feed_forward.experts.w3",
}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS.items())
def test_the_names_of_both_sides(ours: str, theirs: str) -> None:
    assert transformers_name(ours) == theirs
    assert transformers_name(theirs) == theirs
    assert mlx_names([ours]) == {theirs: ours}


def test_an_expert_has_a_number_in_its_name() -> None:
    stack = "model.layers.0.mlp.experts.up_proj.lora_A"
    assert expert_name(stack, 12) == "model.layers.0.mlp.experts.12.up_proj.lora_A"
    assert split_expert(expert_name(stack, 12)) == (stack, 12)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj",
        "a.experts.up_proj",
        "a.experts.3",
        "a.experts.-1.b",
        "a.experts.9999999.b",
        "a.experts.².b",
    ],
)
def test_other_names_have_none(name: str) -> None:
    assert split_expert(name) is None
