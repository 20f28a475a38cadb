"""How far mlx-lm's code is the model that the checkpoint describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_sft.model.translate import exact_length


@pytest.mark.parametrize(
    ("config", "most"),
    [
        ({"model_type": "qwen3", "sliding_window": None, "max_position_embeddings": 64}, None),
        ({"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False}, None),
        ({"model_type": "mistral", "sliding_window": 4096}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic"}, "max_position_embeddings": 64}, 64),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}, "max_position_embeddings": 64}, 64),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "default"}, "max_position_embeddings": 64}, None),
    ],
)
def test_rows_may_be_as_long_as_the_arithmetic_is_the_models(
    tmp_path: Path, config: dict[str, Any], most: int | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert exact_length(tmp_path) == most
