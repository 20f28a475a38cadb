"""A file → rows, one reader a format.

Rows are read lazily. A row that cannot be read is handed out in its place as the `UserError` that says why, so that who reads
the rows decides whether to go on; a reader raises where the whole file cannot be read, or what follows cannot be told apart.
"""

from __future__ import annotations

import codecs
import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_sft.data.json_text import LONGEST_ROW, BrokenJsonError, NotRowsError, kind, list_elements, parse_json
from mlx_sft.data.text_files import (
    COMPRESSIONS,
    INSTALL_HINT,
    OnBytes,
    open_bytes,
    refuse_other_kinds,
    text_chunks,
    text_lines,
)
from mlx_sft.errors import UserError, blamed_on

_JSON_LINES_HINT = 'write one JSON object a line, such as {"messages": [...]}'
_JSON_HINT = 'a .json file is a list of rows, or {"data": [rows]}; for one object a line name it .jsonl'
_CSV_HINT = "quote cells that hold a comma, quote or line break"
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
    try:
        return _json_lines if not isinstance(parse_json(line.decode("utf-8")).get("data"), list) else None
    except ValueError:
        return None


def _json_lines(path: Path, on_bytes: OnBytes | None) -> Rows:
    for origin, line in text_lines(path, on_bytes):
        if isinstance(line, UserError):
            yield line
        elif text := line.rstrip(" \t\r\n"):
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
        raise UserError("neither a list of rows nor an object with them", where=str(path), hint=_JSON_HINT) from None


def _row(origin: str, value: Any, hint: str) -> Row | UserError:
    if isinstance(value, dict):
        return Row(origin, value)
    return UserError(f"a row must be an object, not {kind(value)}", where=origin, hint=hint)


def _csv(path: Path, on_bytes: OnBytes | None) -> Rows:
    # The csv module refuses cells over 128 KiB unless told otherwise; a long conversation is one cell.
    csv.field_size_limit(LONGEST_ROW)
    reader = csv.reader(_csv_lines(path, on_bytes), strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in reader:
            origin, line = f"{path}:{line}", reader.line_num + 1
            if not cells:
                continue
            if not header:
                header = _csv_header(cells, origin)
            elif len(cells) != len(header):
                what = f"{len(cells)} cells under {len(header)} columns"
                yield UserError(what, where=origin, hint=_CSV_HINT)
            else:
                yield Row(origin, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        # Raised, not handed out: a stray quote swallows the rows behind it.
        reason = str(error).partition(" - ")[0]  # behind it is advice to a programmer
        raise UserError(f"not CSV: {reason}", where=f"{path}:{line}", hint=_CSV_HINT) from None


def _csv_header(cells: list[str], origin: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(names) == 1 and ("\t" in names[0] or ";" in names[0]):
        raise UserError("the columns are not separated by commas", where=origin, hint="save the file with commas")
    if len(set(names)) < len(names):
        raise UserError("the column names are not distinct", where=origin, hint="name each column in the first line")
    return names


def _csv_lines(path: Path, on_bytes: OnBytes | None) -> Iterator[str]:
    for _, line in text_lines(path, on_bytes):
        if isinstance(line, UserError):
            raise line  # inside a quoted cell there is no next row to go on with
        yield line


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


READERS: dict[str, Reader] = {
    ".jsonl": _told_by_content(_json_lines),
    ".json": _told_by_content(_json_list),
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _told_by_content(_passages),
    ".md": _told_by_content(_passages),
}
"""A file's suffix → the reader of its rows. All but .parquet may be compressed, which their first bytes tell."""


def reader_of(path: Path) -> Reader | None:
    """The reader for a file's name: `chats.jsonl`, `chats.jsonl.gz`; None for a name that is not known."""
    packed = path.suffix.lower() in COMPRESSIONS
    suffix = (path.with_suffix("") if packed else path).suffix.lower()
    return None if packed and suffix == ".parquet" else READERS.get(suffix)
