"""Stand-ins for llama.cpp and for the Hub, where they are needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest

from tests.hub import TOKEN, Hub, serve


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


@pytest.fixture
def logged_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token, wherever huggingface_hub would look for one."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


@pytest.fixture
def hub(logged_out: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub as huggingface_hub finds it, as HF_ENDPOINT, HF_HUB_DISABLE_XET and HF_TOKEN would have it from the start."""
    with serve() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
        huggingface_hub.close_session()
