"""Files on the disk: what is within bounds is read, what is not is refused by its line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest

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
)

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


def test_free_space_is_that_of_the_nearest_folder_there_is(tmp_path: Path) -> None:
    assert abs(free_bytes(tmp_path / "not" / "there") - shutil.disk_usage(tmp_path).free) < 10**9


def test_a_folder_takes_what_its_files_take(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").write_bytes(b"123")
    (tmp_path / "c").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "c")
    assert folder_bytes(tmp_path) == 8
    assert folder_bytes(tmp_path / "none") == 0
