"""Configurations: found by path and by name, their paths led from the file, and one written to start from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlx_sft import TrainConfig, UserError
from mlx_sft.config_files import NAMES_OR_PATHS, PATHS, as_in_file, read_settings, shipped
from mlx_sft.errors import USAGE
from mlx_sft.registry import METHODS, OBJECTIVES
from mlx_sft.settings import on_resume
from mlx_sft.starting_config import starting_config

pytestmark = pytest.mark.fast

Cli = Callable[..., Any]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`experiment/a.jsonl` in the working folder."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "a.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(text: str, name: str = "experiment/c.yaml") -> str:
    Path(name).write_text(text)
    return name


def test_paths_in_a_file_lead_from_it(place: Path) -> None:
    (place / "model").mkdir()
    config = TrainConfig.resolve(
        written("data: [a.jsonl, 'a.jsonl:3', hf:a/b, /x.jsonl]\nvalid: ../b.jsonl\nmodel: ../model\nout: runs/x\n")
    )
    assert config.data == ["experiment/a.jsonl", "experiment/a.jsonl:3", "hf:a/b", "/x.jsonl"]
    assert (config.valid, config.model) == ("b.jsonl", "model")
    assert config.out == "runs/x", "what is written goes where it goes without a file"
    assert TrainConfig.resolve("experiment/c.yaml", data="a.jsonl").data == ["a.jsonl"], "an option leads from here"


@pytest.mark.parametrize("value", ["tiny", "chatml", "Qwen/Qwen3-0.6B", "{{ messages }}" * 3000])
def test_what_may_be_a_name_is_left_as_it_is_where_nothing_is_beside_the_file(place: Path, value: str) -> None:
    name = written(yaml.safe_dump({"model": value, "chat_template": value}))
    assert read_settings(name) == {"model": value, "chat_template": value}


def test_a_path_that_leads_from_the_working_folder_alone_is_told_with_both_ways_out(place: Path) -> None:
    (place / "b.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(
        UserError, match=r"data: b\.jsonl is not beside this file, .* but in the working folder"
    ) as caught:
        TrainConfig.resolve(written("data: b.jsonl\n"))
    assert caught.value.hint == "write data: ../b.jsonl, or give --data b.jsonl"
    assert caught.value.exit_code == USAGE


def test_the_settings_that_lead_from_the_file_are_settings() -> None:
    assert {*PATHS, *NAMES_OR_PATHS} <= TrainConfig.model_fields.keys()
    moved = {name for name, info in TrainConfig.model_fields.items() if on_resume(info).name == "MOVED"}
    assert moved <= {*PATHS, *NAMES_OR_PATHS}


def test_what_ships_is_found_by_name_with_its_rows(place: Path) -> None:
    for name, file in shipped().items():
        config = TrainConfig.resolve(name)
        assert config == TrainConfig.resolve(f"{name}.yaml") == TrainConfig.resolve(file)
        assert all(one.startswith("hf:") or Path(one).is_file() for one in config.data)
    own = written("data: a.jsonl\nrank: 3\n", "tiny-lora.yaml")
    assert TrainConfig.resolve(own).rank == 3, "a file of this name comes first"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("tiny-lorra", "did you mean tiny-lora, which ships?"),
        ("configs/tiny-lora.yaml", "did you mean tiny-lora, which ships?"),
        ("experiment/d.yaml", "did you mean experiment/c.yaml?"),
        ("nothing", "`mlx-sft init` writes one to start from"),
        ("run", "did you mean run/config.yaml?"),
    ],
)
def test_a_configuration_that_is_not_there_is_told_with_the_nearest(place: Path, name: str, hint: str) -> None:
    written("data: a.jsonl\n")
    (place / "run").mkdir()
    written("data: a.jsonl\n", "run/config.yaml")
    with pytest.raises(UserError) as caught:
        TrainConfig.resolve(name)
    assert (caught.value.where, caught.value.exit_code) == (name, USAGE)
    assert hint in caught.value.hint


# init


@pytest.mark.parametrize("method", METHODS.built_in())
@pytest.mark.parametrize("objective", OBJECTIVES.built_in())
def test_a_configuration_to_start_from_is_what_was_asked_for_and_names_every_other_setting(
    method: str, objective: str
) -> None:
    text = starting_config(Path("c.yaml"), {"method": method, "objective": objective, "data": ["a.jsonl"]})
    found = yaml.safe_load(text)
    assert found == {"data": ["a.jsonl"], "model": "Qwen/Qwen3-0.6B", "method": method, "objective": objective}
    config = TrainConfig(**found)
    shown = {line.removeprefix("# ").partition(":")[0] for line in text.splitlines() if not line.startswith("# -")}
    names = {info.alias or name for name, info in type(config).model_fields.items()}
    assert names - shown == {"resume", "resume_from_peft", "quiet", "json"}


def test_every_default_in_it_may_stand_without_its_sign(place: Path) -> None:
    text = starting_config(Path("c.yaml"), {"method": "lora"})
    names = {info.alias or name for name, info in type(TrainConfig()).model_fields.items()}
    lines = (line.removeprefix("# ") for line in text.splitlines())
    file = written("".join(f"{line}\n" for line in lines if line.partition(":")[0] in names), "c.yaml")
    before = TrainConfig(data="chats.jsonl")
    assert TrainConfig.resolve(file) == before


def test_it_trains_once_data_is_named(cli: Cli, chats: Path, place: Path) -> None:
    made = cli("init", "--model", "tiny")
    assert (made.exit_code, made.stdout) == (0, "train.yaml\n")
    assert "train with: mlx-sft train --config train.yaml --data chats.jsonl" in made.stderr
    result = cli("train", chats, "--config", "train.yaml", "--max-steps", "1")
    assert result.exit_code == 0, result.output
    again = cli("init")
    assert (again.exit_code, "train.yaml: this is there already" in again.stderr) == (USAGE, True)
    assert "nothing to train on" in cli("train", "--config", "train.yaml").stderr


def test_paths_are_written_as_the_file_has_to_name_them(cli: Cli, place: Path) -> None:
    assert cli("init", "experiment/c.yaml", "--data", "experiment/a.jsonl", "--data", "hf:a/b").exit_code == 0
    assert yaml.safe_load(Path("experiment/c.yaml").read_text())["data"] == ["a.jsonl", "hf:a/b"]
    assert TrainConfig.resolve("experiment/c.yaml").data == ["experiment/a.jsonl", "hf:a/b"]
    given = {"data": ["b.jsonl"], "valid": "experiment/a.jsonl", "model": "experiment", "chat_template": "chatml"}
    file = Path("experiment") / "d.yaml"
    written(yaml.safe_dump(as_in_file(given, file)), str(file))
    assert read_settings(file) == given
    assert os.path.relpath("b.jsonl", "experiment") in file.read_text()
