"""Defaults that suit a model, a method and an objective, and who overrides whom."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_sft import TrainConfig, UserError
from mlx_sft.recommended import FILE, in_words
from mlx_sft.report.run import RunFiles
from mlx_sft.run_folder import RunFolder

pytestmark = pytest.mark.fast

_ENTRIES = """recommended:
  - {lr: 1.0e-3, epochs: 3}
  - {method: full, lr: 1.0e-4}
  - {optimizer: [lion, sgd], objective: sft, lr: 3.0e-4}
"""


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model folder with recommendations, of which nothing else is asked here."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / FILE).write_text(_ENTRIES)
    return str(folder)


def test_what_is_typed_goes_before_the_file_before_the_model_before_the_default(model: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"data: x\nmodel: {model}\nlr: 5.0e-3\n")
    typed = TrainConfig.resolve(file, lr=7e-3)
    assert [typed.lr, TrainConfig.resolve(file).lr] == [7e-3, 5e-3]
    config = TrainConfig(data="x", model=model)
    assert (config.lr, config.epochs, config.batch_size) == (1e-3, 3, 8)
    assert in_words(config.recommended()) == "lr 0.001, epochs 3 (recommended for this model)"
    assert in_words(typed.recommended()) == "epochs 3 (recommended for this model)"
    assert TrainConfig(data="x", model="another").lr == 2e-4


def test_an_entry_counts_for_the_method_objective_and_optimizer_that_it_names(model: str) -> None:
    assert TrainConfig(data="x", model=model, method="full").lr == 1e-4
    assert TrainConfig(data="x", model=model, optimizer="lion").lr == 3e-4
    assert TrainConfig(data="x", model=model, optimizer="lion", objective="dpo").lr == 1e-3


def test_full_fine_tuning_takes_a_tenth_of_the_rate_of_lora_and_preferences_a_fortieth() -> None:
    rates = {
        (method, objective): TrainConfig(data="x", method=method, objective=objective).lr
        for method in ("lora", "full")
        for objective in ("sft", "dpo")
    }
    assert rates == {("lora", "sft"): 2e-4, ("lora", "dpo"): 5e-6, ("full", "sft"): 2e-5, ("full", "dpo"): 5e-7}
    config = TrainConfig(data="x", method="full", objective="dpo")
    assert in_words(config.recommended()) == "lr 5e-07 (recommended for --method full and --objective dpo)"


def test_the_written_configuration_says_what_is_recommended_and_keeps_it(model: str, tmp_path: Path) -> None:
    config = TrainConfig(data="x", model=model)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert "lr: 0.001  # recommended for this model\n" in file.read_text()
    (Path(model) / FILE).unlink()
    assert TrainConfig.resolve(file).lr == 1e-3, "a run that goes on keeps what it had"


def test_the_page_of_a_run_tells_what_was_recommended(model: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(TrainConfig(data="x", model=model, epochs=4).to_yaml())
    told = {one.name: one for one in RunFiles.of(RunFolder(run)).all_settings()}
    assert (told["lr"].value, told["lr"].recommended) == ("0.001", "for this model")
    assert (told["epochs"].value, told["epochs"].default, told["epochs"].recommended) == ("4", "3", "")
    (Path(model) / FILE).write_text("recommended: 3\n")
    assert {one.name for one in RunFiles.of(RunFolder(run)).all_settings()} == told.keys()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("recommended: 3\n", "no list"),
        (
            "recommended:\n- {callbacks: [mine]}\n",
            r"callbacks: a model recommends valid_fraction, epochs, .*nothing else",
        ),
        ("recommended:\n- {lr: fast}\n", "lr: "),
        ("recommended: [\n", "not YAML"),
    ],
)
def test_recommendations_that_cannot_be_are_an_error_that_names_their_file(
    model: str, content: str, message: str
) -> None:
    (Path(model) / FILE).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        TrainConfig(data="x", model=model)
    assert FILE in caught.value.where
    assert caught.value.hint
