from __future__ import annotations

import gzip
import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_sft.data import file_text, json_text
from mlx_sft.data.json_text import BrokenJsonError, NotRowsError, list_elements, parse_json
from mlx_sft.data.readers import Row
from mlx_sft.data.sources import FileSource, locate
from mlx_sft.errors import UserError

pytestmark = pytest.mark.fast

ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
Compress = Callable[[bytes], bytes]


def zstd(data: bytes) -> bytes:
    compressed: bytes = pytest.importorskip(ZSTD).compress(data)
    return compressed


COMPRESSIONS = pytest.mark.parametrize("compress", [gzip.compress, zstd], ids=["gzip", "zstd"])


def read(path: Path) -> list[Row | UserError]:
    return list(locate(str(path))["all"].rows())


def values(path: Path) -> list[Any]:
    rows = read(path)
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.value for row in rows if isinstance(row, Row)]


def bad(path: Path) -> UserError:
    (error,) = [row for row in read(path) if isinstance(row, UserError)]
    return error


def whole(path: Path) -> UserError:
    """The error of a file that cannot be read."""
    with pytest.raises(UserError) as caught:
        read(path)
    assert caught.value.hint
    return caught.value


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
        (b'{"text": "a", "score": [1e999]}', "not JSON: 1e999 is a number too large to hold"),
        (b'{"text": "a", "score": -1.5E+400}', "not JSON: -1.5E+400 is a number too large to hold"),
        (b"[" * 200_000, "not JSON: nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON: a number of more than 4300 digits"),
        (b'{"text": "a\x00"}', "not JSON: Invalid control character in column 12"),
        (b'["a"]', "a row must be an object, not a list"),
        (b'"a"', "a row must be an object, not a string"),
        (b"3", "a row must be an object, not a number"),
        (b'{"text": "a", "text": "b"}', 'not JSON: the key "text" twice in one object'),
        (b'{"text": ' + b"[" * 300 + b"]" * 300 + b"}", "not JSON: nested too deeply"),
        ('{"née": "\\x"}'.encode(), "not JSON: Invalid \\escape in column 10"),
        (b"null", "a row must be an object, not null"),
        (b'{"text": "\xff"}', "not UTF-8 text: byte 0xff in column 11"),
        ('{"née": "'.encode() + b"\xff", "not UTF-8 text: byte 0xff in column 10"),
        (b"\xa0", "not UTF-8 text: byte 0xa0 in column 1"),
        (b"\x00" * 100, "not JSON: Expecting value in column 1"),
        (b"\x0c", "not JSON: Expecting value in column 1"),
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


def test_a_number_too_large_is_bad_on_its_own_and_one_too_small_is_zero(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"n": 1e-999}, {"n": 1e999}, {"n": 1e308}]')
    small, error, large = read(path)
    assert (small, large) == (Row(f"{path}[0]", {"n": 0.0}), Row(f"{path}[2]", {"n": 1e308}))
    assert isinstance(error, UserError)
    assert (error.where, error.what) == (f"{path}[1]", "not JSON: 1e999 is a number too large to hold")


def test_a_json_element_that_is_no_object_is_bad_on_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"text": "a"}, 3]')
    assert bad(path).where == f"{path}[1]"


@pytest.mark.parametrize(
    ("content", "where", "reason"),
    [
        ('{"a":\n1} {"a": 1}', "", "rows that stand one behind the other, over several lines each"),
        ('{"a":\n"b', ":2", "not JSON: Unterminated string starting in column 1"),
        ('{"data": [], "data": []}', ":1", 'not JSON: the key "data" twice in one object in column 21'),
        ('[{"text": "a"},\n {"text": nonsense}]', ":2", "not JSON: Expecting value in column 11"),
        ('[{"text": "a"},\n]', ":2", "not JSON: Expecting value in column 1"),
        ('[{"text": "a"}\n {}]', ":2", "not JSON: Expecting ',' delimiter in column 2"),
        ('[{"text": "a"}] x', ":1", "not JSON: Extra data in column 17"),
        ('[{"text": "a"', ":1", "not JSON: Expecting ',' delimiter in column 14"),
        ('[{"text": "a', ":1", "not JSON: Unterminated string starting in column 11"),
        ("[" * 100_000, ":1", "not JSON: nested too deeply"),
        ('{"data": [{}], 3: 4}', ":1", "not JSON: Expecting property name enclosed in double quotes in column 16"),
        ("3", "", "neither a list of rows"),
        ("[]", "", "the file holds no rows"),
        (" \n ", "", "the file holds no rows"),
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
        ("prompt,completion\na,b,c\n", 2, "3 cells under 2 columns, separated by commas"),
        ("prompt;completion\na,b\n", 2, "1 cells under 2 columns, separated by semicolons"),
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
        # A stray quote swallows the rows behind it, so that no row count would be right.
        (b'prompt,completion\na,"b\nc,d\n', ":2", "not CSV: unexpected end of data"),
        (b'prompt,completion\na,"b"c\nc,d\n', ":2", "not CSV: "),
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


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_delimiter_of_a_table_is_that_of_its_header(tmp_path: Path, name: str, delimiter: str) -> None:
    path = tmp_path / name
    path.write_text(f'\nprompt{delimiter}completion\nHow?{delimiter}"{delimiter}so, or; so"\n')
    assert read(path) == [Row(f"{path}:3", {"prompt": "How?", "completion": f"{delimiter}so, or; so"})]


def test_a_header_has_the_delimiter_of_its_files_name_before_another(tmp_path: Path) -> None:
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        path = tmp_path / name
        path.write_text(f'"a,b;\tc"{delimiter}d;e\n1{delimiter}2\n')
        assert values(path) == [{"a,b;\tc": "1", "d;e": "2"}]
    path.write_text("text\na,b;c\n")
    assert values(path) == [{"text": "a,b;c"}]


def test_quotes_of_a_table_with_tabs_may_be_characters_like_any_other(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('prompt\tcompletion\n"Go," I said\t"Where?"\n\n5" disk\tyes\n')
    assert read(path) == [
        Row(f"{path}:2", {"prompt": '"Go," I said', "completion": '"Where?"'}),
        Row(f"{path}:4", {"prompt": '5" disk', "completion": "yes"}),
    ]
    path.write_text('prompt\tcompletion\n"a\tb"\t"c\nd"\n"say ""e"""\t5"\n')
    assert values(path) == [
        {"prompt": "a\tb", "completion": "c\nd"},
        {"prompt": 'say "e"', "completion": '5"'},
    ]


def test_a_quote_that_is_left_open_in_a_table_with_tabs_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text('prompt\tcompletion\na\tb\n"c\nd\te\n')
    with pytest.raises(UserError, match="not CSV"):
        read(path)


def test_ndjson_is_an_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.ndjson"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert read(path) == [Row(f"{path}:1", {"text": "a"}), Row(f"{path}:2", {"text": "b"})]


ROW = {"messages": [{"role": "user", "content": "Größe?"}, {"role": "assistant", "content": "Zwei Meter."}]}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.txt"])
@pytest.mark.parametrize("indent", [None, 0, 2, "\t"])
def test_a_file_that_is_one_object_is_one_row(tmp_path: Path, name: str, indent: int | str | None) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(ROW, indent=indent))
    assert values(path) == [ROW]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_rows_over_several_lines_are_one_error_and_not_one_a_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("\n".join([json.dumps(ROW, indent=2)] * 3))
    error = whole(path)
    assert error.what == "rows that stand one behind the other, over several lines each"
    assert "jq -c" in error.hint
    path.write_text(json.dumps(ROW, indent=2)[:-20])
    assert whole(path).what.startswith("not JSON: ")


def test_a_first_line_that_is_cut_off_is_bad_on_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a",\n{"text": "b"}\n')
    assert bad(path).where == f"{path}:1"


def test_one_object_may_not_be_longer_than_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "LONGEST_ROW", 1000)
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": "\n", "a": ["b" * 400] * 4}, indent=2))
    assert "a row of more than" in bad(path).what


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


def test_a_csv_row_of_blank_cells_is_a_row_and_an_index_needs_no_name(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",text\n0,a\n,\n\n")
    assert values(path) == [{"": "0", "text": "a"}, {"": "", "text": ""}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_json_lines_and_json_lists_are_told_apart_by_what_is_in_them(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for text in (
        '[{"text": "a"}, {"text": "b"}]',
        '[\n {"text": "a"},\n {"text": "b"}\n]\n',
        '\n[{"text": "a"},\n{"text": "b"}]',
    ):
        path.write_text(text)
        assert [row.origin for row in read(path) if isinstance(row, Row)] == [f"{path}[0]", f"{path}[1]"]
    path.write_text('\n{"text": "a"}\n{"text": "b"}\n')
    assert [row.origin for row in read(path) if isinstance(row, Row)] == [f"{path}:2", f"{path}:3"]


def test_a_list_a_line_is_no_list_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('[{"role": "user"}]\n[{"role": "user"}]\n')
    assert [row.what for row in read(path) if isinstance(row, UserError)] == ["a row must be an object, not a list"] * 2


@pytest.mark.parametrize(
    "element", ['{"a": NaN}', '{"a": 1, "a": 2}', '{"n": ' + "9" * 5000 + "}", "[" * 300 + "]" * 300]
)
def test_an_element_that_is_not_quite_json_is_bad_on_its_own(tmp_path: Path, element: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(f'[{{"text": "a"}}, {element}, {{"text": "b"}}]')
    first, error, last = read(path)
    assert isinstance(error, UserError)
    assert error.where == f"{path}[1]"
    assert (first, last) == (Row(f"{path}[0]", {"text": "a"}), Row(f"{path}[2]", {"text": "b"}))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    "text",
    [
        '[{"a": "\\u00e9\\n]", "b": [1, -2.5e3, true]}, 12, null, "x", []]',
        '{"v": {"data": 1},\n"data" : [ 1 , {} ] , "z": 12 }',
    ],
)
def test_a_list_is_the_same_however_its_text_is_cut(size: int, text: str) -> None:
    whole_value = json.loads(text)
    chunks = iter([text[i : i + size] for i in range(0, len(text), size)])
    assert list(list_elements(chunks)) == (whole_value["data"] if isinstance(whole_value, dict) else whole_value)


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_a_broken_list_names_the_same_place_however_its_text_is_cut(size: int) -> None:
    text = '[{"a": 1},\n\n  {"b": 2},\n  {"c" 3}]'
    with pytest.raises(BrokenJsonError, match="Expecting ':' delimiter in column 8") as caught:
        list(list_elements(iter([text[i : i + size] for i in range(0, len(text), size)])))
    assert caught.value.line == 4
    for other in ("3", '"a"', "{}"):
        with pytest.raises(NotRowsError):
            list(list_elements(iter(other)))


def test_json_as_deep_as_may_be_is_read() -> None:
    deepest = json_text.DEEPEST
    assert parse_json("[" * deepest + "]" * deepest)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * (deepest + 1) + "]" * (deepest + 1))


def test_a_broken_element_in_a_long_list_does_not_make_the_rest_be_read() -> None:
    pieces = 0

    def chunks() -> Iterator[str]:
        nonlocal pieces
        for _ in range(1000):
            pieces += 1
            yield '{"a" 1}, ' * 1000 if pieces > 1 else "["

    with pytest.raises(BrokenJsonError):
        list(list_elements(chunks()))
    assert pieces < 5


@COMPRESSIONS
@pytest.mark.parametrize("name", ["a.jsonl.X", "a.jsonl", "A.JSONL.X", "a.txt.jsonl.X"])
def test_compression_is_told_by_the_first_bytes(tmp_path: Path, compress: Compress, name: str) -> None:
    path = tmp_path / name.replace("X", "gz" if compress is gzip.compress else "zst")
    path.write_bytes(compress(b'{"text": "a"}\n') + compress(b'{"text": "b"}\n'))
    assert read(path) == [Row(f"{path}:1", {"text": "a"}), Row(f"{path}:2", {"text": "b"})]
    positions: list[int] = []
    list(FileSource(path).rows(positions.append))
    assert positions[-1] == path.stat().st_size


@COMPRESSIONS
def test_json_and_csv_may_be_compressed(tmp_path: Path, compress: Compress) -> None:
    for name, text in (("a.json", '[{"text": "é"}]'), ("a.csv", "text\né\n")):
        path = tmp_path / f"{name}.gz"
        path.write_bytes(compress(b"\xef\xbb\xbf" + text.encode()))
        assert values(path) == [{"text": "é"}]


def test_a_file_that_only_its_name_calls_compressed_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_text('{"text": "a"}')
    assert values(path) == [{"text": "a"}]


@COMPRESSIONS
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_compressed_file_that_was_cut_off_is_an_error_and_never_a_shorter_file(
    tmp_path: Path, compress: Compress, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    lines = {".jsonl": [f'{{"text": "{i}"}}' for i in range(5000)], ".csv": ["text", *map(str, range(5000))]}
    text = "\n".join(lines[suffix]) if suffix in lines else json.dumps([{"text": str(i)} for i in range(5000)])
    data = compress(text.encode())
    path.write_bytes(data[: len(data) // 2])
    error = whole(path)
    assert error.what.startswith("the compressed file is damaged here")
    assert error.where.startswith(f"{path}:")
    path.write_bytes(data[:-1])
    assert "damaged" in whole(path).what


@COMPRESSIONS
def test_a_compressed_file_with_changed_bytes_is_an_error(tmp_path: Path, compress: Compress) -> None:
    path = tmp_path / "a.jsonl"
    data = bytearray(compress(b"".join(b'{"text": "%d"}\n' % i for i in range(5000))))
    data[len(data) // 2 : len(data) // 2 + 20] = b"\x00" * 20
    path.write_bytes(data)
    assert "the compressed file is damaged here" in whole(path).what


def test_gzip_may_be_padded_and_not_be_followed_by_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n') + b"\x00" * 100_000)
    assert values(path) == [{"text": "a"}]
    path.write_bytes(gzip.compress(b'{"text": "a"}\n') + b'{"text": "b"}\n')
    assert "damaged" in whole(path).what


def test_a_zstd_frame_that_wants_gigabytes_is_refused(tmp_path: Path) -> None:
    pytest.importorskip(ZSTD)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(bytes.fromhex("28b52ffd 00 a8 010000"))  # a window of 2 GiB, and an empty last block
    assert "too much memory" in whole(path).what


def test_bytes_of_a_list_that_are_not_utf_8_are_named_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes('[{"text": "ä"},\n\n'.encode() + b'{"text": "\xe4"}]')
    error = whole(path)
    assert (error.where, error.what) == (f"{path}:3", "not UTF-8 text: byte 0xe4")
    path.write_bytes('[{"text": "ä"}]\nä'.encode()[:-1])
    assert (whole(path).where, whole(path).what) == (f"{path}:2", "not UTF-8 text: byte 0xc3")


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python reads zstd itself")
def test_zstd_without_its_package_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd0000")
    monkeypatch.delattr("backports.zstd", raising=False)
    monkeypatch.setitem(sys.modules, "backports.zstd", None)
    assert "mlx-sft[data]" in whole(path).hint


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ('{"text": "a"}\n'.encode("utf-16"), "UTF-16 text, not UTF-8"),
        ('{"text": "a"}\n'.encode("utf-16-le"), "UTF-16 text, not UTF-8"),
        ('{"text": "a"}\n'.encode("utf-16-be"), "UTF-16 text, not UTF-8"),
        (b"PAR1\x15\x04", "a Parquet file"),
        (b"PK\x03\x04....", "a zip archive"),
        (b"SQLite format 3\x00", "an SQLite database"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"<!DOCTYPE html>\n<html>", "a web page"),
        (gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), "gzip inside of another compression"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_another_kind_of_file_is_named(tmp_path: Path, suffix: str, content: bytes, kind: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    error = whole(path)
    assert error.what.startswith(f"this is {kind}")
    assert error.where == str(path)


def test_a_line_without_end_is_an_error_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_text, "LONGEST_ROW", 1 << 20)
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(30):
            file.write(b"a" * (1 << 20))
        file.write(b'"}\n{"text": "b"}\n')
    tracemalloc.start()
    first, error, last = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (first, last) == (Row(f"{path}:1", {"text": "a"}), Row(f"{path}:3", {"text": "b"}))
    assert isinstance(error, UserError)
    assert (error.where, error.what) == (f"{path}:2", "a line of more than 1 MiB")
    assert peak < 8 << 20


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_reading_takes_no_more_memory_for_a_longer_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    lines = [json.dumps({"text": "a" * 1000})] * 20_000
    path.write_text(
        {".jsonl": "\n".join(lines), ".json": f"[{','.join(lines)}]", ".csv": "text\n" + ("a" * 1000 + "\n") * 20_000}[
            suffix
        ]
    )
    tracemalloc.start()
    count = sum(1 for _ in FileSource(path).rows())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak < 12 << 20 < path.stat().st_size


def test_a_table_leaves_out_the_nulls_that_its_columns_put_into_objects(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    tools = [
        {"name": "f", "parameters": {"a": {"type": "string"}}},
        {"name": "g", "parameters": {"b": {"type": "string"}}},
    ]
    parquet.write_table(arrow.Table.from_pylist([{"tools": tools, "text": None}]), path)
    assert values(path) == [{"tools": tools, "text": None}]


def test_a_parquet_file_that_was_cut_off_or_is_another_kind_is_an_error(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"text": ["a"] * 100}), path)
    positions: list[int] = []
    list(FileSource(path).rows(positions.append))
    assert positions[-1] == path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    assert whole(path).what.startswith("not a readable Parquet file")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert whole(path).what.startswith("this is a Git LFS pointer")


def test_plain_text_is_rows_of_whole_paragraphs(tmp_path: Path) -> None:
    paragraph = "\n".join(["x" * 99] * 12)
    path = tmp_path / "book.txt"
    path.write_bytes(b"\xef\xbb\xbf\n \n" + "\n\n\n".join(["  " + paragraph] * 5).replace("\n", "\r\n").encode())
    pair = f"  {paragraph}\n\n\n  {paragraph}"
    assert read(path) == [
        Row(f"{path}:3", {"text": pair}),
        Row(f"{path}:31", {"text": pair}),
        Row(f"{path}:59", {"text": f"  {paragraph}"}),
    ]


def test_a_long_paragraph_of_plain_text_is_cut_between_its_lines(tmp_path: Path) -> None:
    text = ["ä" * 500] * 10 + ["y" * 10_000] + ["z"]
    path = tmp_path / "book.md"
    path.write_text("\n".join(text), encoding="utf-8")
    rows = read(path)
    assert [row.origin for row in rows if isinstance(row, Row)] == [f"{path}:{n}" for n in (1, 5, 9, 11, 12)]
    assert "\n".join(row.value["text"] for row in rows if isinstance(row, Row)) == "\n".join(text)


def test_a_bad_line_of_plain_text_is_an_error_between_what_stands_around_it(tmp_path: Path) -> None:
    path = tmp_path / "book.txt.gz"
    path.write_bytes(gzip.compress(b"a\nb\n\xff\nc\n\xff\n\xff\n"))
    before, error, after, *others = read(path)
    assert (before, after) == (Row(f"{path}:1", {"text": "a\nb"}), Row(f"{path}:4", {"text": "c"}))
    assert [e.where for e in (error, *others) if isinstance(e, UserError)] == [f"{path}:{n}" for n in (3, 5, 6)]


@pytest.mark.parametrize("content", ['{"text": "a"}\n{"text": "b"}\n', '[\n  {"text": "a"},\n  {"text": "b"}\n]'])
def test_rows_in_a_file_named_as_plain_text_are_read_as_rows(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    assert values(path) == [{"text": "a"}, {"text": "b"}]


def test_an_element_of_a_list_may_not_be_too_long_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "LONGEST_ROW", 100)
    long, short = list_elements(iter([json.dumps(["a" * 200, "b"])]))
    assert isinstance(long, ValueError)
    assert "a row of more than" in str(long)
    assert short == "b"


@pytest.mark.parametrize(
    ("name", "first", "blank", "last"),
    [
        *(("a.jsonl", '{"text": "one"}\n', blank, '{"text": "two"}\n') for blank in ("\n", "\r\n", " \t\n")),
        *(("a.txt", "one\n", blank, "two\n") for blank in ("\n", " \t\n")),
        *(("a.csv", "text\none\n", blank, "two\n") for blank in ("\n", "\r\n")),
    ],
)
def test_a_long_run_of_blank_lines_is_read_at_once_and_counted(
    tmp_path: Path, name: str, first: str, blank: str, last: str
) -> None:
    path = tmp_path / name
    path.write_bytes((first + 1_000_000 * blank + last).encode())
    before = first.count("\n")
    one, two = Row(f"{path}:{before}", {"text": "one"}), Row(f"{path}:{before + 1_000_001}", {"text": "two"})
    assert read(path) == [one, two]
    assert sum(1 for _ in file_text.text_lines(path, None)) < 10_000


def test_blank_lines_inside_of_a_cell_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    cell = "a" + 20_000 * "\n" + 20_000 * " \n" + "b"
    path.write_text(f'text\n"{cell}"\nc\n')
    assert read(path) == [Row(f"{path}:2", {"text": cell}), Row(f"{path}:40003", {"text": "c"})]
