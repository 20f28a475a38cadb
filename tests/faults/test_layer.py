"""Each call that changes a folder is seen, once, with its name, and can be made to fail or to be done in part."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path

import pytest

from mlx_sft.writing import write_file, write_folder
from tests.faults.injected import PowerCut, Refuse, error_names
from tests.faults.layer import Call, watched

pytestmark = pytest.mark.faults


class Seen:
    """Keeps the calls; `react` is asked before each."""

    def __init__(self, react: Callable[[Call], None] = lambda call: None) -> None:
        self.react = react
        self.calls: list[tuple[str, str]] = []
        self.made = 0

    def before(self, call: Call) -> None:
        self.calls.append((call.name, Path(call.path).name))
        self.react(call)

    def after(self, call: Call) -> None:
        self.made += 1


def test_a_file_that_is_written_whole_or_not_at_all_is_seen_call_by_call(tmp_path: Path) -> None:
    seen = Seen()
    with watched(tmp_path, seen):
        write_file(tmp_path / "x.json", "{}")
    temporary = seen.calls[0][1]
    own = [
        *((name, temporary) for name in ("open", "write", "read", "fsync", "rename")),
        ("read", tmp_path.name),
        ("fsync", tmp_path.name),
    ]
    assert seen.calls == own
    assert temporary.startswith(".writing-")
    assert (tmp_path / "x.json").read_text() == "{}"
    with watched(tmp_path, Seen()), pytest.raises(FileNotFoundError):
        (tmp_path / "none").read_text()


def test_folders_links_and_cuts_are_seen(tmp_path: Path) -> None:
    seen = Seen()
    with watched(tmp_path, seen):
        with write_folder(tmp_path / "folder") as temporary:
            (temporary / "a").write_bytes(b"12345")
            shutil.copyfile(temporary / "a", temporary / "b")
        with FileIO(tmp_path / "folder" / "a", "a") as file:
            file.truncate(2)
        os.truncate(tmp_path / "folder" / "b", 1)
        shutil.rmtree(tmp_path / "folder")
    name, temporary = seen.calls[0]
    assert name == "mkdir"
    assert temporary.startswith(".writing-")
    for call in (("write", "b"), ("truncate", "b"), ("unlink", "a"), ("rmdir", "folder")):
        assert call in seen.calls, call
    assert len(seen.calls) == seen.made
    assert not (tmp_path / "folder").exists()


def test_what_lies_elsewhere_is_not_seen_and_nothing_is_seen_afterwards(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    seen = Seen()
    with watched(tmp_path / "here", seen):
        (tmp_path / "there").write_text("x")
        (tmp_path / "hereafter").mkdir()
    (tmp_path / "here" / "x").write_text("x")
    assert seen.calls == []
    assert FileIO.__name__ == "FileIO"


def test_a_write_can_be_done_in_part(tmp_path: Path) -> None:
    def half(call: Call) -> None:
        if call.name == "write":
            call.write_part(0.5)
            raise OSError(errno.ENOSPC, "full")

    with watched(tmp_path, Seen(half)), suppress(OSError), (tmp_path / "x").open("wb", buffering=0) as file:
        file.write(b"123456")
    assert (tmp_path / "x").read_bytes() == b"123"


@pytest.mark.parametrize(("lasting", "written"), [(False, ["a", "c"]), (True, ["a"])])
def test_a_refused_call_is_refused_once_or_from_then_on(tmp_path: Path, lasting: bool, written: list[str]) -> None:
    fault = Refuse(3, errno.ENOSPC, frozenset({"open", "write"}), lasting=lasting)
    watch = fault.watch()
    with watched(tmp_path, watch):
        for name in "abc":
            with suppress(OSError):
                (tmp_path / name).write_text(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    assert "unlink" not in error_names(errno.ENOSPC)


def cut(folder: Path, do: Callable[[], None], *, undone: int) -> None:
    """What a power cut after `do` leaves."""

    class Ended(BaseException):
        pass

    def end() -> None:
        raise Ended

    watch = PowerCut(0, undone).watch(folder, end)
    with watched(folder, watch):
        do()
        with suppress(Ended):
            watch.lose()


def test_a_power_cut_takes_what_was_not_synced(tmp_path: Path) -> None:
    def write() -> None:
        (tmp_path / "a").write_text("not synced")
        write_file(tmp_path / "b", "synced")
        (tmp_path / "c").write_text("not synced either")
        (tmp_path / "b").rename(tmp_path / "d")

    cut(tmp_path, write, undone=2)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "", "b": "synced"}


def test_a_power_cut_gives_back_what_was_replaced_or_removed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").write_text("old")
    shutil.copyfile(tmp_path / "a", tmp_path / "new")

    def change() -> None:
        (tmp_path / "new").replace(tmp_path / "a")
        (tmp_path / "b").unlink()

    cut(tmp_path, change, undone=2)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith(".lost")) == ["a", "b", "new"]
    assert (tmp_path / "b").read_text() == "old"
