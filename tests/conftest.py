"""Tiny random checkpoints made by transformers, adapters with something in them, and runs made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from mlx_sft.config import TrainConfig
from mlx_sft.convert.peft import write_adapter
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.model.load import load_model
from mlx_sft.runs import RunFolder

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

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Run:
    """A run made by hand: `base` is the checkpoint folder, `path` the run's."""

    base: Path
    path: Path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, and the dog sat on the cat"], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = _TEMPLATE
    return fast


@pytest.fixture(scope="session")
def make_base(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """`make_base(family, tied=, dtype=, shard=)` → a checkpoint folder, made once a session."""
    return partial(_make_base, {}, tmp_path_factory, tokenizer)


def _make_base(
    made: dict[tuple[object, ...], Path],
    folders: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerFast,
    family: str = "qwen3",
    *,
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
) -> Path:
    key = (family, tied, dtype, shard)
    if key not in made:
        kind = {"qwen3": Qwen3Config, "llama": LlamaConfig}[family]
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(kind(**_SHAPE, tie_word_embeddings=tied)).to(dtype)
        folder = folders.mktemp(family)
        model.save_pretrained(folder, max_shard_size=shard)
        tokenizer.save_pretrained(folder)
        (folder / "LICENSE").write_text("do as you like\n")
        made[key] = folder
    return made[key]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    """`make_run(base, **settings of TrainConfig)` → a finished LoRA run whose adapter changes the model visibly."""

    def make(base: Path, **settings: object) -> Run:
        data = tmp_path / "chats.jsonl"
        turns = [("the cat", "sat on the mat"), ("the dog", "sat on the cat"), ("and", "the mat")]
        rows = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answer in turns
        ]
        data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        config = TrainConfig(data=str(data), model=str(base), rank=4, alpha=8, **settings)
        run = RunFolder.create(tmp_path / "run")
        run.config.write_text(config.to_yaml())
        if config.method == "lora":
            settings_of_lora = LoraSettings.from_config(config)
            parameters = random_adapter(base, settings_of_lora)
            write_adapter(run.adapter, settings_of_lora, parameters, str(base))
        return Run(base, run.path)

    return make


def random_adapter(base: Path, settings: LoraSettings) -> dict[str, mx.array]:
    """Parameters of an adapter for a checkpoint, with nothing zero."""
    model = load_model(str(base), "float32").model
    start = Lora(settings).attach(model, seed=1)
    random = np.random.default_rng(2)
    return {name: mx.array(random.normal(0, 0.1, value.shape).astype(np.float32)) for name, value in start.items()}


@pytest.fixture(scope="session")
def token_ids() -> list[list[int]]:
    random = np.random.default_rng(3)
    return random.integers(0, VOCABULARY, (3, 12)).tolist()


@pytest.fixture(scope="session")
def torch_model() -> Callable[[Path], torch.nn.Module]:
    """A checkpoint as transformers opens it, every name accounted for, in float32."""

    def load(folder: Path) -> torch.nn.Module:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
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


@pytest.fixture(scope="session")
def mlx_logits() -> Callable[..., np.ndarray]:
    def compute(model: object, rows: list[list[int]]) -> np.ndarray:
        return np.array(model(mx.array(rows)).astype(mx.float32))

    return compute
