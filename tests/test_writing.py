"""What is written is complete or absent, and where it is meant to be: through no link, and into no file that has another name too."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_sft import writing
from mlx_sft.errors import UserError
from mlx_sft.writing import (
    copy_file,
    free_folder,
    make_folder,
    new_file,
    open_to_append,
    path_of,
    private_folder,
    remove,
    write_file,
    write_file_with,
    write_folder,
)
from tests.disks import a_full_disk

pytestmark = pytest.mark.fast

NO_PROCESS = 2**22 + 1


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_as_text_and_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
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
    for left in (f".writing-{writing._THIS_MACHINE}-{NO_PROCESS}-0123456789abcdef-folder", ".replaced-folder"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "torn").touch()
    for content in ("first", "second"):
        with write_folder(tmp_path / "folder") as temporary:
            (temporary / "file").write_text(content)
    assert (tmp_path / "folder" / "file").read_text() == "second"
    assert names(tmp_path) == ["folder"]
    assert names(tmp_path / "folder") == ["file"]


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


def test_a_folder_is_never_missing_while_it_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    is_there: set[bool] = set()
    seen = threading.Event()

    def watch() -> None:
        while not seen.is_set():
            is_there.add(folder.exists())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(200):
            with write_folder(folder) as temporary:
                (temporary / "file").write_text("new")
    finally:
        seen.set()
        watcher.join()
    assert is_there == {True}
    assert names(folder) == ["file"]


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("old")
    monkeypatch.setattr(writing, "exchange", lambda one, other: False)  # as on a memory stick
    rename = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if path.name.startswith(".writing-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError), write_folder(folder) as temporary:
        (temporary / "file").write_text("new")
    assert (folder / "file").read_text() == "old"
    assert names(tmp_path) == ["folder"]


# --- links, and other names of a file ------------------------------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file outside of the folder that is written in."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "here").mkdir()
    return tmp_path / "mine"


@pytest.mark.parametrize("plant", [os.symlink, os.link])
def test_a_file_takes_the_place_of_a_link_and_what_that_leads_to_stays(
    mine: Path, tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    plant(mine, tmp_path / "here" / "page.html")
    write_file(tmp_path / "here" / "page.html", "new")
    assert mine.read_text() == "mine"
    assert (tmp_path / "here" / "page.html").read_text() == "new"
    assert not (tmp_path / "here" / "page.html").is_symlink()


def test_no_file_takes_the_place_of_a_pipe_or_a_device(tmp_path: Path) -> None:
    """Whoever is root would have no /dev/null any more."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"not a plain file"):
        write_file(tmp_path / "pipe", "new")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert names(tmp_path) == ["pipe"]


@pytest.mark.parametrize("name", ["loop", "loop/x", "~no-such-user/x"])
def test_a_folder_that_cannot_be_is_refused_or_taken_by_its_letters(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    if name.startswith("~"):
        assert free_folder(name) == tmp_path.resolve() / name
        return
    with pytest.raises(UserError, match=r"Too many levels of symbolic links"):
        free_folder(name)


def test_a_link_that_leads_nowhere_makes_no_file(tmp_path: Path) -> None:
    (tmp_path / "page.html").symlink_to(tmp_path / "nowhere")
    write_file(tmp_path / "page.html", "new")
    assert names(tmp_path) == ["page.html"]


def test_the_name_before_a_file_is_done_is_another_each_time_and_no_link_is_followed_there(
    mine: Path, tmp_path: Path
) -> None:
    here, seen = tmp_path / "here", set()

    def write(temporary: Path) -> None:
        seen.add(temporary.name)
        temporary.symlink_to(mine)  # as one who had guessed it would
        with new_file(temporary) as file:
            file.write(b"new")

    for _ in range(3):
        with pytest.raises(UserError, match=r"File exists"):
            write_file_with(here / "page.html", write)
    assert len(seen) == 3
    assert mine.read_text() == "mine"
    assert names(here) == []


@pytest.mark.parametrize("way", [free_folder, make_folder, lambda path: write_folder(path).__enter__()])
def test_a_link_in_the_place_of_a_folder_is_refused(tmp_path: Path, way: Callable[[Path], object]) -> None:
    (tmp_path / "mine").mkdir()
    for target in ("mine", "nowhere"):
        (tmp_path / "link").symlink_to(target)
        with pytest.raises(UserError, match=r"a symbolic link") as caught:
            way(tmp_path / "link")
        assert caught.value.where == str(tmp_path / "link")
        (tmp_path / "link").unlink()
    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == []


@pytest.mark.parametrize("exchanges", [True, False])
def test_links_where_a_folder_is_replaced_are_removed_and_not_followed(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: bool
) -> None:
    if not exchanges:
        monkeypatch.setattr(writing, "exchange", lambda one, other: False)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    here = tmp_path / "here"
    for target in (tmp_path / "theirs", mine, tmp_path / "nowhere"):
        (here / ".replaced-folder").symlink_to(target)
        for content in ("first", "second"):
            with write_folder(here / "folder") as temporary, new_file(temporary / "file") as file:
                file.write(content.encode())
        assert names(here) == ["folder"]
        remove(here / "folder")
        (here / ".replaced-folder").symlink_to(target)
        with pytest.raises(UserError), write_folder(here / "folder"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        assert names(here) == []
    assert names(tmp_path / "theirs") == ["file"]
    assert mine.read_text() == "mine"


def test_a_file_that_is_written_on_is_a_plain_one_of_its_own(mine: Path, tmp_path: Path) -> None:
    path = tmp_path / "here" / "metrics.jsonl"
    with open_to_append(path) as file:
        file.write(b"one\n")
    os.link(path, tmp_path / "backup")
    with open_to_append(path) as file:
        assert file.read() == b"one\n" if file.seek(0) == 0 else False
        file.write(b"two\n")
    assert path.read_text() == "one\ntwo\n"
    assert (tmp_path / "backup").read_text() == "one\n"
    path.unlink()
    path.symlink_to(mine)
    with pytest.raises(UserError, match=r"a symbolic link"):
        open_to_append(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"not a plain file"):
        open_to_append(path)
    assert mine.read_text() == "mine"


def test_what_is_written_may_be_read_as_the_umask_says_and_a_private_folder_by_no_one_else(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", "x")
        copy_file(tmp_path / "file", tmp_path / "copy")
        with write_folder(tmp_path / "folder"):
            pass
        open_to_append(tmp_path / "appended").close()
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        with private_folder(tmp_path) as private:
            assert stat.S_IMODE(Path(private).stat().st_mode) == 0o700
    finally:
        os.umask(before)
    assert modes == {"file": 0o640, "copy": 0o640, "folder": 0o750, "appended": 0o640}
    assert "folder" in names(tmp_path)
    assert len(names(tmp_path)) == 4


# --- what killed processes leave -----------------------------------------------------------------------------------------------


def test_what_dead_processes_left_is_removed_and_what_others_are_writing_stays(mine: Path, tmp_path: Path) -> None:
    here, machine = tmp_path / "here", writing._THIS_MACHINE
    dead, alive, elsewhere, old = (
        here / f".writing-{where}-{process}-0123456789abcdef-page.html"
        for where, process in ((machine, NO_PROCESS), (machine, os.getpid()), ("0" * 8, 1), ("0" * 8, 2))
    )
    for path in (dead, alive, elsewhere, old, here / ".writing-of-theirs"):
        path.touch()
    month = time.time() - 31 * 24 * 3600
    os.utime(old, (month, month))
    (here / f".writing-{machine}-{NO_PROCESS}-link").symlink_to(mine)
    write_file(here / "page.html", "new")
    assert names(here) == sorted([alive.name, elsewhere.name, ".writing-of-theirs", "page.html"])
    assert mine.read_text() == "mine"


def test_an_open_folder_is_found_again_where_it_was_renamed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    descriptor = os.open(tmp_path / "a", os.O_RDONLY)
    try:
        (tmp_path / "a").rename(tmp_path / "b")
        assert path_of(descriptor).samefile(tmp_path / "b")
    finally:
        os.close(descriptor)
