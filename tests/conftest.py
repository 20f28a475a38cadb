"""Tiny random checkpoints made by transformers, adapters with something in them, and runs made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

from mlx_sft.cli import main
from mlx_sft.config import TrainConfig
from mlx_sft.data.dataset import Examples
from mlx_sft.data.encode import IGNORED, Example
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.methods.peft_files import write_adapter
from mlx_sft.model.load import load_model
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.machine import memory_limit_restored
from tests.chats import write_chats
from tests.neighbours import find_neighbour
from tests.torch_families import TORCH_FAMILIES

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "neighbour" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.neighbours)


@pytest.fixture(scope="session")
def neighbour() -> Callable[[str], Path]:
    """`neighbour("tokenizers/qwen3")` → what lies beside the project; the test is skipped where it does not."""
    return find_neighbour


@pytest.fixture(scope="session", autouse=True)
def _cache_of_tokenized_rows(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own, also for the processes that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_SFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _memory_limit_restored() -> Iterator[None]:
    """A run that is prepared and not trained leaves MLX's limit as the run has it."""
    with memory_limit_restored():
        yield


@pytest.fixture(scope="session")
def tokenizer(tokenizer_of_bases: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return tokenizer_of_bases


@pytest.fixture(scope="session")
def tokenizer_of_bases() -> PreTrainedTokenizerFast:
    """The one in every base, also for tests that have another `tokenizer`."""
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
        shape = _SHAPE | {"tie_word_embeddings": tied} | TORCH_FAMILIES[family] | settings
        config = AutoConfig.for_model(family, **shape)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
        with torch.no_grad():  # transformers starts norms at one and biases at zero, which would hide a mistake in them
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
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
    drawn = {name: mx.array(random.normal(0, 0.1, value.shape).astype(np.float32)) for name, value in start.items()}
    return {name: start[name] * (1 + value) if "magnitude" in name else value for name, value in drawn.items()}


@pytest.fixture(scope="session")
def make_adapter() -> Callable[[Path, LoraSettings], dict[str, mx.array]]:
    """`make_adapter(base, settings)` → the parameters of an adapter, with nothing zero."""
    return random_adapter


@pytest.fixture(scope="session")
def token_ids() -> list[list[int]]:
    random = np.random.default_rng(3)
    return random.integers(0, VOCABULARY, (3, 12)).tolist()


@pytest.fixture(scope="session")
def examples() -> Examples:
    """Rows of many lengths: every token that can be learnt is, one alone, the last alone, and some at random."""
    random = np.random.default_rng(4)
    made = []
    for number, (length, learnt) in enumerate([(9, range(1, 9)), (23, [5]), (14, [13]), (17, None), (30, None)]):
        token_ids = random.integers(0, VOCABULARY, length).astype(np.int32)
        chosen = np.flatnonzero(random.random(length - 1) < 0.4) + 1 if learnt is None else np.array(learnt)
        weights = np.zeros(length, np.float32)
        weights[chosen] = 1
        made.append(Example(f"row {number}", token_ids, weights))
    return Examples.of(made)


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


@pytest.fixture(scope="session")
def mlx_logits() -> Callable[..., np.ndarray]:
    def compute(model: object, rows: list[list[int]]) -> np.ndarray:
        return np.array(model(mx.array(rows)).astype(mx.float32))

    return compute


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten short conversations of different lengths, one a line."""
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", 10, seed=4)


@pytest.fixture
def settings(chats: Path, make_base: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """Settings of a run of 6 steps on `chats` that takes a fraction of a second; its folder is not there yet."""
    return {
        "data": str(chats),
        "model": str(make_base("qwen3", tied=True)),
        "out": str(tmp_path / "run"),
        "rank": 2,
        "lr": 1e-2,
        "batch_size": 4,
        "epochs": 2,
        "quiet": True,
    }


@pytest.fixture
def cli() -> Callable[..., Result]:
    """`cli("train", "--data", path, ..., input=...)` → click's result, which is never a traceback."""

    def invoke(*arguments: object, **options: Any) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], **options)
        assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
        return result

    return invoke
