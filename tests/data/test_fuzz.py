"""Whatever a file holds, each of its rows becomes an item or one clear error, and none is lost.

`FUZZ_EXAMPLES=5000 pytest tests/data/test_fuzz.py` looks further than the suite does.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlx_sft.data.json_text import list_elements, parse_json
from mlx_sft.data.readers import Row
from mlx_sft.data.row_reader import RowReader
from mlx_sft.data.sources import FileSource, split_weight
from mlx_sft.errors import UserError
from tests.fuzz.promises import ROWS, attempt, check, check_error, good_files, read_file

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["\ud83d", "", " ", "assistant"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def lines_of(data: bytes) -> int:
    return sum(bool(line.strip(b" \t\r")) for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"))


FILES = good_files()
PIECES = [
    b"",
    b"\n",
    b"\r",
    b"\x00",
    b"\xff",
    b"\xed\xa0\x80",
    b'"',
    b"{",
    b"[",
    b"]",
    b"}",
    b",",
    b"\\ud800",
    b"\\",
    b"\x1f\x8b",
]


@st.composite
def mutated_files(draw: st.DrawFn) -> tuple[str, bytes]:
    name = draw(st.sampled_from(sorted(FILES)))
    data = FILES[name]
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, len(data)))
        last = draw(st.integers(first, min(len(data), first + 40)) | st.just(len(data)))
        data = data[:first] + draw(st.sampled_from(PIECES) | st.binary(max_size=8)) + data[last:]
    return name, data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz
@given(st.sampled_from(sorted(FILES)), st.binary(max_size=200))
@example("a.jsonl", b"\x1f\x8b\x08")
@example("a.jsonl", b"\x0c\n\x1c\n\xc2\xa0\n")
@example("a.json", b"\xef\xbb\xbf")
@example("a.jsonl", b"[{}]\n[")
def test_random_bytes_are_rows_or_errors(folder: Path, name: str, data: bytes) -> None:
    path = folder / name
    path.write_bytes(data)
    rows = read_file(path)
    is_plain = path.suffix == ".jsonl" and not data.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd"))
    if isinstance(rows, list) and is_plain and error_or_row(rows[0]) != f"{path}[0]":
        assert len(rows) == lines_of(data)


def error_or_row(row: Row | UserError) -> str:
    return row.where if isinstance(row, UserError) else row.origin


@fuzz
@given(mutated_files())
def test_a_good_file_with_some_bytes_changed_is_rows_or_errors(folder: Path, file: tuple[str, bytes]) -> None:
    name, data = file
    path = folder / name
    path.write_bytes(data)
    rows = read_file(path)
    if isinstance(rows, list) and name.endswith(".jsonl") and error_or_row(rows[0]).startswith(f"{path}:"):
        assert len(rows) == lines_of(data)


@fuzz
@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\x00[{"), max_size=6)
        | st.integers(1, 3000).map("ä ".__mul__)
    )
)
def test_no_line_of_plain_text_is_lost(folder: Path, lines: list[str]) -> None:
    path = folder / "book.txt"
    data = "\n".join(lines).encode()
    path.write_bytes(data)
    expected = [
        line.strip() for line in data.decode().replace("\ufeff", "", data.startswith(b"\xef\xbb\xbf")).split("\n")
    ]
    rows = attempt(lambda: list(FileSource(path).rows()))
    found: list[str] = []
    for row in [] if isinstance(rows, UserError) else rows:
        assert isinstance(row, Row)
        texts = row.value["text"].split("\n")
        first = int(row.origin.removeprefix(f"{path}:")) - 1
        assert [text.strip() for text in texts] == expected[first : first + len(texts)]
        found += texts
    assert [text.strip() for text in found if text.strip()] == [text for text in expected if text]


@st.composite
def mutated_rows(draw: st.DrawFn) -> dict[str, Any]:
    """A good row with something in it replaced, left out or added, at any depth."""
    row: dict[str, Any] = json.loads(json.dumps(draw(st.sampled_from(ROWS))))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = row
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not isinstance(place[key], dict | list) or draw(st.integers(0, 3)) == 0:
                if draw(st.booleans()):
                    place[key] = draw(json_values)
                else:
                    del place[key]
                break
            place = place[key]
        if draw(st.booleans()) and isinstance(place, dict):
            place[draw(st.sampled_from(["train", "weight", "role", "from", "system", "tool_calls", "content"]))] = draw(
                json_values
            )
    return row


@settings(fuzz, max_examples=4 * fuzz.max_examples)
@given(mutated_rows())
def test_a_good_row_with_something_changed_is_an_item_or_one_clear_error(value: dict[str, Any]) -> None:
    row = Row("chats.jsonl:17", value)
    named = ("messages", "sharegpt", "alpaca", "tokenized", "pairs")
    for reader in (RowReader(), RowReader(compares=True), *map(RowReader, named)):
        read = attempt(partial(reader.read, row))
        if isinstance(read, UserError):
            check_error(read, "chats.jsonl:17")
        else:
            check(read)


@fuzz
@given(
    st.dictionaries(st.sampled_from([key for row in ROWS for key in row]), json_values),
    st.dictionaries(
        st.sampled_from(["user", "assistant", "system", "messages", "text", "x"]),
        st.sampled_from(["text", "prompt", "y"]),
    ),
)
def test_any_row_and_any_columns_are_an_item_or_one_clear_error(value: dict[str, Any], columns: dict[str, str]) -> None:
    row = Row("chats.jsonl:17", value)
    read = attempt(lambda: RowReader(columns=columns, compares="y" in value).settled_by(row).read(row))
    if isinstance(read, UserError):
        check_error(read, "c")  # of the row, or of `columns`
    else:
        check(read)


@fuzz
@given(json_values, st.lists(st.integers(1, 20), min_size=1))
def test_json_is_read_as_the_standard_library_reads_it_or_refused(value: Any, sizes: list[int]) -> None:
    text = json.dumps([value, value])
    expected = None
    with suppress(ValueError):
        expected = parse_json(text)
    if expected is not None:
        assert repr(expected) == repr(json.loads(text))
    chunks, rest = [], text
    for size in sizes * len(text):
        chunks.append(rest[:size])
        rest = rest[size:]
    elements = list(list_elements(iter(chunks)))
    assert len(elements) == 2
    if expected is not None:
        assert repr(elements) == repr(expected)
    else:
        assert all(isinstance(element, ValueError) for element in elements)


@fuzz
@given(st.text(max_size=20) | st.from_regex(r"\A(hf:)?[a-z/.]{0,9}(:[a-z0-9.\[\]]{0,5}){0,2}\Z"))
@example("a:\x00")
@example("a" * 5000 + ":1")
def test_any_name_of_data_is_taken_apart_or_refused(spec: str) -> None:
    parts = attempt(lambda: split_weight(spec))
    if isinstance(parts, UserError):
        return
    data, weight = parts
    assert weight is None or weight > 0
    assert spec.startswith(data)
    assert (weight is None) == (data == spec)
