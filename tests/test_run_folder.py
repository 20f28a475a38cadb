from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_sft.errors import USAGE, UserError
from mlx_sft.run_folder import RunFolder, disk_errors, user_path, write_file, write_file_with, write_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def a_full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        yield


def test_a_file_is_written_with_the_folders_above_it(tmp_path: Path) -> None:
    write_file(tmp_path / "a" / "b" / "text", "grüße\n")
    write_file(tmp_path / "a" / "b" / "bytes", b"\x00\xff")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "grüße\n".encode()
    assert (tmp_path / "a" / "b" / "bytes").read_bytes() == b"\x00\xff"
    assert names(tmp_path / "a" / "b") == ["bytes", "text"]


def test_what_is_needed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        a_full_disk(monkeypatch),
        pytest.raises(UserError) as caught,
        write_folder(tmp_path / "x", 12 * 10**8) as folder,
    ):
        (folder / "file").write_text("x")
    assert caught.value.hint.startswith("free 1.20 GB")


def test_a_file_whose_writing_fails_is_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "file", "old")
    with a_full_disk(monkeypatch), pytest.raises(UserError, match="the disk is full") as caught:
        write_file(tmp_path / "file", "new")
    assert caught.value.where == str(tmp_path / "file")
    assert "--resume" in caught.value.hint
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_writer_gets_a_name_with_the_files_suffix(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        assert path != tmp_path / "x.safetensors"
        assert path.suffix == ".safetensors"
        path.write_text("x")

    write_file_with(tmp_path / "x.safetensors", write)
    assert names(tmp_path) == ["x.safetensors"]


def test_a_folder_appears_whole_and_replaces_the_one_before(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with write_folder(tmp_path / "folder") as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / content).write_text(content)
            assert content not in names(tmp_path)
        assert names(tmp_path) == ["folder"]
        assert names(tmp_path / "folder" / "deep") == [content]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_whose_writing_fails_is_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    with write_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("old")

    def fail() -> None:
        with write_folder(tmp_path / "folder") as temporary:
            (temporary / "file").write_text("new")
            raise error

    with pytest.raises(error):
        fail()
    assert (tmp_path / "folder" / "file").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_what_a_killed_writer_left_is_no_obstacle(tmp_path: Path) -> None:
    for left in (".writing-folder", ".replaced-folder"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "torn").touch()
    for content in ("first", "second"):
        with write_folder(tmp_path / "folder") as temporary:
            (temporary / "file").write_text(content)
    assert (tmp_path / "folder" / "file").read_text() == "second"
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["file"]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EACCES, "no permission to write here"),
        (errno.EROFS, "no permission to write here"),
        (errno.EIO, "cannot write: Input/output error"),
    ],
)
def test_a_failed_write_says_where_and_what_to_do(number: int, message: str) -> None:
    with pytest.raises(UserError) as caught, disk_errors(Path("runs/x")):
        raise OSError(number, os.strerror(number))
    assert caught.value.what == message
    assert caught.value.where == "runs/x"
    assert caught.value.hint


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
    for name in ("data_report.json", ".writing-environment.json"):
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


def test_a_folder_that_a_killed_process_was_replacing_is_back_in_its_place(tmp_path: Path) -> None:
    (tmp_path / ".replaced-folder").mkdir()
    (tmp_path / ".replaced-folder" / "file").write_text("old")
    with pytest.raises(UserError), write_folder(tmp_path / "folder"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    assert (tmp_path / "folder" / "file").read_text() == "old"
    (tmp_path / ".replaced-folder").mkdir()
    with write_folder(tmp_path / "folder") as temporary:
        (temporary / "file").write_text("new")
    assert (tmp_path / "folder" / "file").read_text() == "new"
    assert names(tmp_path) == ["folder"]


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
