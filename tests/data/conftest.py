"""A byte-level tokenizer without merges, so that every byte is a token; and the public templates that trl ships."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|end|>", "<|assistant|>", "<end_of_turn>"),
]
CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """`make_tokenizer(template=CHATML, eos="<|im_end|>", bos=None, name="tiny")`."""

    def make(
        template: Any = CHATML, eos: str | None = "<|im_end|>", bos: str | None = None, name: str = "tiny"
    ) -> PreTrainedTokenizerFast:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(SPECIAL_TOKENS)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos)
        tokenizer.chat_template = template
        tokenizer.name_or_path = name
        return tokenizer

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: MakeTokenizer) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def public_template() -> Callable[[str], str]:
    """A model family's template as it is published, from trl's collection: `public_template("qwen3")`."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "chat_templates"
    return lambda name: (folder / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def qwen3(make_tokenizer: MakeTokenizer, public_template: Callable[[str], str]) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with Qwen 3's template."""
    return make_tokenizer(public_template("qwen3"))


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """Write rows, or lines as they are, to a .jsonl file; gives its path."""

    def write(*rows: Any, name: str = "chats.jsonl") -> str:
        path = tmp_path / name
        lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("MLX_SFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module beside this one, which is also a program."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import stand_in

    return stand_in
