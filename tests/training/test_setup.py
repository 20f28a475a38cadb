from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import TrainConfig, UserError, train
from mlx_sft.console import Console
from mlx_sft.data.batches import Layout, MicroBatch, collate
from mlx_sft.errors import USAGE
from mlx_sft.run_folder import RunFolder
from mlx_sft.training.resume import resumed_config
from mlx_sft.training.setup import Given, prepare_job
from mlx_sft.training.shapes import compiled_shape, compiled_shapes
from tests.conftest import settings_of_run
from tests.run_folders import outcome


def resume(settings: dict[str, Any], **further: Any) -> int:
    return train(TrainConfig(resume=settings["out"], quiet=True, **further)).steps


def refusal(settings: dict[str, Any], **further: Any) -> UserError:
    """Why the run cannot be resumed; nothing of it may change."""
    run = Path(settings["out"])
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        resume(settings, **further)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert caught.value.hint
    return caught.value


@pytest.fixture(scope="module")
def left(chats: Path, make_base: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The settings of a run on data and a model of its own, as it was left after step 4 of 6; there is a copy of it all under `.kept`."""
    folder = tmp_path_factory.mktemp("left") / "it"
    folder.mkdir()
    data, model = folder / "chats.jsonl", folder / "base"
    shutil.copy(chats, data)
    shutil.copytree(make_base("qwen3", tied=True), model)
    settings = settings_of_run(data, model, folder / "run") | {"save_every": 2}
    train(TrainConfig(**settings))
    shutil.rmtree(RunFolder(settings["out"]).checkpoint(6))
    shutil.copytree(folder, folder.with_suffix(".kept"))
    return settings


@pytest.fixture
def cut_short(left: dict[str, Any]) -> dict[str, Any]:
    """The same, in the same place, whatever a test before made of it."""
    folder = Path(left["out"]).parent
    shutil.rmtree(folder)
    shutil.copytree(folder.with_suffix(".kept"), folder)
    return dict(left)


def test_a_run_goes_on_where_it_was(cut_short: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    train(TrainConfig(resume=cut_short["out"]))
    assert "resuming after step 4" in capsys.readouterr().err


def test_an_edited_row_is_refused_by_its_file(cut_short: dict[str, Any]) -> None:
    data = Path(cut_short["data"])
    data.write_text(data.read_text().replace("cat", "dog", 1))
    error = refusal(cut_short)
    assert "the data changed since the run began" in error.what
    assert str(data) in error.what


@pytest.mark.parametrize("edit", [lambda rows: rows[1:], lambda rows: rows[::-1], lambda rows: [*rows, rows[0]]])
def test_other_rows_are_refused(cut_short: dict[str, Any], edit: Callable[[list[str]], list[str]]) -> None:
    data = Path(cut_short["data"])
    data.write_text("".join(edit(data.read_text().splitlines(keepends=True))))
    assert "the data changed" in refusal(cut_short).what


def test_rows_written_otherwise_are_the_same_data(cut_short: dict[str, Any]) -> None:
    data = Path(cut_short["data"])
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("\n\n".join(json.dumps(row, separators=(",", ":")) for row in rows))
    assert resume(cut_short) == 6


def test_data_that_is_gone_is_named(cut_short: dict[str, Any]) -> None:
    Path(cut_short["data"]).unlink()
    assert refusal(cut_short).where == cut_short["data"]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("lr", "0.01", "0.02"), ("rank", "2", "4"), ("seed", "0", "1"), ("epochs", "2", "1"), ("save_every", "2", "3")],
)
def test_an_edited_setting_is_refused_by_name(cut_short: dict[str, Any], name: str, before: str, after: str) -> None:
    config = RunFolder(cut_short["out"]).config
    text, found = re.subn(rf"^{name}: {before}$", f"{name}: {after}", config.read_text(), flags=re.MULTILINE)
    assert found == 1
    config.write_text(text)
    error = refusal(cut_short)
    assert error.what == f"{name} changed since the run began"
    assert error.where == str(config)


def test_another_model_in_the_same_place_is_refused(cut_short: dict[str, Any]) -> None:
    weights = Path(cut_short["model"]) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    error = refusal(cut_short)
    assert error.what == f"the model {cut_short['model']} changed since the run began"


@pytest.mark.parametrize(
    ("changes", "option"),
    [
        ({"lr": 1.0}, "--lr"),
        ({"rank": 16}, "--rank"),
        ({"method": "full"}, "--method"),
        ({"data": ["a", "b"]}, "--data"),
    ],
)
def test_another_setting_given_with_resume_is_refused(
    cut_short: dict[str, Any], changes: dict[str, Any], option: str
) -> None:
    error = refusal(cut_short, **changes)
    assert error.what.startswith(f"{option} ")
    assert "differs from the run's" in error.what
    assert error.exit_code == USAGE


def test_another_folder_given_with_resume_is_refused(cut_short: dict[str, Any], tmp_path: Path) -> None:
    assert "--out" in refusal(cut_short, out=str(tmp_path / "elsewhere")).what
    assert resume(cut_short, out=cut_short["out"]) == 6


def test_settings_given_again_are_accepted(cut_short: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(cut_short["data"]).parent)
    again = {name: cut_short[name] for name in ("lr", "rank", "model")} | {"data": "chats.jsonl", "dtype": "auto"}
    assert resume(cut_short, **again) == 6


def test_how_the_data_is_read_may_change(cut_short: dict[str, Any]) -> None:
    run = RunFolder(cut_short["out"])
    config = resumed_config(TrainConfig(resume=cut_short["out"], data_workers=2, data_cache=False), run)
    assert (config.data_workers, config.data_cache) == (2, False)
    assert resumed_config(TrainConfig(resume=cut_short["out"]), run).data_cache
    assert resume(cut_short, data_cache=False) == 6


def test_how_many_checkpoints_are_kept_may_change(cut_short: dict[str, Any]) -> None:
    assert RunFolder(cut_short["out"]).checkpoint_steps() == [2, 4]
    assert resume(cut_short, keep=1) == 6
    assert RunFolder(cut_short["out"]).checkpoint_steps() == [6]


def test_a_run_that_was_moved_goes_on(
    cut_short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(cut_short["out"], tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert resume({"out": "moved"}) == 6


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_run_without_its_record_is_refused(cut_short: dict[str, Any], content: str | None) -> None:
    record = RunFolder(cut_short["out"]).environment
    record.unlink() if content is None else record.write_text(content)
    error = refusal(cut_short)
    assert "environment.json" in error.where


def test_what_lies_on_disk_is_recorded_by_its_full_path_and_what_was_auto_as_it_was(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(settings["data"])
    monkeypatch.chdir(data.parent)
    train(TrainConfig(**settings | {"data": data.name, "max_steps": 1}))
    config = TrainConfig.resolve(RunFolder(settings["out"]).config)
    assert config.data == [str(data)]
    assert config.out is None
    assert config.dtype in ("float32", "bfloat16")
    assert config.grad_checkpoint in ("on", "off")
    assert config.micro_batch_tokens is not None


def test_the_environment_says_what_the_result_depends_on(settings: dict[str, Any]) -> None:
    train(TrainConfig(**settings | {"max_steps": 1}))
    environment = json.loads(RunFolder(settings["out"]).environment.read_text())
    assert set(environment) == {
        "packages",
        "python",
        "platform",
        "device",
        "identity",
        "settings",
        "total_steps",
        "memory",
        "measured",
    }
    assert {"mlx", "mlx-lm", "mlx-sft", "transformers"} <= set(environment["packages"])
    assert set(environment["identity"]) == {"config", "data", "model"}


def test_validation_rows_that_are_learnt_too_are_warned_of(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    train(TrainConfig(**settings | {"valid": settings["data"]}))
    assert "warning: 10 validation rows are also training rows, on which" in capsys.readouterr().err


def test_a_run_that_learns_nothing_for_its_warm_up_is_warned_of(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    train(TrainConfig(**settings | {"max_steps": 1}))
    assert "the warm-up takes the whole run" in capsys.readouterr().err
    train(TrainConfig(**settings | {"max_steps": 1, "warmup": 0.0, "out": settings["out"] + "-2"}))
    assert "warm-up" not in capsys.readouterr().err


def test_another_version_since_the_run_began_is_warned_of(
    cut_short: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    environment = Path(cut_short["out"]) / "environment.json"
    content = json.loads(environment.read_text())
    content["packages"]["mlx"] = "0.1"
    environment.write_text(json.dumps(content))
    resume(cut_short)
    assert "since the run began, mlx 0.1 → " in capsys.readouterr().err


def test_two_runs_without_a_name_get_folders_of_their_own(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings |= {"out": None, "max_steps": 1}
    folders = {train(TrainConfig(**settings)).run_dir for _ in range(2)}
    assert len(folders) == 2
    assert all(folder.parent == Path("runs") and (folder / "adapter").is_dir() for folder in folders)


def test_rows_beyond_the_length_that_is_exact_are_refused(
    settings: dict[str, Any], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    short = make_base("llama", rope_parameters=rope, max_position_embeddings=4)
    settings |= {"model": str(short)}
    with pytest.raises(UserError, match="exactly for no more than 4") as caught:
        train(TrainConfig(**settings))
    assert caught.value.hint == "give --max-length 4"
    assert not Path(settings["out"]).exists()


@pytest.mark.parametrize("target", ["all-linear", "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"])
def test_the_modules_of_an_initial_adapter_may_be_named_in_any_way(
    settings: dict[str, Any], tmp_path: Path, target: str
) -> None:
    first = train(TrainConfig(**settings)).run_dir
    again = settings | {"init_adapter": str(first / "adapter"), "out": str(tmp_path / "again")}
    assert train(TrainConfig(**again | {"target": target})).steps == 6
    with pytest.raises(UserError, match="--target attention differs from the adapter's"):
        train(TrainConfig(**again | {"target": "attention", "out": str(tmp_path / "other")}))


def test_a_run_needs_its_initial_adapter_only_to_begin(settings: dict[str, Any], tmp_path: Path) -> None:
    first = train(TrainConfig(**settings)).run_dir
    adapter = shutil.copytree(first / "adapter", tmp_path / "start")
    settings |= {"init_adapter": str(adapter), "save_every": 2, "keep": 9}
    whole = train(TrainConfig(**settings | {"out": str(tmp_path / "whole")})).run_dir
    cut = RunFolder(train(TrainConfig(**settings | {"out": str(tmp_path / "cut")})).run_dir)
    assert cut.checkpoint_steps() == [0, 2, 4, 6]
    for step in (2, 4, 6):
        shutil.rmtree(cut.checkpoint(step))
    shutil.rmtree(adapter)
    train(TrainConfig(resume=str(cut.path), quiet=True))
    result = Path("adapter") / "adapter_model.safetensors"
    assert (cut.path / result).read_bytes() == (whole / result).read_bytes()
    assert (cut.path / result).read_bytes() != (first / result).read_bytes()


def test_a_run_killed_before_its_first_checkpoint_keeps_its_initial_adapter_when_it_goes_on(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    adapter = train(TrainConfig(**settings)).run_dir / "adapter"
    settings |= {"init_adapter": str(adapter), "keep": 9, "out": str(tmp_path / "again")}
    run = RunFolder(train(TrainConfig(**settings)).run_dir)
    written = run.checkpoint_steps()
    shutil.rmtree(run.checkpoints)
    train(TrainConfig(resume=str(run.path), quiet=True))
    assert run.checkpoint_steps() == written
    assert written[0] == 0


def test_a_run_that_is_given_more_epochs_is_the_longer_run(settings: dict[str, Any], tmp_path: Path) -> None:
    """With a rate that does not depend on the length, to the byte, wherever it is killed in between."""
    settings |= {"scheduler": "constant", "warmup": 0, "save_every": 2, "keep": 9, "dropout": 0.1}
    train(TrainConfig(**settings | {"epochs": 4}))
    expected = outcome(Path(settings["out"]))
    shutil.rmtree(settings["out"])
    train(TrainConfig(**settings))
    run = RunFolder(settings["out"])
    assert resume(settings, epochs=4) == 12
    assert outcome(run.path) == expected
    for step in (12, 10, 8):
        shutil.rmtree(run.checkpoint(step))
    assert resume(settings) == 12
    assert outcome(run.path) == expected


def test_more_steps_go_on_with_the_rate_of_the_longer_run(settings: dict[str, Any]) -> None:
    train(TrainConfig(**settings | {"max_steps": 4, "warmup": 0, "scheduler": "linear"}))
    assert resume(settings, max_steps=8) == 8
    rates = [json.loads(line)["learning_rate"] for line in RunFolder(settings["out"]).metrics.read_text().splitlines()]
    assert rates == pytest.approx([1e-2 * left for left in (1, 3 / 4, 2 / 4, 1 / 4, 4 / 8, 3 / 8, 2 / 8, 1 / 8)])


@pytest.mark.parametrize("news", [{"epochs": 1}, {"max_steps": 9}])
def test_fewer_epochs_or_steps_instead_are_refused(cut_short: dict[str, Any], news: dict[str, Any]) -> None:
    error = refusal(cut_short, **news)
    assert "differs from the run's" in error.what
    assert "not fewer" in error.hint


def test_a_run_that_stopped_early_goes_on_where_it_is_given_more(settings: dict[str, Any]) -> None:
    settings |= {"valid_fraction": 0.2, "eval_every": 1, "lr": 0, "early_stop": 2}
    assert train(TrainConfig(**settings)).steps == 3
    assert resume(settings) == 3
    assert resume(settings, epochs=9) == 5
    assert resume(settings) == 5


def test_news_that_a_crash_left_half_written_are_taken_up(cut_short: dict[str, Any]) -> None:
    run = RunFolder(cut_short["out"])
    before = run.environment.read_bytes()
    resume(cut_short, epochs=3)
    run.environment.write_bytes(before)
    assert resume(cut_short) == 9
    assert json.loads(run.environment.read_text())["settings"]["epochs"] == 3


def test_a_link_out_of_the_run_folder_is_not_written_through(cut_short: dict[str, Any], tmp_path: Path) -> None:
    run = RunFolder(cut_short["out"])
    outside = tmp_path / "outside"
    shutil.move(run.metrics, outside)
    run.metrics.symlink_to(outside)
    content = outside.read_bytes()
    error = refusal(cut_short)
    assert "a symbolic link out of the run folder" in error.what
    assert error.where == str(run.metrics)
    assert outside.read_bytes() == content


def test_a_setting_of_none_is_not_given(settings: dict[str, Any]) -> None:
    train(TrainConfig(**settings | {"max_steps": 2}))
    assert resume(settings, max_steps=None) == 2


def test_more_epochs_that_the_disk_has_no_room_for_change_nothing(
    cut_short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 0))
    assert "of disk" in refusal(cut_short, epochs=9).what


def test_on_a_gpu_the_commonest_shapes_of_the_plan_are_compiled(settings: dict[str, Any]) -> None:
    job = prepare_job(TrainConfig(**settings | {"epochs": 1, "batch_size": 1}), Console(quiet=True))
    arguments = (job.plan, job.data.train, job.settings.micro_batch_tokens)
    assert compiled_shapes(*arguments, job.settings.layout) == []
    lengths = job.data.train.needed_lengths
    layout = Layout.of_few_shapes(lengths)
    found = compiled_shapes(*arguments, layout)
    batches = [
        collate(job.data.train, MicroBatch(step.rows, layout.width_of(int(lengths[step.rows[0]]))))
        for step in job.plan.steps()
    ]
    taken = Counter(shape for batch in batches if (shape := compiled_shape(batch, found)))
    assert set(found) == taken.keys()
    assert min(taken.values()) > 2


def test_what_auto_makes_of_epochs_and_of_the_held_out_share_is_kept_with_the_run(settings: dict[str, Any]) -> None:
    rows = [{"prompt": f"the cat {number}", "completion": "the mat"} for number in range(110)]
    del settings["data"]
    job = prepare_job(TrainConfig(**settings | {"epochs": "auto"}), Console(quiet=True), given=Given(data=rows))
    assert (len(job.data.train), len(job.data.valid), job.config.epochs) == (100, 10, 3)
    saved = TrainConfig.resolve(job.run.config)
    assert (saved.epochs, saved.valid_fraction) == (3, 10 / 110)
    few = settings | {"epochs": "auto", "out": settings["out"] + "-few"}
    assert prepare_job(TrainConfig(**few), Console(quiet=True), given=Given(data=rows[:9])).config.epochs == 10
