"""Tiny random checkpoints made by transformers, and what PyTorch computes with them; fixtures of `conftest.py` with PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from mlx_sft.data.example import IGNORED, Example
from tests.torch_families import OTHER_FAMILIES, TORCH_FAMILIES

VOCABULARY = 264

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0},
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": 257,
}


@pytest.fixture(scope="session")
def make_base(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_of_bases: PreTrainedTokenizerFast
) -> Callable[..., Path]:
    """`make_base(family, tied=, dtype=, shard=, form=, **settings of its config)` → a folder, made once a session.

    `form` is the version of transformers, 4 or 5, whose way of writing config.json is followed.
    """
    return partial(_make_base, {}, tmp_path_factory, tokenizer_of_bases)


def _make_base(
    made: dict[tuple[object, ...], Path],
    folders: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    family: str = "qwen3",
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    form: int = 5,
    **settings: object,
) -> Path:
    key = (family, tied, dtype, shard, form, json.dumps(settings, sort_keys=True))
    if key not in made:
        torch.manual_seed(0)
        shape = _SHAPE | {"tie_word_embeddings": tied} | (TORCH_FAMILIES | OTHER_FAMILIES).get(family, {}) | settings
        config = AutoConfig.for_model(family, **deepcopy(shape))  # transformers adds to dictionaries that it is given
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
        with torch.no_grad():  # transformers starts norms at one and biases at zero, which would hide a mistake in them
            for name, tensor in model.state_dict().items():  # buffers included
                if tensor.is_floating_point() and (tensor.ndim == 1 or name.endswith(("bias", "sinks"))):
                    tensor.add_(0.2 * torch.randn_like(tensor))
        folder = folders.mktemp(family)
        model.save_pretrained(folder, max_shard_size=shard)
        tokenizer.save_pretrained(folder)
        if form == 4:
            _write_as_transformers_4(folder / "config.json")
        (folder / "LICENSE").write_text("do as you like\n")
        made[key] = folder
    return made[key]


def _write_as_transformers_4(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    if "sliding_attention" in rope:  # Gemma 3
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("layer_types").index("full_attention") + 1
        config.pop("_sliding_window_pattern")
        rope = rope["full_attention"]
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.51.0"
    path.write_text(json.dumps(config))


@pytest.fixture(scope="session")
def torch_loss() -> Callable[[torch.nn.Module, Sequence[Example]], torch.Tensor]:
    """transformers' own mean loss over the supervised tokens of a right-padded batch."""

    def compute(model: torch.nn.Module, examples: Sequence[Example]) -> torch.Tensor:
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        return model(
            input_ids=pad([torch.tensor(e.token_ids, dtype=torch.long) for e in examples]),
            attention_mask=pad([torch.ones(len(e), dtype=torch.long) for e in examples]),
            labels=pad([torch.tensor(e.labels, dtype=torch.long) for e in examples], padding_value=IGNORED),
        ).loss

    return compute


@pytest.fixture(scope="session")
def torch_model() -> Callable[[Path], torch.nn.Module]:
    """A checkpoint as transformers opens it, every name accounted for, in float32."""

    def load(folder: Path) -> torch.nn.Module:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, attn_implementation="eager"
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert not report["mismatched_keys"]
        assert AutoConfig.from_pretrained(folder).vocab_size == VOCABULARY
        return model.eval()

    return load


@pytest.fixture(scope="session")
def torch_logits() -> Callable[[torch.nn.Module, list[list[int]]], np.ndarray]:
    def compute(model: torch.nn.Module, rows: list[list[int]]) -> np.ndarray:
        with torch.no_grad():
            return model(input_ids=torch.tensor(rows)).logits.float().numpy()

    return compute
