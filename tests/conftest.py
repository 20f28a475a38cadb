"""Adapters with something in them, and runs made by hand; tiny checkpoints are `torch_models.py`'s."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WITHOUT_TORCH = os.environ.get("MLX_SFT_TESTS_WITHOUT_TORCH") == "1"
"""Set by `make test-fast`: PyTorch is not there, as on a user's machine, and only tests that are marked `fast` are collected."""
if WITHOUT_TORCH:
    sys.modules |= dict.fromkeys(("torch", "peft"))  # type: ignore[arg-type]

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mlx_sft import train
from mlx_sft.cli import main
from mlx_sft.config import TrainConfig
from mlx_sft.data.dataset import Examples
from mlx_sft.data.encode import Example
from mlx_sft.errors import SOFTWARE
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.methods.peft_files import write_adapter
from mlx_sft.model.load import load_model
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.callbacks import samples
from mlx_sft.training.machine import memory_limits_restored
from tests.chats import write_chats
from tests.neighbours import find_neighbour
from tests.pages import browser  # noqa: F401  a fixture
from tests.trl_exports import half, half_trained, pair, trained  # noqa: F401  fixtures

if not WITHOUT_TORCH:
    from tests.torch_models import make_base, torch_logits, torch_loss, torch_model  # noqa: F401  fixtures

VOCABULARY = 264

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Run:
    """A run made by hand: `base` is the checkpoint folder, `path` the run's."""

    base: Path
    path: Path


def pytest_configure() -> None:
    """Signals that a job in the background has ignored, and hands on to the processes that it starts, are heard in the tests."""
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without PyTorch, what is not marked `fast` is not even imported."""
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if WITHOUT_TORCH and is_test and "pytest.mark.fast" not in collection_path.read_text() else None


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


@pytest.fixture(scope="session", autouse=True)
def _time_for_samples() -> Iterator[None]:
    """A busy machine leaves none out, so that two runs have the same."""
    with pytest.MonkeyPatch.context() as patch:
        for bound in ("_FREE", "_AT_ONCE"):
            patch.setattr(samples, bound, 3600.0)
        yield


@pytest.fixture(autouse=True)
def _memory_limits_restored() -> Iterator[None]:
    """A run that is prepared and not trained leaves MLX's limit as the run has it."""
    with memory_limits_restored():
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
        shape = {"rank": 4, "alpha": 8} if settings.get("method", "lora") == "lora" else {}
        config = TrainConfig(data=str(data), model=str(base), **shape, **settings)
        run = RunFolder.create(tmp_path / "run")
        run.config.write_text(config.to_yaml())
        if config.method == "lora":
            settings_of_lora = config.settings(LoraSettings)
            parameters = random_adapter(base, settings_of_lora)
            write_adapter(run.adapter, settings_of_lora, parameters, str(base))
        run.card.touch()  # by which a run says that it has finished
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
    """Rows of many lengths: every token that can be supervised is, one alone, the last alone, and some at random."""
    random = np.random.default_rng(4)
    made = []
    for number, (length, supervised) in enumerate([(9, range(1, 9)), (23, [5]), (14, [13]), (17, None), (30, None)]):
        token_ids = random.integers(0, VOCABULARY, length).astype(np.int32)
        chosen = np.flatnonzero(random.random(length - 1) < 0.4) + 1 if supervised is None else np.array(supervised)
        weights = np.zeros(length, np.float32)
        weights[chosen] = 1
        made.append(Example(f"row {number}", token_ids, weights))
    return Examples.of(made)


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
    return settings_of_run(chats, make_base("qwen3", tied=True), tmp_path / "run")


def settings_of_run(chats: Path, base: Path, out: Path) -> dict[str, Any]:
    """As the fixture `settings`, for a folder of one's own."""
    return {
        "data": str(chats),
        "model": str(base),
        "out": str(out),
        "rank": 2,
        "lr": 1e-2,
        "batch_size": 4,
        "epochs": 2,
        "quiet": True,
        "samples": 0,  # which would take more time than such a run
    }


@pytest.fixture(scope="session")
def train_once(
    chats: Path, make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`train_once(**changes of settings)` → a finished run, the same for all who ask for it: to be read, or copied."""
    made: dict[str, Path] = {}

    def once(**changes: Any) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            settings = settings_of_run(chats, make_base("qwen3", tied=True), tmp_path_factory.mktemp("once") / "run")
            made[key] = train(TrainConfig(**settings | changes)).run_dir
        return made[key]

    return once


@pytest.fixture
def cli() -> Callable[..., Result]:
    """`cli("train", "--data", path, ..., input=...)` → click's result, which is never a traceback."""

    def invoke(*arguments: object, **options: Any) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], **options)
        assert result.exit_code != SOFTWARE, result.output
        return result

    return invoke
