"""A stand-in for llama.cpp, where it is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def make_llama_cpp(tmp_path: Path) -> Callable[..., Path]:
    """`make_llama_cpp(mode, name=)` → a folder with a converter, in which what `mode` says goes wrong."""

    def make(mode: str = "", name: str = "llama.cpp") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        script = folder / "convert_hf_to_gguf.py"
        source = (Path(__file__).parent / "stand_in_converter.py").read_text(encoding="utf-8")
        head, _, body = source.partition("from __future__ import annotations\n")
        future = "from __future__ import annotations\n"
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
