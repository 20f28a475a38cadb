from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from mlx_sft.common_settings import option_name, public_name
from mlx_sft.config import TrainConfig, _joined
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import read_yaml
from mlx_sft.methods.lora_settings import LoraSettings

pytestmark = pytest.mark.fast


def refusal(file: Path | None = None, **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        TrainConfig.resolve(file, **options)
    assert caught.value.exit_code == USAGE
    assert caught.value.hint
    return caught.value


def test_the_defaults_are_the_promised_ones() -> None:
    config = TrainConfig(data="x.jsonl")
    promised = {
        "model": "Qwen/Qwen3-0.6B", "method": "lora", "rank": 16, "alpha": 32, "dropout": 0, "rslora": False,
        "target": "all-linear", "init": "kaiming", "epochs": 1, "batch_size": 8, "lr": 2e-4, "max_grad_norm": 1,
        "overlong": None, "keep": 3, "shuffle": True, "grad_checkpoint": "auto", "dtype": "auto",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in promised} == promised


def test_every_field_says_what_it_is_for() -> None:
    assert all(info.description for info in TrainConfig.model_fields.values())


def test_a_file_is_overlaid_with_options(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: /a.jsonl\nrank: 4\nlr: 1e-3\nbetas: [0.8, 0.99]\neval_every: epoch\njson: true\n")
    config = TrainConfig.resolve(file, rank=2, json=False)
    assert (config.data, config.rank, config.lr, config.betas) == (["/a.jsonl"], 2, 1e-3, (0.8, 0.99))
    assert (config.eval_every, config.json_lines) == ("epoch", False)


def test_the_resolved_configuration_reads_back_as_itself(tmp_path: Path) -> None:
    given = TrainConfig(
        data="/dätä.jsonl", target=["q_proj", "v_proj"], eps=1e-12, seed=7, shuffle=False, eval_every=3, json_lines=True
    )
    file = tmp_path / "config.yaml"
    file.write_text(given.to_yaml("# header\n"))
    assert file.read_text().startswith("# header\n")
    assert TrainConfig.resolve(file) == given
    keys = set(yaml.safe_load(file.read_text()))
    assert keys == {public_name(field) for field in type(given).model_fields} - {"resume"}
    assert {"rank", "betas", "early_stop", "on_divergence"} <= keys


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ("qv", "qv"),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("q_proj", "q_proj"),
        (["q_proj"], ["q_proj"]),
    ],
)
def test_targets_are_a_group_or_module_names(given: Any, resolved: Any) -> None:
    assert TrainConfig(data="x", target=given).target == resolved


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", 0), ("rank", 1.5), ("rank", "many"), ("rank", None), ("alpha", 0), ("dropout", 1), ("dropout", -0.1),
        ("lr", -1), ("lr", float("nan")), ("lr", float("inf")), ("warmup", 1.1), ("epochs", 0), ("max_steps", 0),
        ("batch_size", 0), ("betas", [0.9]), ("betas", [0.9, 1]), ("eps", 0), ("seed", -1), ("seed", 2**32),
        ("valid_fraction", 1), ("max_length", 1), ("eval_every", 0), ("eval_every", "never"), ("save_every", -1),
        ("keep", 0), ("early_stop", 0), ("method", "dora"), ("dtype", "int8"), ("scheduler", "step"), ("target", ""),
        ("target", []), ("overlong", "cut"), ("shuffle", "perhaps"), ("data", 3),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_name(field: str, value: object) -> None:
    error = refusal(**({"data": "x.jsonl"} | {field: value}))
    assert error.what.startswith(f"{field}: ")
    assert repr(value) in error.what


def test_every_problem_is_reported_at_once_and_a_misspelt_key_gets_its_likeness(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: x\nepoch: 3\nrank: 0\nlr: -1\n")
    error = refusal(file)
    assert "epoch: no such setting" in error.what
    assert "rank: " in error.what
    assert "lr: " in error.what
    assert error.hint == 'did you mean "epochs"?'
    assert error.where == str(file)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "nothing to train on"),
        ({"data": "x", "valid": "y", "valid_fraction": 0.1}, "exclude each other"),
        ({"data": "x", "method": "full", "init_adapter": "y"}, "trains no adapter"),
        ({"data": "x", "method": "full", "resume_from_peft": "y"}, "trains no adapter"),
        ({"data": "x", "init_adapter": "y", "resume_from_peft": "z"}, "exclude each other"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    assert message in refusal(**settings).what


def test_a_value_of_two_kinds_names_both() -> None:
    assert "'epoch'" in refusal(data="x", eval_every="epok").what


@pytest.mark.parametrize(
    ("content", "message", "line"),
    [
        (b"data: x\n\trank: 2", "not YAML", ":2"),
        (b"data: [1", "not YAML", ":1"),
        (b"- a\n- b", "not a mapping", ""),
        (b"", "not a mapping", ""),
        (b"just words", "not a mapping", ""),
        (b"1: 2", "not a mapping", ""),
        (b"? [a]\n: b", "not YAML", ":1"),
        (bytes(range(256)), "not UTF-8", ""),
        (b"a: \x00", "not YAML", ""),
        (b"lr: 2020-99-99", "not a configuration", ""),
        (b"rank: " + b"9" * 5000, "not a configuration", ""),
        (b"[" * 3000, "not YAML: nested deeper", ":1"),
        (b"lr: !!python/object:os.system x", "not YAML", ":1"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_with_its_line(
    tmp_path: Path, content: bytes, message: str, line: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(content)
    error = refusal(file)
    assert message in error.what
    assert error.where == f"{file}{line}"


def test_a_file_that_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        assert refusal(path).where == str(path)
    with pytest.raises(UserError):
        read_yaml(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("text", ["\ud83d", "\ud800x", "x\udfffy"])
def test_half_a_character_is_refused(text: str) -> None:
    for options in ({"model": text}, {"data": ["x", text]}, {"chat_template_kwargs": {"a": text}}):
        assert "surrogates not allowed" in refusal(**({"data": "x"} | options)).what


def test_a_template_variable_without_end_is_refused() -> None:
    assert "not JSON" in refusal(data="x", chat_template_kwargs={"a": float("inf")}).what


def test_a_file_whose_name_is_not_utf8_can_be_named(tmp_path: Path) -> None:
    config = TrainConfig(data="/\udcff.jsonl", out="\udc80")
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert TrainConfig.resolve(file) == config


def test_a_configuration_does_not_change() -> None:
    config = TrainConfig(data="x")
    with pytest.raises(ValidationError, match="frozen"):
        config.rank = 3


def test_an_option_is_named_as_its_field() -> None:
    assert option_name("max_grad_norm") == "--max-grad-norm"
    assert option_name("json_lines") == "--json"


@pytest.mark.parametrize(
    ("settings", "key", "owner"),
    [
        *(
            ({"method": "full", key: value}, key, "--method lora, and this run has --method full")
            for key, value in {
                "rank": 4, "target": "qv", "alpha": 2.0, "rslora": True, "init": "gaussian", "dropout": 0.1, "dora": True,
                "rank_pattern": "q_proj=3", "alpha_pattern": {"q_proj": 2.0},
            }.items()
        ),
        ({"betas": [0.9, 0.99], "optimizer": "sgd"}, "betas", "--optimizer adamw, adamw8bit and lion, and this run has --optimizer sgd"),
        ({"momentum": 0.9}, "momentum", "--optimizer muon and sgd, and this run has --optimizer adamw"),
    ],
)  # fmt: skip
def test_a_setting_of_what_was_not_chosen_names_its_owner(settings: dict[str, Any], key: str, owner: str) -> None:
    error = refusal(data="x", **settings)
    assert error.what == f"{key}: a setting of {owner}"
    assert error.hint.startswith(f"leave {key} out, or choose ")


def test_python_is_told_in_the_same_words(tmp_path: Path) -> None:
    with pytest.raises(UserError, match='did you mean "rank"') as caught:
        TrainConfig(data="x", rnak=3)
    assert caught.value.what == "rnak: no such setting"


def test_rows_in_place_of_the_names_of_files_are_one_error() -> None:
    rows = [{"messages": [{"role": "user", "content": "a" * 50}]}] * 1800
    error = refusal(data=rows)
    assert "train(config, data=rows)" in error.what
    assert len(error.what) < 400


def test_a_configuration_can_be_pickled() -> None:
    config = TrainConfig(data="x", rank=3, optimizer="lion", betas=(0.8, 0.9))
    again = pickle.loads(pickle.dumps(config))
    assert again == config
    assert again.model_fields_set == config.model_fields_set


def test_two_owners_may_not_have_one_setting() -> None:
    class Greedy(LoraSettings):
        lr: float = 1.0
        """Taken."""

    with pytest.raises(UserError, match=r"lr: both .*Greedy and .*TrainConfig have a setting of this name"):
        _joined(Greedy)
