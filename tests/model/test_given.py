"""A model in memory is trained where it is the model that its checkpoint means; mlx-lm's own loader makes others of some families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_model as load_model_of_mlx_lm

from mlx_sft.errors import USAGE, UserError
from mlx_sft.model.given import given_model
from mlx_sft.model.load import LoadedModel, load_model, load_tokenizer

_MULTIPLIED = {"key_multiplier": 0.6, "ssm_multipliers": [0.9, 0.8, 0.7, 1.2, 1.1]}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "truncate": False,
}


def _given(model: Any, base: Path) -> LoadedModel:
    return given_model(model, str(base), load_tokenizer(base), dtype="auto", quantize=None)


@pytest.mark.parametrize(
    ("family", "settings", "what"),
    [
        (
            "gemma",
            {"tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"},
            "other logits",
        ),  # another GELU
        ("falcon_h1", _MULTIPLIED, "other logits"),
        ("llama", {"rope_parameters": _YARN}, "other logits"),
        ("ernie4_5_moe", {}, r"other weights \(model\.layers\.0\.mlp\.moe_statics"),
    ],
)
def test_what_mlx_lms_loader_makes_of_some_families_is_refused(
    family: str, settings: dict[str, Any], what: str, make_base: Callable[..., Path]
) -> None:
    base = make_base(family, **settings)
    asked_for = {"rope_theta": 5e4} if family == "ernie4_5_moe" else {}
    with pytest.raises(UserError, match=rf"the model in memory .*{what}") as caught:
        _given(load_model_of_mlx_lm(base, model_config=asked_for)[0], base)
    assert caught.value.exit_code == USAGE
    assert "mlx_sft.load_model" in caught.value.hint
    loaded = load_model(str(base), "float32")
    assert _given(loaded, base).model is _given(loaded.model, base).model is loaded.model


def test_a_model_that_is_quantized_in_memory_is_taken(make_base: Callable[..., Path]) -> None:
    base = make_base("qwen3")
    model = load_model(str(base), "float32", quantize="4").model
    found = given_model(model, str(base), load_tokenizer(base), dtype="auto", quantize="4").model
    assert found is model
