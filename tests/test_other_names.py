from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from string import Formatter
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError
from mlx_sft.common_settings import public_name
from mlx_sft.config import all_fields
from mlx_sft.errors import USAGE
from mlx_sft.other_names import OTHER_NAMES

pytestmark = pytest.mark.fast

NAMES = {
    "learning_rate": "write {}lr",
    "gradient_accumulation_steps": "{}batch{}size is the conversations of an optimizer step; memory decides",
    "per_device_train_batch_size": "{}batch{}size is the conversations of an optimizer step; memory decides",
    "num_layers": "write {}layers last:16",
    "iters": "write {}max{}steps",
    "steps": "write {}max{}steps",
    "batch": "write {}batch{}size",
    "output_dir": "write {}out",
    "lora_r": "write {}rank",
    "lora_alpha": "write {}alpha",
    "lora_dropout": "write {}dropout",
    "num_train_epochs": "write {}epochs",
    "max_seq_length": "write {}max{}length",
    "warmup_ratio": "write {}warmup",
    "save_steps": "write {}save{}every",
    "eval_steps": "write {}eval{}every",
    "train": "leave it out: `mlx-sft train` trains",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_another_trainer_is_understood_as_an_option_and_as_a_key(
    name: str, cli: Callable[..., Any], tmp_path: Path
) -> None:
    as_option, as_key = (
        NAMES[name].replace("{}", first, 1).replace("{}", then) for first, then in (("--", "-"), ("", "_"))
    )
    option = "--" + name.replace("_", "-")
    result = cli("train", "--data", "x", option, "3")
    assert result.exit_code == USAGE
    assert f"error: no such option {option}\nhint: {as_option}" in result.stderr
    file = tmp_path / "c.yaml"
    file.write_text(f"data: x\n{name}: 3\n")
    with pytest.raises(UserError, match=f"{name}: no such setting") as caught:
        TrainConfig.resolve(file)
    assert caught.value.hint.startswith(as_key)


def test_what_is_suggested_is_there_and_what_is_there_is_not_corrected() -> None:
    fields = all_fields()
    for name, text in OTHER_NAMES.items():
        assert {field for _, field, _, _ in Formatter().parse(text) if field} <= set(fields), name
    assert not {public_name(field) for field in fields} & set(OTHER_NAMES)


def test_each_unknown_key_has_its_own_suggestion(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: x\nlora_r: 8\nepoch: 3\nmomentum: 0.9\n")
    with pytest.raises(UserError, match="lora_r: no such setting; epoch: no such setting; momentum: ") as caught:
        TrainConfig.resolve(file)
    assert caught.value.hint.startswith(
        'lora_r: write rank; epoch: did you mean "epochs"?; momentum: leave momentum out'
    )


def test_a_command_suggests_only_what_it_has(cli: Callable[..., Any]) -> None:
    assert "write --lr" not in cli("inspect", "--data", "x", "--learning-rate", "3").stderr
    assert "write --max-length" in cli("inspect", "--data", "x", "--max-seq-length", "3").stderr
