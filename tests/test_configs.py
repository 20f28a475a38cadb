from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest

from mlx_sft.cli import main
from mlx_sft.config import TrainConfig
from mlx_sft.files import read_yaml

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SHIPPED = {
    "deepseek-r1-distill-qwen-1.5b-smoltalk",
    "qwen3-0.6b-dpo",
    "qwen3-0.6b-full",
    "qwen3-0.6b-full-light",
    "qwen3-0.6b-lora",
    "smollm2-135m-lora",
    "tiny-dpo",
    "tiny-lora",
}


def test_these_configs_are_shipped() -> None:
    assert {path.stem for path in CONFIGS} == SHIPPED


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_loads_and_keeps_every_setting(path: Path) -> None:
    config = TrainConfig.resolve(path)
    resolved = config.model_dump(mode="json", by_alias=True)
    for name, value in read_yaml(path).items():
        beside = value if str(value).startswith("hf:") else str((path.parent / str(value)).resolve())
        assert resolved[name] == ([beside] if name == "data" else value), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_opens_with_the_command_that_runs_it(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    program, verb, *arguments = shlex.split(first.removeprefix("# "))
    assert (program, verb) == ("mlx-sft", "train")
    command = main.commands[verb]
    (option,) = [parameter for parameter in command.get_params(click.Context(command)) if "--config" in parameter.opts]
    context = command.make_context(verb, arguments)
    assert context.params[str(option.name)] == f"configs/{path.name}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_configs_data_is_there_or_on_the_hub(path: Path) -> None:
    config = TrainConfig.resolve(path)
    for data in filter(None, (*config.data, config.valid)):
        assert data.startswith("hf:") or Path(data).is_file()


def test_the_settings_of_the_well_known_script() -> None:
    config = TrainConfig.resolve(ROOT / "configs/deepseek-r1-distill-qwen-1.5b-smoltalk.yaml")
    assert (config.rank, config.alpha, config.dropout) == (16, 32, 0.05)
    assert config.target == ["q_proj", "v_proj"]
    assert (config.lr, config.epochs) == (5e-5, 3)
    assert (config.eval_every, config.save_every) == ("epoch", "epoch")
    assert config.data[0].startswith("hf:HuggingFaceTB/smoltalk")
