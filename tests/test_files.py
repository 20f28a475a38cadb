"""Files on the disk: what is within bounds is read, what is not is refused by its line, and what is written is complete or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from mlx_sft import files
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import (
    MOST_JSON_BYTES,
    MOST_YAML_BYTES,
    MOST_YAML_DEPTH,
    disk_errors,
    folder_bytes,
    free_bytes,
    read_front_matter,
    read_json,
    read_yaml,
    write_file,
    write_file_with,
    write_folder,
)
from tests.disks import a_full_disk

pytestmark = pytest.mark.fast

LAUGHS = "a: &a [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_plain_values_and_aliases_are_read(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("one: &one {a: 1, b: [x, null]}\ntwo: *one\nthree: {<<: *one, a: 2}\n")
    assert read_yaml(file) == {
        "one": {"a": 1, "b": ["x", None]},
        "two": {"a": 1, "b": ["x", None]},
        "three": {"a": 2, "b": ["x", None]},
    }


@pytest.mark.parametrize(
    ("content", "message", "line"),
    [
        pytest.param("lr: 1\nrank: 2\nlr: 3\n", "lr is given twice", 3, id="a name twice"),
        pytest.param("data:\n  a: 1\n  a: 2\n", "a is given twice", 3, id="a name twice, deeper"),
        pytest.param(LAUGHS, "more than 10,000 values, with every alias written out", 5, id="a billion laughs"),
        pytest.param("a: &a\n  - *a\n", "an alias inside of what it stands for", 2, id="an alias of itself"),
        pytest.param("[" * 30 + "]" * 30, f"nested deeper than {MOST_YAML_DEPTH} levels", 1, id="deep"),
        pytest.param("a:\n" + "- x\n" * 20_000, "more than 10,000 values", 9_999, id="many values"),
        pytest.param("a: !!python/object/apply:os.system [ls]\n", "could not determine a constructor", 1, id="code"),
    ],
)
def test_what_is_out_of_bounds_is_refused_at_its_line(tmp_path: Path, content: str, message: str, line: int) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(content)
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        read_yaml(file)
    assert time.monotonic() - started < 20
    assert message in caught.value.what
    assert caught.value.where == f"{file}:{line}"
    assert caught.value.exit_code == USAGE


def test_a_file_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    for name, most, read in (("c.yaml", MOST_YAML_BYTES, read_yaml), ("c.json", MOST_JSON_BYTES, read_json)):
        file = tmp_path / name
        with file.open("wb") as content:
            content.truncate(most + 1)
        with pytest.raises(UserError, match=f"more than {most // 2**20} MiB"):
            read(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[1]", "not a mapping"),
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "c.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_json(file, hint="a way out")
    assert caught.value.where == str(file)
    assert caught.value.hint == "a way out"


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, tmp_path / "a\0b"):
        for read in (read_json, read_yaml):
            with pytest.raises(UserError, match="cannot be read") as caught:
                read(path)
            assert caught.value.where == str(path)


def test_an_object_is_read_as_it_is(tmp_path: Path) -> None:
    value = {"ä": [1, 2.5, None, {"b": "\n"}]}
    (tmp_path / "c.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "c.json") == value


def test_a_larger_file_is_read_where_that_is_allowed(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"a": "x" * 100}))
    with pytest.raises(UserError, match="more than 0 MiB"):
        read_json(file, most=100)
    assert read_json(file, most=200) == {"a": "x" * 100}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("---\na: 1\nb: [x]\n---\n# Title\n", {"a": 1, "b": ["x"]}),
        ("---\r\na: 1\r\n---\r\n", {"a": 1}),
        ("---\na: 1\n---", {"a": 1}),
        ("---\na: b---c\n---\nx: 2\n---\n", {"a": "b---c"}),
        ("---\n\n---\n", {}),
        ("---\n---\n", {}),
        ("# Title\n\n---\na: 1\n---\n", {}),
        ("", {}),
    ],
)
def test_the_metadata_before_a_text_is_read(tmp_path: Path, content: str, found: object) -> None:
    file = tmp_path / "README.md"
    file.write_bytes(content.encode())
    assert read_front_matter(file) == found


@pytest.mark.parametrize(("content", "line"), [("---\na: 1\na: 2\n---\n", 3), (f"---\n{LAUGHS}---\n", 6)])
def test_metadata_that_is_out_of_bounds_is_refused_at_its_line(tmp_path: Path, content: str, line: int) -> None:
    file = tmp_path / "README.md"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        read_front_matter(file)
    assert caught.value.where == f"{file}:{line}"


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
    monkeypatch.setattr(files, "exchange", lambda one, other: False)  # as on a memory stick
    rename = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if path.name == ".writing-folder":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(UserError), write_folder(folder) as temporary:
        (temporary / "file").write_text("new")
    assert (folder / "file").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_free_space_is_that_of_the_nearest_folder_there_is(tmp_path: Path) -> None:
    assert abs(free_bytes(tmp_path / "not" / "there") - shutil.disk_usage(tmp_path).free) < 10**9


def test_a_folder_takes_what_its_files_take(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"123")
    (tmp_path / "c").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "c")
    assert folder_bytes(tmp_path) == 8
    assert folder_bytes(tmp_path / "none") == 0
