"""A run that has not finished is used as nothing but what it is: a step of it that somebody asked for."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import Result

from mlx_sft import TrainConfig, UserError, evaluate_run, export, load_model, load_run, train
from mlx_sft.errors import USAGE
from mlx_sft.load import load_adapter
from mlx_sft.methods.compose import merge_adapters
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.callbacks import Callback
from tests.chosen import without_adapter
from tests.conftest import settings_of_run

Cli = Callable[..., Result]


class StopsAfter(Callback):
    """Asks the run to stop as Ctrl-C does, once a step is saved."""

    name = "stops-after"

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def on_save(self, run: Any, record: dict[str, Any]) -> None:
        if record["step"] == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def interrupted(settings: dict[str, Any], step: int, **further: Any) -> RunFolder:
    """A run with a checkpoint of every step that was stopped soon after one of them; of its 60 steps or so it cannot take all."""
    config = TrainConfig(**settings | {"save_every": 1, "keep": 99, "lr": 0.05, "warmup": 0} | further)
    with pytest.raises(UserError, match="stopped by SIGINT"):
        train(config, callbacks=[StopsAfter(step)])
    return RunFolder(settings["out"])


@pytest.fixture(scope="module")
def stopped(chats: Path, make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = settings_of_run(chats, make_base("qwen3", tied=True), tmp_path_factory.mktemp("stopped") / "run")
    return interrupted(settings, 3, epochs=20).path


@pytest.fixture
def run(stopped: Path, settings: dict[str, Any]) -> RunFolder:
    return RunFolder(shutil.copytree(stopped, settings["out"]))


def logits(run: RunFolder, **options: Any) -> np.ndarray:
    model = load_run(run.path, dtype="float32", **options).model
    return np.array(model(mx.array([[5, 17, 3, 40, 8]])))


def of_checkpoint(run: RunFolder, step: int) -> np.ndarray:
    """By hand: the base, with the arrays of a checkpoint put into it."""
    loaded = load_run(run.path, dtype="float32", step="last")
    loaded.method.bind(loaded.model, mx.load(str(run.checkpoint(step) / "parameters.safetensors")))
    return np.array(loaded.model(mx.array([[5, 17, 3, 40, 8]])))


USES: dict[str, Callable[[RunFolder, Path], object]] = {
    "load": lambda run, _: load_run(run.path),
    "eval": lambda run, _: evaluate_run(run.path, "no-data.jsonl"),
    "merge of adapters": lambda run, to: merge_adapters([str(run.path), str(run.path)], to),
    **{
        format: lambda run, to, format=format: export(run.path, to, format=format)
        for format in ("merged", "mlx", "peft", "mlx-lm")
    },
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_it_is_refused_with_where_it_stands_and_the_ways_out(run: RunFolder, use: Any, tmp_path: Path) -> None:
    steps = run.checkpoint_steps()
    assert run.adapter.is_dir(), "of its newest checkpoint"
    with pytest.raises(UserError) as caught:
        use(run, tmp_path / "to")
    assert caught.value.what == f"this run has not finished: step {steps[-1]} of 60 is its newest checkpoint"
    assert f"mlx-sft train --resume {run.path}" in caught.value.hint
    assert f"--step best, last, or {', '.join(map(str, steps))}" in caught.value.hint
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("command", ["generate", "chat", "eval", "export", "push"])
def test_every_command_refuses_it(cli: Cli, run: RunFolder, chats: Path, tmp_path: Path, command: str) -> None:
    further = {
        "generate": ["--prompt", "the"], "eval": ["--data", chats], "export": ["--to", tmp_path / "to"],
        "push": ["--repo", "me/model", "--dry-run"],
    }  # fmt: skip
    named = [run.path] if command == "push" else ["--run", run.path]
    result = cli(command, *named, *further.get(command, []))
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"error: {run.path}: this run has not finished: step " in result.stderr
    assert ("--step" in result.stderr) == (command != "push")


def test_a_run_without_a_checkpoint_says_so(settings: dict[str, Any], tmp_path: Path) -> None:
    run = interrupted(settings, 1, epochs=20)
    for folder in (run.checkpoints, run.adapter):
        shutil.rmtree(folder)
    for step in (None, "last"):
        with pytest.raises(UserError, match="this run has not finished: it has no checkpoint yet") as caught:
            load_run(run.path, step=step)
        assert "--step" not in caught.value.hint
        assert caught.value.hint == f"finish it with `mlx-sft train --resume {run.path}`"
    with run.locked(), pytest.raises(UserError, match="this run has not finished") as caught:
        load_run(run.path)
    assert caught.value.hint == "it is training now: wait until it ends"


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_is_taken_as_its_checkpoint_has_it(settings: dict[str, Any], method: str) -> None:
    settings = settings if method == "lora" else without_adapter(settings) | {"method": "full"}
    run = interrupted(settings, 3, epochs=20)
    steps = run.checkpoint_steps()
    found = {step: logits(run, step=step) for step in (1, 2, "2", "last")}
    for step, number in ((1, 1), (2, 2), ("2", 2), ("last", steps[-1])):
        np.testing.assert_array_equal(found[step], of_checkpoint(run, number))
    assert np.abs(found[1] - found[2]).max() > 1e-4


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("format", ["merged", "mlx"])
def test_a_step_is_exported_whole(settings: dict[str, Any], tmp_path: Path, method: str, format: str) -> None:
    settings = settings if method == "lora" else without_adapter(settings) | {"method": "full"}
    run = interrupted(settings, 2, epochs=20)
    before = sorted(path.name for path in run.path.parent.iterdir())
    result = export(run.path, tmp_path / "to" / "model", format=format, step=1)
    assert result.verification is not None
    assert "what the run had trained by step 1" in result.describe()
    written = np.array(load_model(str(result.path), "float32").model(mx.array([[5, 17, 3, 40, 8]])))
    np.testing.assert_allclose(written, logits(run, step=1), atol=1e-5)
    assert np.abs(written - logits(run, step=2)).max() > 1e-4
    assert sorted(path.name for path in run.path.parent.iterdir()) == sorted([*before, "to"]), "no folder is left over"


@pytest.mark.parametrize("changes", [{}, {"target": "attention", "rank_pattern": "q_proj=3", "rslora": True}])
def test_the_adapter_of_a_step_is_that_of_a_run_that_ended_there(
    settings: dict[str, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Byte by byte: with the learning rate constant, a run of two steps is the beginning of a longer one."""
    settings |= {"scheduler": "constant", "warmup": 0, "lr": 0.05} | changes
    run = interrupted(settings, 3, epochs=20)
    short = train(TrainConfig(**settings | {"max_steps": 2, "out": str(tmp_path / "short")})).run_dir
    written = export(run.path, tmp_path / "peft", format="peft", step=2).path
    expected = {path.name: path.read_bytes() for path in (short / "adapter").iterdir()}
    assert {path.name: path.read_bytes() for path in written.iterdir()} == expected
    if not changes:
        alone = export(run.path, tmp_path / "mlx-lm", format="mlx-lm", step=2).path
        again = export(short, tmp_path / "mlx-lm-short", format="mlx-lm").path
        assert (alone / "adapters.safetensors").read_bytes() == (again / "adapters.safetensors").read_bytes()
    np.testing.assert_array_equal(
        np.array(load_adapter(written, settings["model"], "float32").model(mx.array([[5, 17, 3, 40, 8]]))),
        logits(run, step=2),
    )


def worse_in_the_end(settings: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Settings of a run whose first evaluation is the best."""
    valid = tmp_path / "valid.jsonl"
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "0123456789"}]
    valid.write_text(json.dumps({"messages": messages}) + "\n")
    return settings | {"valid": str(valid), "eval_every": 1, "save_every": 1, "keep": 99, "lr": 0.3, "warmup": 0}


def test_best_and_last_of_a_finished_run_are_what_it_keeps(settings: dict[str, Any], tmp_path: Path) -> None:
    run = RunFolder(train(TrainConfig(**worse_in_the_end(settings, tmp_path))).run_dir)
    best, last = run.best_step(), run.checkpoint_steps()[-1]
    assert best is not None
    assert best < last, "this run must get worse in the end"
    for step in (None, "best", best):
        np.testing.assert_array_equal(logits(run, step=step), of_checkpoint(run, best))
    shutil.rmtree(run.checkpoints)  # last/ holds it
    after = logits(run, step="last")
    assert np.abs(after - logits(run)).max() > 1e-4
    run.last.rename(run.path / "elsewhere")
    np.testing.assert_array_equal(logits(run, step="last"), logits(run))


def test_the_best_of_a_run_that_goes_on_is_what_it_keeps(settings: dict[str, Any], tmp_path: Path) -> None:
    run = interrupted(worse_in_the_end(settings, tmp_path), 5, epochs=20, lr=0.3)
    best = run.best_step()
    assert best is not None
    assert best < run.checkpoint_steps()[-1]
    np.testing.assert_array_equal(logits(run, step="best"), of_checkpoint(run, best))


def test_a_run_that_was_not_evaluated_has_no_best(run: RunFolder) -> None:
    with pytest.raises(UserError, match="no best step: it has not been evaluated") as caught:
        load_run(run.path, step="best")
    assert (caught.value.exit_code, caught.value.hint) == (USAGE, "give --step last")


@pytest.mark.parametrize(
    ("step", "what"),
    [("7000", "there is no checkpoint of step 7000"), ("newest", "--step is best, last or the number")],
)
def test_a_step_that_is_not_there_is_told_with_those_that_are(run: RunFolder, cli: Cli, step: str, what: str) -> None:
    result = cli("generate", "--run", run.path, "--step", step, "--prompt", "the")
    assert result.exit_code == USAGE
    assert what in result.stderr
    assert "hint: " in result.stderr


def test_a_checkpoint_that_changed_since_is_not_used(run: RunFolder) -> None:
    file = run.checkpoint(2) / "parameters.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"damaged checkpoint: parameters\.safetensors changed"):
        load_run(run.path, step=2)
    assert load_run(run.path, step=1).method is not None


def test_the_commands_take_a_step(cli: Cli, run: RunFolder, chats: Path, tmp_path: Path) -> None:
    losses = [
        json.loads(cli("eval", "--run", run.path, "--data", chats, "--step", step, "--json").stdout)["loss"]
        for step in ("1", "last")
    ]
    assert abs(losses[0] - losses[1]) > 0.01
    assert cli("generate", "--run", run.path, "--step", "1", "--prompt", "the", "--max-tokens", "2").exit_code == 0
    assert cli("chat", "--run", run.path, "--step", "last", "--max-tokens", "2", input="the\n").exit_code == 0
    result = cli("export", "--run", run.path, "--step", "2", "--to", tmp_path / "to")
    assert result.exit_code == 0
    assert "what the run had trained by step 2" in result.stderr


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--run", "RUN", "--base", "--step", "1"], "--step is of what was trained, which --base leaves out"),
        (["--model", "tiny", "--step", "1"], "--step goes with --run"),
    ],
)
def test_a_step_that_would_be_ignored_is_refused(cli: Cli, run: RunFolder, options: list[str], what: str) -> None:
    given = [run.path if option == "RUN" else option for option in options]
    result = cli("generate", *given, "--prompt", "the")
    assert result.exit_code == USAGE
    assert what in result.stderr


def test_a_trl_export_has_no_step(cli: Cli, run: RunFolder, tmp_path: Path) -> None:
    result = cli("export", "--run", run.path, "--format", "trl", "--step", "1", "--to", tmp_path / "to")
    assert result.exit_code == USAGE
    assert "--step goes with --format merged" in result.stderr


def test_the_base_needs_no_finished_run(run: RunFolder) -> None:
    assert load_run(run.path, base=True).method is None


class Ends(Callback):
    """Ends a run as `--for` and `--early-stop` do."""

    name = "ends"

    def on_step(self, run: Any, record: dict[str, Any]) -> None:
        run.stop("it is enough")


def test_a_run_that_a_callback_ended_has_finished(settings: dict[str, Any]) -> None:
    result = train(TrainConfig(**settings), callbacks=[Ends()])
    assert result.steps == 1
    assert load_run(result.run_dir).method is not None


def test_a_finished_run_that_is_given_more_has_not_finished_until_it_has(settings: dict[str, Any]) -> None:
    run = RunFolder(train(TrainConfig(**settings, save_every=1)).run_dir)
    finished = logits(run)
    with pytest.raises(UserError, match="stopped by SIGINT"):
        train(TrainConfig(resume=str(run.path), epochs=20, quiet=True), callbacks=[StopsAfter(8)])
    with pytest.raises(UserError, match=r"this run has not finished: step \d+ of 60"):
        load_run(run.path)
    assert np.abs(logits(run, step="last") - finished).max() > 0
    train(TrainConfig(resume=str(run.path), quiet=True))
    assert load_run(run.path).method is not None


def test_a_run_of_before_its_steps_were_noted_still_says_where_it_stands(run: RunFolder) -> None:
    began = json.loads(run.environment.read_text())
    del began["total_steps"]
    run.environment.write_text(json.dumps(began))
    with pytest.raises(UserError, match=r"has not finished: step \d+ is its newest"):
        load_run(run.path)


def test_the_adapter_inside_of_such_a_run_is_refused_as_the_run_is(
    run: RunFolder, settings: dict[str, Any], cli: Cli, tmp_path: Path
) -> None:
    train(TrainConfig(**settings | {"out": str(tmp_path / "whole"), "max_steps": 2}))
    whole = tmp_path / "whole"
    assert run.adapter.is_dir()
    with pytest.raises(UserError, match=r"has not finished: step \d+ of \d+ is its newest checkpoint") as caught:
        load_adapter(run.adapter)
    assert f"give --run {run.path} in its place, with --step best, last, or" in caught.value.hint
    result = cli("generate", "--adapter", run.adapter, "--prompt", "the cat")
    assert (result.exit_code, "has not finished" in result.stderr) == (1, True)
    chat = cli("chat", "--adapter", whole / "adapter", "--max-tokens", 1, input=f"/adapter {run.adapter}\n\n")
    assert "has not finished" in chat.stdout
    with pytest.raises(UserError, match="has not finished"):
        merge_adapters([str(run.adapter), str(whole)], tmp_path / "both")
    with pytest.raises(UserError, match="has not finished") as refused:
        train(TrainConfig(**settings | {"out": str(tmp_path / "next"), "init_adapter": str(run.adapter)}))
    assert "start from `mlx-sft export --format peft --step` best, last, or" in refused.value.hint
    elsewhere = shutil.copytree(run.adapter, tmp_path / "elsewhere" / "adapter")
    assert load_adapter(elsewhere).method is not None
    assert load_adapter(whole / "adapter").method is not None
