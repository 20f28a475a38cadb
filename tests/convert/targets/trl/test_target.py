"""The script of a TRL export, carried out by TRL and PEFT on the CPU, repeats the run that it was exported from."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from packaging.requirements import Requirement

from mlx_sft import TrainConfig, UserError, evaluate_run, export, train
from mlx_sft.data.prepare import prepare
from mlx_sft.errors import USAGE
from mlx_sft.methods import lora
from mlx_sft.methods.peft_files import read_adapter
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.schedule import planned_steps
from tests.chosen import without_adapter
from tests.run_folders import outcome
from tests.trl_exports import STEPS, Pair, export_trl

WRITTEN = {
    "train.py",
    "requirements.txt",
    "trl.json",
    "rows.jsonl",
    "steps.jsonl",
    "config.yaml",
    "README.md",
    "initial_adapter/adapter_config.json",
    "initial_adapter/adapter_model.safetensors",
}
LEFT_BY_THE_SCRIPT = {
    "metrics.jsonl",
    "adapter/README.md",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "adapter/optimizer.safetensors",
    "adapter/progress.json",
}


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refusal(run: Path, to: Path) -> UserError:
    with pytest.raises(UserError) as caught:
        export_trl(run, to)
    assert caught.value.hint
    assert not to.exists()
    return caught.value


def test_it_has_these_files(pair: Pair) -> None:
    assert files(pair.exported) == WRITTEN


def test_its_losses_rates_and_norms_are_the_runs(pair: Pair, trained: Path) -> None:
    ours, theirs = lines(pair.run / "metrics.jsonl"), lines(trained / "metrics.jsonl")
    assert [record["step"] for record in theirs] == list(range(1, STEPS + 1))
    for our, their in zip(ours, theirs, strict=True):
        assert their["loss"] == pytest.approx(our["loss"], rel=1e-5)
        assert their["grad_norm"] == pytest.approx(our["grad_norm"], rel=1e-5)
        assert their["learning_rate"] == pytest.approx(our["learning_rate"], rel=1e-6)
    assert ours[-1]["loss"] < 0.9 * ours[0]["loss"]
    assert max(our["grad_norm"] for our in ours) > 0.5, "nothing was clipped"
    assert sum(our["micro_batches"] > 1 for our in ours) > STEPS // 2


def test_its_adapter_is_the_runs(pair: Pair, trained: Path) -> None:
    assert files(trained) == WRITTEN | LEFT_BY_THE_SCRIPT
    (settings, ours), (again, theirs) = read_adapter(pair.run / "adapter"), read_adapter(trained / "adapter")
    _, start = read_adapter(pair.exported / "initial_adapter")
    assert again == settings
    assert theirs.keys() == ours.keys() == start.keys()
    for name, our in ours.items():
        moved = float(mx.abs(our - start[name]).max())
        np.testing.assert_allclose(np.array(theirs[name]), np.array(our), rtol=0, atol=1e-3 * moved)


def test_what_it_leaves_is_a_run_like_any_other(pair: Pair, trained: Path, tmp_path: Path) -> None:
    data = pair.settings["data"]
    ours, theirs = evaluate_run(pair.run, data).evaluation, evaluate_run(trained, data).evaluation
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-4)
    assert (export(trained, tmp_path / "merged").path / "model.safetensors").is_file()


def test_its_steps_have_the_rows_of_the_plan_with_their_labels(pair: Pair, tokenizer: Any) -> None:
    config = TrainConfig.resolve(RunFolder(pair.run).config)
    data = prepare(config, tokenizer)
    rows, steps = lines(pair.exported / "rows.jsonl"), lines(pair.exported / "steps.jsonl")
    plan = list(planned_steps(config, data).steps())
    assert [len(step["rows"]) for step in steps] == [4, 4, 3, 4, 4, 3, 4, 4, 3, 4]
    for step, planned in zip(steps, plan, strict=True):
        assert step["step"] == planned.number
        for number, row in zip(step["rows"], planned.rows, strict=True):
            example = data.train[row]
            assert rows[number] == {"input_ids": example.token_ids.tolist(), "labels": example.labels.tolist()}


def test_rows_that_no_step_has_are_left_out(settings: dict[str, Any], tmp_path: Path) -> None:
    run = train(TrainConfig(**settings | {"epochs": 1, "max_steps": 1})).run_dir
    exported = export_trl(run, tmp_path / "trl")
    assert len(lines(exported / "rows.jsonl")) == 4
    (step,) = lines(exported / "steps.jsonl")
    assert (step["step"], sorted(step["rows"])) == (1, [0, 1, 2, 3])


@pytest.mark.parametrize("changes", [{}, {"init": "gaussian", "target": "qv", "rslora": True}])
def test_its_start_is_the_runs(settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any]) -> None:
    """A run with a learning rate of zero ends as it began."""
    run = train(TrainConfig(**settings | {"lr": 0.0, "seed": 5} | changes)).run_dir
    exported = export_trl(run, tmp_path / "trl")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (exported / "initial_adapter" / name).read_bytes() == (run / "adapter" / name).read_bytes()


def test_a_start_from_another_adapter_is_that_adapter(settings: dict[str, Any], tmp_path: Path) -> None:
    first = train(TrainConfig(**settings)).run_dir / "adapter"
    again = settings | {"init_adapter": str(first), "out": str(tmp_path / "again")}
    exported = export_trl(train(TrainConfig(**again)).run_dir, tmp_path / "trl")
    weights = "adapter_model.safetensors"
    assert (exported / "initial_adapter" / weights).read_bytes() == (first / weights).read_bytes()


def test_a_run_that_has_only_begun_has_the_same_trl_export(pair: Pair, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    begun.mkdir()
    for name in ("config.yaml", "environment.json", "data_report.json"):
        shutil.copy(pair.run / name, begun)
    assert outcome(export_trl(begun, tmp_path / "trl")) == outcome(pair.exported)


def test_the_command_writes_it(pair: Pair, cli: Callable[..., Any], tmp_path: Path) -> None:
    command = ("export", "--run", pair.run, "--to", tmp_path / "trl", "--format", "trl")
    result = cli(*command)
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'trl'}\n")
    again = cli(*command)
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
    assert cli(*command, "--overwrite").exit_code == 0


def test_its_readme_says_what_is_not_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    plain = train(TrainConfig(**settings | {"max_steps": 1})).run_dir
    dropping = train(TrainConfig(**settings | {"max_steps": 1, "dropout": 0.25, "out": str(tmp_path / "d")})).run_dir
    without, with_dropout = (
        (export_trl(run, tmp_path / f"trl-{number}") / "README.md").read_text()
        for number, run in enumerate((plain, dropping))
    )
    assert "Dropout (0.25)" in with_dropout
    assert "Dropout" not in without
    assert settings["model"] in without
    assert not re.search(r"[{}]", without)


def test_what_it_needs_is_what_it_was_tried_with(pair: Pair) -> None:
    for line in (pair.exported / "requirements.txt").read_text().splitlines():
        requirement = Requirement(line)
        assert requirement.specifier.contains(version(requirement.name), prereleases=True)


def test_full_fine_tuning_has_no_trl_export(settings: dict[str, Any], tmp_path: Path) -> None:
    run = train(TrainConfig(**without_adapter(settings) | {"method": "full", "max_steps": 1})).run_dir
    error = refusal(run, tmp_path / "trl")
    assert "--method full has no adapter" in error.what
    assert error.exit_code == USAGE


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer": "sgd"}, "--optimizer sgd"),
        ({"dora": True}, "DoRA"),
        ({"quantize": "8"}, "quantized in MLX's own form"),
    ],
)
def test_what_trl_would_do_otherwise_is_refused_by_name(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    run = train(TrainConfig(**settings | changes | {"max_steps": 1})).run_dir
    error = refusal(run, tmp_path / "trl")
    assert named in error.what
    assert error.exit_code == USAGE


def test_weights_of_messages_are_refused_with_their_row(settings: dict[str, Any], tmp_path: Path) -> None:
    data = tmp_path / "weighted.jsonl"
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat", "weight": 0.5}]
    data.write_text(json.dumps({"messages": messages}) + "\n")
    run = train(TrainConfig(**settings | {"data": str(data)})).run_dir
    error = refusal(run, tmp_path / "trl")
    assert error.where == f"{data}:1"
    assert "have weights" in error.what


def test_an_adapter_on_the_head_is_refused(
    settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    untied = {"model": str(make_base("qwen3")), "target": ["q_proj", "lm_head"], "max_steps": 1}
    assert "lm_head" in refusal(train(TrainConfig(**settings | untied)).run_dir, tmp_path / "trl").what


def test_data_that_changed_since_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    data = shutil.copy(settings["data"], tmp_path / "chats.jsonl")
    run = train(TrainConfig(**settings | {"data": str(data), "max_steps": 1})).run_dir
    data.write_text(data.read_text().replace("cat", "dog", 1))
    assert "the data changed" in refusal(run, tmp_path / "trl").what


def test_a_start_that_was_written_otherwise_is_noticed(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def otherwise(folder: Path, settings: Any, parameters: dict[str, mx.array], *names: Any) -> None:
        write(folder, settings, {name: value + 1 for name, value in parameters.items()}, *names)

    write = lora.write_adapter
    monkeypatch.setattr(lora, "write_adapter", otherwise)
    with pytest.raises(UserError, match="not written as it is"):
        export_trl(pair.run, tmp_path / "trl")
    assert not (tmp_path / "trl").exists()
    export_trl(pair.run, tmp_path / "trl", verify=False)


def test_an_adapter_of_which_peft_would_lose_a_part_is_refused(
    settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    base = make_base("qwen3_next")
    chosen = {"model": str(base), "target": "q_proj,shared_expert.up_proj", "max_steps": 1}
    run = train(TrainConfig(**settings | chosen)).run_dir
    error = refusal(run, tmp_path / "trl")
    assert "no place for the adapter on model.layers.0.mlp.shared_expert.up_proj" in error.what
    assert "--target attention" in error.hint
