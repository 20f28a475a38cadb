"""`--format mlx-cache`: mlx-lm's own command answers behind the cache as the run does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import torch
from mlx_lm import generate as mlx_lm_generate
from mlx_lm.models.cache import load_prompt_cache

from mlx_sft import export, generate_text, load_run, train
from mlx_sft.config import TrainConfig
from mlx_sft.convert.targets import mlx_cache
from mlx_sft.errors import UserError
from tests.methods.test_prompt import ROWS

pytestmark = pytest.mark.parity

OF_SIX_LAYERS = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "sliding_window": 64,
    "form": 4,
}
"""As mlx-lm takes Gemma 3 to be by itself."""
ASK = "the cat sat on the mat"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}:\n\n{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def make_run(make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(family: str = "qwen3", of_base: dict[str, Any] | None = None, **settings: Any) -> Path:
        base = make_base(family, tied=family.startswith("gemma"), **of_base or {})
        config = TrainConfig(
            **{"model": str(base), "dtype": "float32", "batch_size": 2, "lr": 0.1, "max_steps": 2}
            | ({} if settings["method"] == "lora" else {"virtual_tokens": 5})
            | {"out": str(tmp_path_factory.mktemp("runs") / "run")} | settings
        )  # fmt: skip
        return train(config, data=ROWS).run_dir

    return make


def _told_by_mlx_lm(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `mlx_lm.generate` prints."""
    given = ["--prompt-cache-file", str(file), "--prompt", ASK, "--max-tokens", "8", "--verbose", "False"]
    monkeypatch.setattr(sys, "argv", ["mlx_lm.generate", *given])
    capsys.readouterr()
    sys.modules[mlx_lm_generate.__module__].main()
    return capsys.readouterr().out.removesuffix("\n")


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "prefix"},
        {"method": "prefix", "family": "gemma3_text", "of_base": OF_SIX_LAYERS},
        {"method": "prompt", "chat_template": TEMPLATE},
    ],
    ids=["prefix", "windows", "prompt"],
)
def test_mlx_lm_answers_behind_it_as_the_run_does(
    settings: dict[str, Any],
    make_run: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(**settings)
    result = export(run, tmp_path / "cache", format="mlx-cache")
    assert [file.name for file in result.path.iterdir()] == ["prompt_cache.safetensors"]
    assert result.verification is not None
    assert result.verification.kl < 1e-8
    assert (
        result.notes[0] == f"mlx_lm.generate --prompt-cache-file {result.path}/prompt_cache.safetensors --prompt Hello"
    )
    told = _told_by_mlx_lm(result.path / "prompt_cache.safetensors", monkeypatch, capsys)
    tuned, plain = (generate_text(load_run(run, base=bare), ASK, max_tokens=8) for bare in (False, True))
    assert told == tuned != plain


def test_it_is_in_the_precision_of_the_base_with_a_system_prompt(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(of_base={"dtype": torch.bfloat16}, method="prefix")
    result = export(run, tmp_path / "cache", format="mlx-cache", system_prompt="be brief")
    cache, metadata = load_prompt_cache(str(result.path / "prompt_cache.safetensors"), return_metadata=True)
    loaded = load_run(run)
    before = loaded.tokenizer("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n")["input_ids"]
    assert {array.dtype for part in cache for array in part.state[:2]} == {mx.bfloat16}
    assert {(part.offset, part.state[0].shape[2]) for part in cache} == {(5 + len(before),) * 2}
    assert json.loads(metadata["tokenizer_config"]) == {}
    assert metadata["model"] == str(loaded.path)


def test_a_base_that_mlx_lm_reads_otherwise_is_blamed(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run("gemma3_text", OF_SIX_LAYERS | {"form": 5}, method="prefix")
    with pytest.raises(UserError, match=r"gemma3_text\d+: mlx-lm computes another model of it") as error:
        export(run, tmp_path / "cache", format="mlx-cache")
    assert "mlx-sft convert" in str(error.value.hint)


def test_what_is_written_is_read_again_and_compared(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(method="prefix")

    def of_zeros(file: str, cache: list[Any], metadata: dict[str, str]) -> None:
        cache[1].state = (0 * cache[1].state[0], *cache[1].state[1:])
        save(file, cache, metadata)

    save = mlx_cache.save_prompt_cache
    monkeypatch.setattr(mlx_cache, "save_prompt_cache", of_zeros)
    with pytest.raises(UserError, match=r"mlx-lm computes another model with it: a divergence of"):
        export(run, tmp_path / "cache", format="mlx-cache")
    assert not (tmp_path / "cache").exists()


def test_other_methods_are_refused_by_name(make_run: Callable[..., Path], tmp_path: Path) -> None:
    run = make_run(method="lora", rank=2)
    with pytest.raises(UserError, match=r"--method lora puts nothing in front of a conversation") as error:
        export(run, tmp_path / "cache", format="mlx-cache")
    assert "--format mlx-lm" in str(error.value.hint)
