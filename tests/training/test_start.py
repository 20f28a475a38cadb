"""`--resume-from-peft`: what the script of a TRL export left goes on as if it had never been elsewhere; any other adapter is a start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.errors import USAGE
from mlx_sft.methods.peft_files import read_adapter
from mlx_sft.run_folder import RunFolder
from tests.trl_exports import STEPS, Pair, export_trl

HALF = STEPS // 2


def go_on(exported: Path, to: Path, **further: Any) -> RunFolder:
    return RunFolder(train(TrainConfig(resume_from_peft=str(exported), out=str(to), quiet=True, **further)).run_dir)


def refusal(exported: Path, to: Path, **further: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        go_on(exported, to, **further)
    assert caught.value.hint
    assert not to.exists()
    return caught.value


def losses(run: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


@pytest.mark.parametrize("part", [".", "adapter"])
def test_a_trl_export_goes_on_as_the_undisturbed_run(pair: Pair, half_trained: Path, tmp_path: Path, part: str) -> None:
    run = go_on(half_trained / part, tmp_path / "run")
    undisturbed, ours = losses(pair.run), losses(run.path)
    assert list(ours) == list(range(HALF + 1, STEPS + 1))
    for step, loss in ours.items():
        assert loss == pytest.approx(undisturbed[step], rel=1e-5)
    (settings, expected), (again, found) = read_adapter(pair.run / "adapter"), read_adapter(run.adapter)
    _, start = read_adapter(pair.exported / "initial_adapter")
    assert again == settings
    for name, value in expected.items():
        moved = float(mx.abs(value - start[name]).max())
        np.testing.assert_allclose(np.array(found[name]), np.array(value), rtol=0, atol=1e-3 * moved)


def test_without_its_moments_it_would_be_another_run(pair: Pair, half: Path, tmp_path: Path) -> None:
    moments = load_file(half / "adapter" / "optimizer.safetensors")
    save_file(
        {name: np.zeros_like(value) for name, value in moments.items()}, half / "adapter" / "optimizer.safetensors"
    )
    ours, undisturbed = losses(go_on(half, tmp_path / "run").path), losses(pair.run)
    assert ours[STEPS] != pytest.approx(undisturbed[STEPS], rel=1e-3)


def test_it_is_killed_and_resumed_like_any_other(half: Path, tmp_path: Path) -> None:
    whole = go_on(half, tmp_path / "whole")
    cut = go_on(half, tmp_path / "cut")
    assert cut.checkpoint_steps() == [5, 6, 8, 10]
    for step in (8, 10):
        shutil.rmtree(cut.checkpoint(step))
    shutil.rmtree(half)  # its checkpoint holds what was taken from there
    train(TrainConfig(resume=str(cut.path), quiet=True))
    weights = "adapter_model.safetensors"
    assert (cut.adapter / weights).read_bytes() == (whole.adapter / weights).read_bytes()
    assert losses(cut.path) == losses(whole.path)


def test_killed_before_its_first_checkpoint_it_begins_at_the_same_step(half: Path, tmp_path: Path) -> None:
    run = go_on(half, tmp_path / "run")
    before, written = losses(run.path), run.checkpoint_steps()
    shutil.rmtree(run.checkpoints)
    train(TrainConfig(resume=str(run.path), quiet=True))
    assert (losses(run.path), run.checkpoint_steps()) == (before, written)


def test_its_configuration_repeats_it(half_trained: Path, tmp_path: Path) -> None:
    run = go_on(half_trained, tmp_path / "run")
    again = RunFolder(train(TrainConfig.resolve(run.config, out=str(tmp_path / "again"), quiet=True)).run_dir)
    assert losses(again.path) == losses(run.path)


def test_it_can_be_given_more_steps(half_trained: Path, tmp_path: Path) -> None:
    run = go_on(half_trained, tmp_path / "run", max_steps=STEPS + 2)
    assert max(losses(run.path)) == STEPS + 2


def test_a_finished_trl_export_leaves_nothing_to_do(trained: Path, tmp_path: Path) -> None:
    run = go_on(trained, tmp_path / "run")
    assert losses(run.path) == {}
    (_, theirs), (_, ours) = read_adapter(trained / "adapter"), read_adapter(run.adapter)
    assert all(mx.array_equal(ours[name], theirs[name]) for name in theirs)


def test_the_command_needs_nothing_but_the_folder(half_trained: Path, cli: Callable[..., Any], tmp_path: Path) -> None:
    result = cli("train", "--resume-from-peft", half_trained, "--out", tmp_path / "run")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'run'}\n")
    assert f"resuming after step {HALF}" in result.stderr


@pytest.mark.parametrize(
    ("changes", "option"), [({"lr": 1.0}, "--lr"), ({"rank": 2}, "--rank"), ({"data": ["x", "y"]}, "--data")]
)
def test_another_setting_given_along_is_refused(
    half_trained: Path, tmp_path: Path, changes: dict[str, Any], option: str
) -> None:
    error = refusal(half_trained, tmp_path / "run", **changes)
    assert error.what.startswith(f"{option} ")
    assert error.exit_code == USAGE


def test_a_trl_export_that_was_not_trained_is_refused(pair: Pair, tmp_path: Path) -> None:
    error = refusal(pair.exported, tmp_path / "run")
    assert "has not been trained" in error.what
    assert "train.py" in error.hint


@pytest.mark.parametrize("name", ["data", "model"])
def test_a_trl_export_of_other_data_or_another_model_is_refused(half: Path, tmp_path: Path, name: str) -> None:
    words = json.loads((half / "trl.json").read_text())
    words["identity"][name] = "another"
    (half / "trl.json").write_text(json.dumps(words))
    assert f"the {name} changed" in refusal(half, tmp_path / "run").what


@pytest.mark.parametrize("step", [0, -1, STEPS + 1, True, "5", 5.0, None])
def test_a_step_that_cannot_be_is_refused(half: Path, tmp_path: Path, step: object) -> None:
    (half / "adapter" / "progress.json").write_text(json.dumps({"step": step}))
    assert refusal(half, tmp_path / "run").where == str(half / "adapter" / "progress.json")


@pytest.mark.parametrize("damage", ["renamed", "missing", "reshaped", "stranger", "gone"])
def test_moments_of_another_adapter_are_refused(half: Path, tmp_path: Path, damage: str) -> None:
    file = half / "adapter" / "optimizer.safetensors"
    moments = load_file(file)
    first = next(iter(moments))
    value = moments.pop(first)
    others: dict[str, dict[str, Any]] = {
        "renamed": {first.replace("layers.0", "layers.7"): value},
        "missing": {},
        "reshaped": {first: value[:1]},
        "stranger": {first: value, "what.exp_avg": value},
    }
    file.unlink() if damage == "gone" else save_file(moments | others[damage], file)
    assert refusal(half, tmp_path / "run").where == str(file)


def test_any_other_adapter_is_a_start_and_that_is_said(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(TrainConfig(**settings)).run_dir / "adapter"
    (first / "trainer_state.json").write_text('{"global_step": 3}')
    (first / "optimizer.pt").write_bytes(b"never opened")
    started = {"from": {"resume_from_peft": str(first), "quiet": False}, "init": {"init_adapter": str(first)}}
    results = []
    for name, start in started.items():
        run = train(TrainConfig(**settings | start | {"out": str(tmp_path / name)})).run_dir
        results.append((run / "adapter" / "adapter_model.safetensors").read_bytes())
    assert results[0] == results[1]
    assert "a new optimizer starts with it at step 0" in capsys.readouterr().err
    assert TrainConfig.resolve(RunFolder(tmp_path / "from").config).init_adapter == str(first)
    assert train(TrainConfig(resume=str(tmp_path / "from"), quiet=True)).steps == 6


def test_a_trl_export_is_not_resumed_as_a_run(half_trained: Path) -> None:
    with pytest.raises(UserError, match="this is a TRL export") as caught:
        train(TrainConfig(resume=str(half_trained), quiet=True))
    assert caught.value.hint.endswith(f"--resume-from-peft {half_trained}")


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        assert "neither a TRL export nor an adapter" in refusal(folder, tmp_path / "run").what


def test_any_other_adapter_needs_data(settings: dict[str, Any], tmp_path: Path) -> None:
    first = train(TrainConfig(**settings)).run_dir / "adapter"
    error = refusal(first, tmp_path / "other")
    assert "nothing to train on" in error.what
    assert "--data" in error.hint
    assert error.exit_code == USAGE


def test_a_run_that_goes_on_from_a_trl_export_has_no_trl_export_of_its_own(half_trained: Path, tmp_path: Path) -> None:
    run = go_on(half_trained, tmp_path / "run")
    with pytest.raises(UserError, match="no start of its own") as caught:
        export_trl(run.path, tmp_path / "trl")
    assert str(half_trained) in caught.value.hint
