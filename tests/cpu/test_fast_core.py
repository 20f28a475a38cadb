"""What lies between a block's products is computed by an operation of ours only where that gives the same."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_sft.cpu.fast_core import fast_core
from mlx_sft.model.blocks import Block, find_blocks
from mlx_sft.model.head import SplitModel
from tests.families import tiny_model

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="a GPU runs the model's own code"),
]

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2]])


def blocks_of(family: str) -> list[dict[str, Block]]:
    split = SplitModel(tiny_model(family))
    return find_blocks(split.layers, lambda: split.hidden_states(TOKENS))


@pytest.mark.parametrize(
    ("family", "attention", "mlp"),
    [
        ("qwen3", True, True),
        ("qwen2", True, True),
        ("smollm3", True, True),
        ("gemma2", False, False),  # soft-capped scores, and gelu
        ("olmo2", False, True),  # its norms go over all heads at once
        ("phi3", False, False),  # products that are split afterwards
    ],
)
def test_an_operation_of_ours_is_taken_only_where_it_is_the_same(family: str, *, attention: bool, mlp: bool) -> None:
    for found in blocks_of(family):
        assert (fast_core(found["self_attn"]) is not None) == attention
        assert (fast_core(found["mlp"]) is not None) == mlp


def test_a_sliding_window_stays_the_models_own() -> None:
    block = blocks_of("gemma3_text")[0]["self_attn"]
    core = fast_core(block)
    assert core is not None
    x = mx.random.normal((1, 9, 32), key=mx.random.key(1))
    window = mx.tril(mx.ones((9, 9), mx.bool_)) & mx.triu(mx.ones((9, 9), mx.bool_), -3)
    given = block.projected(x)
    assert mx.array_equal(core(given, x, window, None), block.core(given, x, window, None)).item()
    assert not mx.allclose(core(given, x, "causal", None), core(given, x, window, None)).item()
