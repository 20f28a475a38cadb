"""Code that comes with a model does not run, whatever says so but the person; where it may, it is named first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.errors import USAGE
from mlx_sft.model.load import load_model, load_tokenizer
from mlx_sft.model.outline import outline
from mlx_sft.trust import code_files, trust_remote_code

RAN = "code_ran"

MODEL = f"""
from pathlib import Path
from mlx_lm.models.qwen3 import Model, ModelArgs
Path(__file__).with_name("{RAN}").touch()
"""


@pytest.fixture
def folder(tmp_path: Path, make_base: Callable[..., Path]) -> Path:
    """A checkpoint of one's own."""
    folder = tmp_path / "model"
    shutil.copytree(make_base("qwen3", tied=True), folder)
    return folder


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.fixture
def own_model(folder: Path) -> Path:
    """A checkpoint whose own code is its model."""
    change(folder / "config.json", model_file="arithmetic.py")
    (folder / "arithmetic.py").write_text(MODEL)
    return folder


@pytest.fixture
def own_tokenizer(folder: Path) -> Path:
    """A checkpoint whose own code is its tokenizer."""
    own = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": [None, "words.Mine"]}}
    change(folder / "tokenizer_config.json", **own)
    (folder / "words.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(folder / RAN)!r}).touch()\nclass Mine(PreTrainedTokenizerFast):\n    pass\n"
    )
    return folder


@pytest.mark.parametrize("load", [lambda path: load_model(str(path)), lambda path: outline(path, "float32")])
def test_a_models_own_code_does_not_run(own_model: Path, load: Callable[[Path], object]) -> None:
    with pytest.raises(UserError, match=r"defined by Python code of its own, arithmetic\.py") as caught:
        load(own_model)
    assert "--trust-remote-code" in caught.value.hint
    assert not (own_model / RAN).exists()


def test_a_tokenizers_own_code_does_not_run(own_tokenizer: Path) -> None:
    load_tokenizer(own_tokenizer)  # tokenizer.json says all that is needed
    (own_tokenizer / "tokenizer.json").rename(own_tokenizer / "vocab.json")
    with pytest.raises(UserError, match=r"without Python code of its own \(words\.py\)") as caught:
        load_tokenizer(own_tokenizer)
    assert "--trust-remote-code" in caught.value.hint
    assert not (own_tokenizer / RAN).exists()


def test_code_that_is_trusted_is_named_once_before_it_runs(own_model: Path, settings: dict[str, Any]) -> None:
    warnings: list[tuple[str, bool]] = []
    with trust_remote_code(lambda message: warnings.append((message, (own_model / RAN).exists()))):
        train(TrainConfig(**settings | {"model": str(own_model), "max_steps": 1}))
    assert (own_model / RAN).exists()
    assert len(warnings) == 1
    message, ran = warnings[0]
    assert str(own_model) in message
    assert "arithmetic.py" in message
    assert not ran
    with pytest.raises(UserError, match="code of its own"):
        load_model(str(own_model))


def test_a_tokenizer_that_is_trusted_is_loaded(own_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(own_tokenizer.parent / "modules"))
    named: list[str] = []
    with trust_remote_code(named.append):
        assert type(load_tokenizer(own_tokenizer)).__name__ == "Mine"
    assert len(named) == 1


def test_code_that_lies_elsewhere_does_not_run(own_model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(MODEL)
    change(own_model / "config.json", model_file="../elsewhere.py")
    with trust_remote_code(lambda _: None), pytest.raises(UserError, match="not a file of its folder"):
        load_model(str(own_model))
    assert not (tmp_path / RAN).exists()


def test_no_configuration_can_say_that_code_is_trusted(
    own_model: Path, settings: dict[str, Any], cli: Callable[..., Any], tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {settings['data']}\nmodel: {own_model}\ntrust_remote_code: true\n")
    result = cli("train", "--config", config)
    assert result.exit_code == USAGE
    assert "trust_remote_code: no such setting" in result.stderr
    assert not (own_model / RAN).exists()


def test_the_option_lets_it_run(own_model: Path, settings: dict[str, Any], cli: Callable[..., Any]) -> None:
    arguments = ("train", "--data", settings["data"], "--model", own_model, "--out", settings["out"])
    assert cli(*arguments).exit_code == 1
    result = cli(*arguments, "--max-steps", 1, "--trust-remote-code", "--quiet")
    assert result.exit_code == 0
    assert "arithmetic.py" in result.stderr
    assert cli("generate", "--run", settings["out"], "--prompt", "the cat").exit_code == 1
    said = cli("generate", "--run", settings["out"], "--prompt", "the cat", "--max-tokens", 1, "--trust-remote-code")
    assert said.exit_code == 0


def test_code_of_other_repositories_is_named_with_them(folder: Path) -> None:
    change(folder / "config.json", auto_map={"AutoModelForCausalLM": "someone/else--modeling.Model", "AutoConfig": 3})
    assert code_files(folder) == ["someone/else--modeling.py"]


def test_a_model_that_transformers_knows_needs_no_code_of_its_own(folder: Path) -> None:
    change(folder / "config.json", auto_map={"AutoConfig": "configuration.Mine"})
    load_model(str(folder))
