"""A stand-in for llama.cpp; tokenizers of bytes with the special tokens of several families; public chat templates."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<s>", "</s>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
]

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


@pytest.fixture
def make_llama_cpp(tmp_path: Path) -> Callable[..., Path]:
    """`make_llama_cpp(mode, name=)` → a folder with the converters, in which what `mode` says goes wrong."""

    def make(mode: str = "", name: str = "llama.cpp") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        source = (Path(__file__).parent / "stand_in_converter.py").read_text(encoding="utf-8")
        head, _, body = source.partition("from __future__ import annotations\n")
        future = "from __future__ import annotations\n"
        for name_of_script in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
            script = folder / name_of_script
            script.write_text(f"#!{sys.executable}\n{head}{future}MODE = {mode!r}\n{body}", encoding="utf-8")
            script.chmod(0o755)
        return folder

    return make


@pytest.fixture
def no_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has none."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "home"))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    """`make_tokenizer(template, eos=, bos=, adds_bos=)`."""

    def make(
        template: str, eos: str = "<|im_end|>", bos: str | None = None, adds_bos: bool = False
    ) -> PreTrainedTokenizerFast:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(SPECIAL_TOKENS)
        if adds_bos:
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
            )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, bos_token=bos)
        tokenizer.chat_template = template
        tokenizer.name_or_path = "a model"
        return tokenizer

    return make


@pytest.fixture(scope="session")
def public_template() -> Callable[[str], str]:
    """A family's template as it is published, from trl's collection: `public_template("qwen3")`."""
    return lambda name: (_public_templates() / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def public_names() -> list[str]:
    """The names of those that are not made for training."""
    names = (path.stem for path in _public_templates().glob("*.jinja"))
    return sorted(name for name in names if not name.endswith("_training"))


def _public_templates() -> Path:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "chat_templates"
