"""A model folder that lies about itself is refused by the name of the file, whatever its lie does to the libraries that read it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError
from mlx_sft.data.tokenizer import end_tokens
from mlx_sft.model.load import load_model, load_tokenizer
from mlx_sft.model.outline import outline
from mlx_sft.training.plan import footprint_of


@pytest.fixture
def folder(tmp_path: Path, make_base: Callable[..., Path]) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(make_base("qwen3", tied=True), folder)
    return folder


LIES: list[dict[str, Any]] = [
    {"hidden_size": -1},
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 2.5},
    {"vocab_size": 10**12},
    {"vocab_size": "x"},
    {"head_dim": 0},
    {"num_attention_heads": 0},
    {"rope_theta": "abc", "rope_parameters": None},
    {"rope_parameters": [1]},
    {"rope_scaling": "x"},
    {"rms_norm_eps": "NaN"},
    {"intermediate_size": 10**15},
    {"layer_types": 5},
    {"dtype": "evil"},
    {"architectures": 7},
    {"architectures": [["Qwen3ForCausalLM"]]},
    {"tie_word_embeddings": "yes"},
    {"sliding_window": "x", "use_sliding_window": True},
    {"eos_token_id": [[1]]},
    {"model_type": "../../evil"},
    {"model_type": "base"},
]


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_a_configuration_that_cannot_be_is_refused(folder: Path, lie: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | lie))
    with pytest.raises(UserError) as caught:
        load_model(str(folder), "float32")
    assert str(folder) in caught.value.where
    assert len(caught.value.what) < 500
    assert caught.value.hint
    if "head_dim" not in lie and "architectures" not in lie and "rope_theta" not in lie:
        with pytest.raises(UserError):
            outline(folder, "float32")


@pytest.mark.parametrize(
    "lie", [{"num_key_value_heads": 0}, {"num_key_value_heads": 3}, {"rope_theta": "abc"}], ids=str
)
def test_a_plan_of_what_cannot_be_computed_is_refused(folder: Path, lie: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"num_attention_heads": 4, "rope_parameters": None} | lie)
    )
    with pytest.raises(UserError) as caught:
        footprint_of(TrainConfig(data=["-"], model=str(folder)), folder, "float32", fused=False)
    assert caught.value.where == str(file)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[1"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"eos_token": [1]}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": 3}}}'),
    ],
)
def test_a_tokenizer_that_cannot_be_is_refused(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=r"cannot load its tokenizer|not a mapping|not JSON|of the number -1") as caught:
        load_tokenizer(folder)
    assert str(folder) in caught.value.where


@pytest.mark.parametrize("ends", ['"x"', "[[2]]", "999999999999", "-5", "{}"])
def test_ends_that_are_no_tokens_are_none(folder: Path, ends: str) -> None:
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
    tokenizer = load_tokenizer(folder)
    assert end_tokens(tokenizer) == {tokenizer.eos_token}
