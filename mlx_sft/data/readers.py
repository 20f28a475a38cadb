"""A file → rows, one reader a format.

Rows are read lazily. A row that cannot be read is handed out in its place as the `UserError` that says why, so that who reads
the rows decides whether to go on; a reader raises where the whole file cannot be read, or what follows cannot be told apart.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from mlx_sft.data.file_text import (
    COMPRESSIONS,
    INSTALL_HINT,
    OnBytes,
    open_bytes,
    refuse_other_kinds,
    text_chunks,
    text_lines,
)
from mlx_sft.data.json_text import (
    LONGEST_ROW,
    BrokenJsonError,
    NotRowsError,
    first_value,
    kind,
    list_elements,
    parse_json,
)
from mlx_sft.errors import UserError, blamed_on

_JSON_LINES_HINT = 'write one JSON object a line, such as {"messages": [...]}'
_JSON_HINT = 'a .json file is a list of rows, {"data": [rows]} or one row; for one object a line name it .jsonl'
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
_HEAD = 1 << 16
_PARQUET_BUFFER = 1 << 20
_PASSAGE = 1 << 12
"""Bytes, which are about 1,000 tokens in most languages: half of the default `max_length`."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as its file holds it: `origin` is `chats.jsonl:17`, `chats.json[16]` or `hf:owner/name:train[16]`."""

    origin: str
    value: dict[str, Any]


Rows = Iterator[Row | UserError]
Reader = Callable[[Path, OnBytes | None], Rows]


def _told_by_content(otherwise: Reader) -> Reader:
    """A reader of rows as JSON where a file begins as lines or a list of them, and `otherwise` of any other."""
    return lambda path, on_bytes: (_json_reader(path) or otherwise)(path, on_bytes)


_GOES_ON = re.compile(rb"(?=\{)[^\n]*(?:[{,][ \t\r]*\n\s*\"|\[[ \t\r]*\n\s*[\"\[{])")
"""An object of which the first line is not yet the whole, as where JSON is written to be read by people."""


def _json_reader(path: Path) -> Reader | None:
    with open_bytes(path) as file:
        head = file.read(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
        first, line_break, rest = head.partition(b"\n")
        if head.startswith(b"["):
            is_list = first[1:].strip()[:1] in (b"", b"{") and not (first.rstrip().endswith(b"]") and rest.strip())
            return _json_list if is_list else None
        if not head.startswith(b"{"):
            return None
        line = first if line_break else first + file.readline(LONGEST_ROW)
    if _GOES_ON.match(head):
        return _json_list
    try:
        return _json_lines if not isinstance(parse_json(line.decode("utf-8")).get("data"), list) else None
    except ValueError:
        return None


def _json_lines(path: Path, on_bytes: OnBytes | None) -> Rows:
    for origin, line in text_lines(path, on_bytes):
        if isinstance(line, UserError):
            yield line
        elif not line.startswith("\n") and (text := line.rstrip(" \t\r\n")):  # what begins with an end is blank
            try:
                yield _row(origin, parse_json(text), _JSON_LINES_HINT)
            except ValueError as error:
                yield UserError(f"not JSON: {error}", where=origin, hint=_JSON_LINES_HINT)


def _json_list(path: Path, on_bytes: OnBytes | None) -> Rows:
    try:
        for index, value in enumerate(list_elements(text_chunks(path, on_bytes))):
            origin = f"{path}[{index}]"
            if isinstance(value, ValueError):
                yield UserError(f"not JSON: {value}", where=origin, hint=_JSON_HINT)
            else:
                yield _row(origin, value, 'write each row as an object, such as {"messages": [...]}')
    except BrokenJsonError as error:
        raise UserError(f"not JSON: {error}", where=f"{path}:{error.line}", hint=_JSON_HINT) from None
    except NotRowsError:
        yield _one_row(path)


def _one_row(path: Path) -> Row | UserError:
    """The row of a file that is one object and no list of them."""
    try:
        value, more = first_value(text_chunks(path, None))
    except BrokenJsonError as error:
        raise UserError(f"not JSON: {error}", where=f"{path}:{error.line}", hint=_JSON_HINT) from None
    if more:
        hint = "write each on one line, as with: jq -c . OLD > NEW.jsonl; or put all of them into a list"
        raise UserError("rows that stand one behind the other, over several lines each", where=str(path), hint=hint)
    if not isinstance(value, dict | ValueError):
        raise UserError("neither a list of rows nor an object with them", where=str(path), hint=_JSON_HINT)
    if isinstance(value, ValueError):
        return UserError(f"not JSON: {value}", where=f"{path}[0]", hint=_JSON_HINT)
    return Row(f"{path}[0]", value)


def _row(origin: str, value: Any, hint: str) -> Row | UserError:
    if isinstance(value, dict):
        return Row(origin, value)
    return UserError(f"a row must be an object, not {kind(value)}", where=origin, hint=hint)


def _table(delimiter: str, path: Path, on_bytes: OnBytes | None) -> Rows:
    """Rows of cells under a header.

    Args:
        delimiter: What stands between cells, unless the header has only another one.
    """
    # The csv module refuses cells over 128 KiB unless told otherwise; a long conversation is one cell.
    csv.field_size_limit(LONGEST_ROW)
    line = 0  # as far as csv's reader has read

    def lines() -> Iterator[str]:
        nonlocal line
        for text in _table_lines(path, on_bytes):
            line += max(1, text.count("\n"))
            yield text

    texts = lines()
    beginning = next((text for text in texts if text.strip()), "")
    delimiter = _delimiter_of(beginning, delimiter)
    hint = f"quote cells that hold a {_DELIMITERS[delimiter]}, quote or line break"
    bare = delimiter == "\t" and _has_bare_quotes(path)
    reader = csv.reader(chain([beginning], texts), delimiter=delimiter, quotechar=None if bare else '"', strict=True)
    header: list[str] = []
    first = line
    try:
        for cells in reader:
            origin, first = f"{path}:{first}", line + 1
            if not cells:
                continue
            if not header:
                header = _header(cells, origin)
            elif len(cells) != len(header):
                what = f"{len(cells)} cells under {len(header)} columns, separated by {_DELIMITERS[delimiter]}s"
                yield UserError(what, where=origin, hint=hint)
            else:
                yield Row(origin, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        # Raised, not handed out: a stray quote swallows the rows behind it.
        reason = str(error).partition(" - ")[0]  # behind it is advice to a programmer
        raise UserError(f"not CSV: {reason}", where=f"{path}:{first}", hint=hint) from None


def _delimiter_of(header: str, expected: str) -> str:
    """The delimiter that a table's header has, outside of quotes: the expected one, else another, as Excel writes `;`."""
    unquoted = re.sub(r'"[^"]*"', "", header)
    return next((one for one in (expected, *_DELIMITERS) if one in unquoted), expected)


def _has_bare_quotes(path: Path) -> bool:
    """Whether quotes are characters like any other, as many programs write tables with tabs: each line has all its cells as it stands,
    and one of them begins with a quote that does not enclose it."""
    columns, found = 0, False
    for _, line in text_lines(path, None):
        if isinstance(line, UserError):
            return False  # it is an error for who reads the rows
        cells = line.rstrip("\r\n").split("\t")
        if not line.strip():
            continue
        columns = columns or len(cells)
        if len(cells) != columns:
            return False
        found = found or any(cell.startswith('"') and not _ENCLOSED.fullmatch(cell) for cell in cells)
    return found


_ENCLOSED = re.compile(r'"(?:[^"]|"")*"')


def _header(cells: list[str], origin: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) < len(names):
        raise UserError("the column names are not distinct", where=origin, hint="name each column in the first line")
    return names


def _table_lines(path: Path, on_bytes: OnBytes | None) -> Iterator[str]:
    for _, line in text_lines(path, on_bytes):
        if isinstance(line, UserError):
            raise line  # inside a quoted cell there is no next row to go on with
        if line.count("\n") < 2 or not line.strip("\r\n"):
            yield line
        else:  # of blank lines in one text, csv's reader understands only those without a space
            yield from (f"{blank}\n" for blank in line.split("\n")[:-1])


def _passages(path: Path, on_bytes: OnBytes | None) -> Rows:
    """Plain text in rows of some paragraphs: each ends at a blank line once it is half full, and between two lines at the latest."""
    lines: list[str] = []
    first, size = "", 0
    for origin, line in text_lines(path, on_bytes):
        text = "" if isinstance(line, UserError) else line.rstrip("\r\n")
        added = len(text.encode()) + 1
        is_break = not text.strip() and (size > _PASSAGE // 2 or isinstance(line, UserError))
        if lines and (is_break or size + added > _PASSAGE):
            yield Row(first, {"text": "\n".join(lines).rstrip()})
            lines, size = [], 0
        if isinstance(line, UserError):
            yield line
        elif lines or text.strip():
            first = first if lines else origin
            lines.append(text)
            size += added
    if lines:
        yield Row(first, {"text": "\n".join(lines).rstrip()})


def _parquet(path: Path, on_bytes: OnBytes | None) -> Rows:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("reading .parquet needs the package `pyarrow`", where=str(path), hint=INSTALL_HINT) from None
    with path.open("rb") as file:
        start = file.read(64)
    if not start.startswith(b"PAR1"):
        refuse_other_kinds(start, path)
    index = 0
    damaged = blamed_on(path, "not a readable Parquet file", "write the file anew")
    with damaged, parquet.ParquetFile(path, buffer_size=_PARQUET_BUFFER) as table:
        # Over all groups at once it would keep every one that it has read.
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(batch_size=256, row_groups=[group]):
                for value in batch.to_pylist():
                    yield table_row(f"{path}[{index}]", value)
                    index += 1
            if on_bytes:
                on_bytes(path.stat().st_size * index // max(1, table.metadata.num_rows))


def table_row(origin: str, value: dict[str, Any]) -> Row:
    """A row of a typed table, whose columns give every object within them the keys of all others, as null."""
    return Row(origin, {key: _without_nulls(item) for key, item in value.items()})


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and not isinstance(next(iter(value), 0), int | str | float):
        return [_without_nulls(item) for item in value]
    return value


_lines_or_list: Reader = _told_by_content(_json_lines)
_text: Reader = _told_by_content(_passages)

READERS: dict[str, Reader] = {
    ".jsonl": _lines_or_list,
    ".ndjson": _lines_or_list,
    ".json": _told_by_content(_json_list),
    ".csv": partial(_table, ","),
    ".tsv": partial(_table, "\t"),
    ".parquet": _parquet,
    ".txt": _text,
    ".md": _text,
}
"""A file's suffix → the reader of its rows. All but .parquet may be compressed, which their first bytes tell."""


def reader_of(path: Path) -> Reader | None:
    """The reader for a file's name: `chats.jsonl`, `chats.jsonl.gz`; None for a name that is not known."""
    packed = path.suffix.lower() in COMPRESSIONS
    suffix = (path.with_suffix("") if packed else path).suffix.lower()
    return None if packed and suffix == ".parquet" else READERS.get(suffix)
