"""The forgetting of a run: what compare measures of its result, at each evaluation, and training is the same with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, load_run, train
from mlx_sft.compare.comparison import meter_on, split_of
from mlx_sft.training import forgetting
from mlx_sft.training.forgetting import general_rows
from tests.run_folders import outcome


def forgotten(run: Path) -> list[float | None]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["forgetting"] for line in lines if line["kind"] == "evaluation"]


@pytest.fixture
def evaluated(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Of a run of three evaluations, whose best is the last, on three general texts."""
    general = tmp_path / "general.jsonl"
    texts = ["the dog and the cat", "the mat and", "the cat"]  # no longer than the rows that are trained on
    general.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return settings | {"valid_fraction": 0.2, "eval_every": 2, "max_steps": 6, "general_data": str(general)}


WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora on the head": {"target": "all-linear,lm_head", "init": "pissa"},
    "full": {"method": "full", "lr": 1e-3},
    "prefix": {"method": "prefix", "virtual_tokens": 3},
    "bottleneck": {"method": "bottleneck", "bottleneck_init": "bert"},
    "quantized": {"quantize": "4"},
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_what_compare_measures_of_the_result(evaluated: dict[str, Any], make_base: Any, way: str) -> None:
    common = {name: value for name, value in evaluated.items() if name != "rank" or "method" not in WAYS[way]}
    model = str(make_base("qwen3", tied=way != "lora on the head"))
    run = train(TrainConfig(**common | {"model": model} | WAYS[way])).run_dir
    loaded = load_run(run, step="last")
    assert loaded.train_config is not None
    rows = general_rows(loaded.train_config, evaluated["general_data"], loaded.tokenizer, None)
    expected = meter_on(load_run(run, base=True), rows).measured(split_of(loaded))
    found = forgotten(run)
    assert len(found) == 3
    assert found[-1] == pytest.approx(expected, rel=1e-3)
    assert expected > 1e-4


def test_training_is_the_same_with_it_and_a_run_goes_on_to_the_same(evaluated: dict[str, Any], tmp_path: Path) -> None:
    run = train(TrainConfig(**evaluated, save_every=3, keep=1)).run_dir
    other = train(
        TrainConfig(**evaluated | {"forgetting": False, "out": str(tmp_path / "other"), "save_every": 3, "keep": 1})
    ).run_dir
    whole, without = outcome(run), outcome(other)
    assert {"forgetting"} == {name for line in whole["metrics.jsonl"] for name in line} - {
        name for line in without["metrics.jsonl"] for name in line
    }
    for name in ("adapter/adapter_model.safetensors", "checkpoints/step-00000006/optimizer.safetensors"):
        assert whole[name] == without[name]
    halves = tmp_path / "halves"
    train(TrainConfig(**evaluated | {"out": str(halves), "save_every": 3, "keep": 3}))
    (halves / "checkpoints/step-00000006").rename(tmp_path / "gone")
    (halves / "README.md").unlink()
    train(TrainConfig.resolve(resume=str(halves), keep=1, quiet=True))
    assert outcome(halves)["metrics.jsonl"] == whole["metrics.jsonl"]


def test_a_base_that_did_not_move_has_forgotten_nothing(evaluated: dict[str, Any]) -> None:
    assert forgotten(train(TrainConfig(**evaluated | {"lr": 0.0})).run_dir) == [0.0, 0.0, 0.0]


def test_of_the_texts_that_come_along_a_part_is_read_by_what_is_trained_on(
    evaluated: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[list[int]] = []

    class Noted(forgetting.ForgettingMeter):
        def __init__(self, split: Any, examples: Any, *further: Any) -> None:
            lengths.append(examples.lengths.tolist())
            super().__init__(split, examples, *further)

    monkeypatch.setattr(forgetting.ForgettingMeter, "of_run", Noted.of_run)
    del evaluated["general_data"]
    for share in (0.05, 100.0):
        monkeypatch.setattr(forgetting, "_SHARE", share)
        train(TrainConfig(**evaluated | {"max_steps": 1, "out": f"{evaluated['out']}{share}"}))
    few, many = lengths
    assert 0 < sum(few) <= 128
    assert max(many) < 60, "as long as rows that are trained on"
    assert 1000 < sum(many) <= forgetting.MOST_TOKENS


def test_without_held_out_rows_nothing_is_measured_and_rows_that_cannot_be_are_refused(
    evaluated: dict[str, Any],
) -> None:
    missing = {"general_data": "missing.jsonl"}
    run = train(TrainConfig(**evaluated | missing | {"valid_fraction": 0.0, "max_steps": 1})).run_dir
    assert forgotten(run) == []
    with pytest.raises(UserError, match="no such file"):
        train(TrainConfig(**evaluated | missing | {"out": f"{run}-other"}))
    assert not Path(f"{run}-other").exists()
