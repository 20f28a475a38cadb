from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlx_sft.data.files import locate
from mlx_sft.data.readers import Row
from mlx_sft.errors import USAGE, UserError


def read(path: Path | str, part: str = "all") -> list[Row | UserError]:
    return list(locate(str(path))[part].rows())


def values(path: Path | str) -> list[Any]:
    rows = read(path)
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.value for row in rows if isinstance(row, Row)]


def bad(path: Path) -> UserError:
    (error,) = [row for row in read(path) if isinstance(row, UserError)]
    return error


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["LF", "CRLF"])
def test_json_lines_are_read_with_their_line_numbers_and_blank_lines_skipped(
    tmp_path: Path, mark: bytes, end: bytes
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(mark + '{"text": "née 😀"}'.encode() + end + end + b'  {"text": "b"}')
    assert read(path) == [Row(f"{path}:1", {"text": "née 😀"}), Row(f"{path}:3", {"text": "b"})]


def test_rows_are_read_lazily(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 100_000)
    rows = locate(str(path))["all"].rows()
    assert next(rows) == Row(f"{path}:1", {"text": "a"})


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON: Expecting ',' delimiter in column 13"),
        (b"nonsense", "not JSON: Expecting value in column 1"),
        (b'{"text": NaN}', "not JSON: NaN is not a JSON value"),
        (b'{"text": -Infinity}', "not JSON: -Infinity is not a JSON value"),
        (b"[" * 200_000, "not JSON: nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b'{"text": "a\x00"}', "not JSON: Invalid control character at in column 12"),
        (b'["a"]', "a row must be an object, not a list"),
        (b'"a"', "a row must be an object, not a string"),
        (b"3", "a row must be an object, not a number"),
        (b"null", "a row must be an object, not null"),
        (b'{"text": "\xff"}', "not UTF-8 text: byte 0xff in column 11"),
        (b"\x1f\x8b\x08\x00", "not UTF-8 text: byte 0x8b in column 2"),
    ],
)
def test_a_bad_line_is_an_error_with_its_line_and_reading_goes_on(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    first, error, last = read(path)
    assert (first, last) == (Row(f"{path}:1", {"text": "a"}), Row(f"{path}:3", {"text": "b"}))
    assert isinstance(error, UserError)
    assert error.where == f"{path}:2"
    assert error.what.startswith(reason)
    assert error.hint


@pytest.mark.parametrize("content", ['[{"text": "a"}, {"text": "b"}]', '{"data": [{"text": "a"}, {"text": "b"}]}'])
def test_json_is_a_list_or_an_object_with_data(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(f"\ufeff{content}", encoding="utf-8")
    assert read(path) == [Row(f"{path}[0]", {"text": "a"}), Row(f"{path}[1]", {"text": "b"})]


def test_a_json_element_that_is_no_object_is_bad_on_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, 3]')
    assert bad(path).where == f"{path}[1]"


@pytest.mark.parametrize(
    ("content", "where", "reason"),
    [
        ('{"text": "a"}\n{"text": "b"}', ":2", "not JSON: Extra data"),
        ('{"text": "a"}', "", "neither a list of rows"),
        ("3", "", "neither a list of rows"),
        ("[]", "", "the file holds no rows"),
        ("", "", "the file is empty"),
    ],
)
def test_json_of_another_form_is_one_error(tmp_path: Path, content: str, where: str, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.where == f"{path}{where}"
    assert caught.value.what.startswith(reason)
    assert caught.value.hint


def test_csv_rows_have_the_line_on_which_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\ufeffprompt,completion\r\n"a\nb","say ""hi"", é"\r\n\r\nc,d\r\n', encoding="utf-8", newline="")
    assert read(path) == [
        Row(f"{path}:2", {"prompt": "a\nb", "completion": 'say "hi", é'}),
        Row(f"{path}:5", {"prompt": "c", "completion": "d"}),
    ]


def test_a_csv_cell_may_be_long(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"text\n{'a' * 300_000}\n")
    assert values(path) == [{"text": "a" * 300_000}]


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ("prompt,completion\na\n", 2, "1 cells under 2 columns"),
        ("prompt,completion\na,b,c\n", 2, "3 cells under 2 columns"),
        ('prompt,completion\na,"b\n', 2, "not CSV: unexpected end of data"),
        ('prompt,completion\na,"b"c\n', 2, "not CSV: "),
    ],
)
def test_a_bad_csv_row_is_an_error_with_its_line(tmp_path: Path, content: str, line: int, reason: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    error = bad(path)
    assert error.where == f"{path}:{line}"
    assert error.what.startswith(reason)


@pytest.mark.parametrize(
    ("content", "where", "reason"),
    [
        (b"text,text\na,b\n", ":1", "the column names are not distinct"),
        (b"text\na\n\xffb\n", ":3", "not UTF-8 text"),
        (b"text\n", "", "the file holds no rows"),
    ],
)
def test_csv_that_cannot_be_read_on_is_one_error(tmp_path: Path, content: bytes, where: str, reason: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.where == f"{path}{where}"
    assert caught.value.what.startswith(reason)


def test_parquet_rows_are_read(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    rows = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(300)]
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    assert values(path) == rows
    assert read(path)[299] == Row(f"{path}[299]", rows[299])


def test_a_file_that_is_not_parquet_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    path.write_text("nonsense")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read(path)


@pytest.mark.parametrize(("data", "module"), [("a.parquet", "pyarrow"), ("hf:owner/name", "datasets")])
def test_a_missing_reader_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, module: str
) -> None:
    (tmp_path / "a.parquet").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        read(data)
    assert "mlx-sft[data]" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [("a.txt", "x", "`.txt` is not a known kind of file"), ("a", "x", "the file's name has no suffix")],
)
def test_an_unknown_kind_of_file_is_refused(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=reason) as caught:
        locate(str(tmp_path / name))
    assert ".jsonl" in caught.value.hint
    assert caught.value.exit_code == USAGE


def test_a_missing_file_names_its_like(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("{}")
    with pytest.raises(UserError, match="no such file") as caught:
        locate(str(tmp_path / "chat.jsonl"))
    assert "chats.jsonl" in caught.value.hint


def test_a_bare_dataset_id_is_told_its_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        locate("owner/name")
    assert "hf:owner/name" in caught.value.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}')
    path.chmod(0)
    with pytest.raises(UserError, match="cannot read: Permission denied"):
        read(path)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="not a regular file"):
        locate(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("valid", ["valid.csv", "validation.jsonl", "dev.json"])
def test_a_folder_has_its_parts_by_name(tmp_path: Path, valid: str) -> None:
    for name in ("train.jsonl", valid, "test.jsonl", "README.md"):
        (tmp_path / name).write_text("x")
    parts = locate(str(tmp_path))
    assert {part: Path(source.name).name for part, source in parts.items()} == {
        "train": "train.jsonl",
        "valid": valid,
        "test": "test.jsonl",
    }


def test_a_folder_with_two_files_for_a_part_is_refused(tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").write_text("x")
    (tmp_path / "dev.csv").write_text("x")
    with pytest.raises(UserError, match=r"valid\.jsonl and dev\.csv are both the valid part"):
        locate(str(tmp_path))


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder holds no rows"):
        locate(str(tmp_path))


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        ("hf:owner/name", ("owner/name", None, "train")),
        ("hf:owner/name:test[:10]", ("owner/name", None, "test[:10]")),
        ("hf:owner/name/all:train", ("owner/name", "all", "train")),
    ],
)
def test_a_dataset_id_names_owner_name_configuration_and_split(
    monkeypatch: pytest.MonkeyPatch, data: str, arguments: tuple[str, str | None, str]
) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, split: str) -> list[dict[str, str]]:
        asked.append((path, name, split))
        return [{"text": "a"}]

    library = ModuleType("datasets")
    monkeypatch.setattr(library, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert read(data) == [Row(f"{data}[0]", {"text": "a"})]
    assert asked == [arguments]


def test_a_dataset_that_cannot_be_loaded_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)\nmore")

    library = ModuleType("datasets")
    monkeypatch.setattr(library, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", library)
    with pytest.raises(UserError) as caught:
        read("hf:owner/name")
    assert caught.value.where == "hf:owner/name"
    assert caught.value.what.endswith("(OfflineModeIsEnabled)")


@pytest.mark.parametrize("data", ["hf:name", "hf:", "hf:owner/", "hf:a/b/c/d"])
def test_a_malformed_dataset_id_is_refused(data: str) -> None:
    with pytest.raises(UserError, match="not a dataset id"):
        locate(data)


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert locate(str(path))["all"].sha256() == digest
