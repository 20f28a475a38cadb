"""A layer's modules are told apart into products and what lies between, by watching them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_sft.model.blocks import Block, find_blocks, replaced_children
from mlx_sft.model.head import SplitModel
from tests.families import tiny_model

pytestmark = pytest.mark.fast

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2]])

QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def blocks_of(family: str) -> list[dict[str, Block]]:
    split = SplitModel(tiny_model(family))
    return find_blocks(split.layers, lambda: split.hidden_states(TOKENS))


@pytest.mark.parametrize(
    ("family", "attention", "mlp"),
    [
        ("qwen3", QKV, GATED),
        ("llama", QKV, GATED),
        ("gemma3_text", QKV, GATED),
        ("phi3", ("qkv_proj",), ("gate_up_proj",)),
        ("glm4", QKV, ("gate_up_proj",)),
    ],
)
def test_products_are_found_by_what_they_are_given(
    family: str, attention: tuple[str, ...], mlp: tuple[str, ...]
) -> None:
    for found in blocks_of(family):
        assert (found["self_attn"].first, found["self_attn"].last) == (attention, "o_proj")
        assert (found["mlp"].first, found["mlp"].last) == (mlp, "down_proj")
        assert found["mlp"].positionwise
        assert not found["self_attn"].positionwise


def test_a_module_of_another_form_is_left_alone() -> None:
    assert all(set(found) == {"self_attn"} for found in blocks_of("qwen3_moe"))


@pytest.mark.parametrize("family", ["qwen3", "phi3", "gemma2"])
def test_the_parts_together_are_the_module(family: str) -> None:
    keys = mx.random.split(mx.random.key(1), 2)
    for block in blocks_of(family)[0].values():
        x = mx.random.normal((2, 9, 32), key=keys[0])
        whole = block.module(x)
        core = block.core(block.projected(x), x)
        parts = block.module[block.last](core)
        assert mx.allclose(parts, whole, rtol=1e-5, atol=1e-6).item()


def test_the_core_takes_only_the_shape_of_the_input() -> None:
    block = blocks_of("qwen3")[0]["self_attn"]
    x = mx.random.normal((2, 9, 32), key=mx.random.key(1))
    given = block.projected(x)
    assert mx.array_equal(
        block.core(given, x, "causal", None), block.core(given, mx.zeros_like(x), "causal", None)
    ).item()


def test_a_result_that_is_not_the_last_product_is_no_block() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

        def __call__(self, x: mx.array) -> mx.array:
            return 2 * self.down(mx.tanh(self.up(x)))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Doubling()

        def __call__(self, x: mx.array) -> mx.array:
            return self.mlp(x)

    layer = Layer()
    assert find_blocks([layer], lambda: layer(mx.zeros((1, 4)))) == [{}]


def test_watching_leaves_the_model_as_it_was() -> None:
    model = tiny_model("qwen3")
    split = SplitModel(model)
    before = model(TOKENS)
    find_blocks(split.layers, lambda: split.hidden_states(TOKENS))
    assert type(model.model.layers[0].mlp.gate_proj) is nn.Linear
    assert mx.array_equal(model(TOKENS), before).item()


def test_children_are_back_even_after_an_error() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="stop"), replaced_children(module, {"layers": lambda x: x}):
        raise ValueError("stop")
    assert isinstance(module.layers, list)
