"""A run folder is made, opened and locked as a whole, or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_sft import writing
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import user_path
from mlx_sft.run_folder import RunFolder
from tests.disks import a_full_disk

pytestmark = pytest.mark.fast


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def left_by_a_dead_process(name: str) -> str:
    return f".writing-{writing._THIS_MACHINE}-{2**22 + 1}-0123456789abcdef-{name}"


def test_a_run_is_made_in_a_folder_that_is_new_or_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "not/yet/there"):
        assert RunFolder.create(tmp_path / name).path == tmp_path / name
        assert (tmp_path / name).is_dir()


def test_looking_at_a_new_run_makes_nothing(tmp_path: Path) -> None:
    RunFolder.new(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_is_refused_and_a_run_in_it_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="already holds something") as caught:
        RunFolder.create(tmp_path)
    assert "--resume" not in caught.value.hint
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match=f"--resume {tmp_path}"):
        RunFolder.create(tmp_path)
    with pytest.raises(UserError, match="already holds something"):
        RunFolder.create(tmp_path / "mine")
    assert names(tmp_path) == ["config.yaml", "mine"]


def test_the_head_of_a_run_that_never_began_is_taken_over(tmp_path: Path) -> None:
    for name in ("data_report.json", left_by_a_dead_process("environment.json")):
        (tmp_path / name).write_text("{")
    run = RunFolder.create(tmp_path)
    run.write_head(config="c", data_report="d", environment="e")
    assert names(tmp_path) == ["config.yaml", "data_report.json", "environment.json"]
    assert [file.read_text() for file in (run.config, run.data_report, run.environment)] == ["c", "d", "e"]


def test_a_run_whose_head_cannot_be_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder.create(tmp_path / "run")
    with a_full_disk(monkeypatch), pytest.raises(UserError, match="the disk is full"):
        run.write_head(config="", data_report="", environment="")
    assert names(tmp_path) == []


def test_only_a_run_folder_opens(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder.open(tmp_path)
    RunFolder.create(tmp_path).write_head("", "", "")
    assert RunFolder.open(tmp_path).path == tmp_path


def test_checkpoints_are_listed_in_the_order_of_their_steps_and_only_whole_ones(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.checkpoint_steps() == []
    for step in (100_000_000, 9, 50):
        run.checkpoint(step).mkdir(parents=True)
    (run.checkpoints / ".writing-step-00000060").mkdir()
    (run.checkpoints / "step-00000070").touch()
    assert run.checkpoint_steps() == [9, 50, 100_000_000]
    assert run.checkpoint(50).name == "step-00000050"


def test_a_run_gets_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = []
    for _ in range(3):
        paths.append(RunFolder.default_path("Qwen/Qwen3-0.6B"))
        paths[-1].mkdir(parents=True)
    assert len(set(paths)) == 3
    assert all(path.parent == Path("runs") and path.name.startswith("qwen3-0.6b-") for path in paths)


def test_a_home_is_put_in_full_and_a_path_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/runs") == tmp_path / "runs"
    assert RunFolder("~/runs/x").path == tmp_path / "runs" / "x"
    assert user_path("~no-such-user/runs") == Path("~no-such-user/runs")
    with pytest.raises(UserError, match="cannot be read") as caught:
        user_path("x" * 5000)
    assert caught.value.exit_code == USAGE


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_written_is_named(
    tmp_path: Path, settings: dict[str, Any], cli: Callable[..., Any]
) -> None:
    tmp_path.chmod(0o500)
    result = cli("train", "--data", settings["data"], "--model", settings["model"], "--out", tmp_path / "x")
    tmp_path.chmod(0o700)
    assert result.exit_code == 1
    assert "no permission to write here" in result.stderr


def test_a_run_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    before = list(run.path.iterdir())
    with run.locked():
        with (
            pytest.raises(UserError, match="another process is training this run") as caught,
            RunFolder(run.path).locked(),
        ):
            pass
        assert caught.value.where == str(run.path)
    with RunFolder(run.path).locked():
        assert list(run.path.iterdir()) == before


def test_who_looks_whether_a_run_trains_keeps_nobody_from_training_it(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    looks = os.open(run.path, os.O_RDONLY)
    fcntl.flock(looks, fcntl.LOCK_SH)
    threading.Timer(0.02, os.close, [looks]).start()
    with run.locked():
        assert run.is_training
    assert not run.is_training


def test_what_a_killed_process_was_writing_goes_when_the_run_is_locked_and_an_export_in_it_stays(
    tmp_path: Path,
) -> None:
    run = RunFolder.create(tmp_path / "run")
    mine = writing._prefix()  # of a process that is alive: the lock says that no one writes there
    for folder in ("adapter", f"{mine}export"):
        (run.path / folder).mkdir()
    for file in (f"{mine}config.yaml", f"adapter/{mine}a.safetensors", f"{mine}export/{mine}config.json"):
        (run.path / file).touch()
    (run.checkpoints / f"{mine}step-00000002").mkdir(parents=True)
    with run.locked():
        assert names(run.path) == sorted([f"{mine}export", "adapter", "checkpoints"])
        assert names(run.adapter) == names(run.checkpoints) == []
        assert names(run.path / f"{mine}export") == [f"{mine}config.json"]


@pytest.mark.parametrize("target", ["there", "nowhere"])
def test_a_link_is_no_place_for_a_new_run(tmp_path: Path, target: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "run").symlink_to(target)
    with pytest.raises(UserError, match=r"a symbolic link"):
        RunFolder.create(tmp_path / "run")
    assert names(tmp_path) == ["run", "there"]


def test_a_locked_run_is_found_where_it_was_renamed_whatever_has_its_place_now(tmp_path: Path) -> None:
    run, told = RunFolder.create(tmp_path / "run"), list[str]()
    with run.locked(told.append):
        (tmp_path / "run").rename(tmp_path / "other")
        (tmp_path / "run").mkdir()
        for _ in range(2):
            assert run.config == tmp_path / "other" / "config.yaml"
        (tmp_path / "other").rmdir()
        with pytest.raises(UserError, match=r"was removed") as caught:
            run.checkpoint_steps()
        assert caught.value.where == str(tmp_path / "other")
    assert told == [f"the run folder {tmp_path / 'run'} is now {tmp_path / 'other'}, where the run goes on"]


def test_a_head_that_can_be_neither_written_nor_removed_ends_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder.create(tmp_path / "run")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match="no permission to write here"):
        run.write_head("a: 1\n", "{}", "{}")
