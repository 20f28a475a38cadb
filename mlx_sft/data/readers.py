"""A file's bytes → rows, one reader a format.

Knows encodings and formats; knows nothing of what a row means. Rows are read lazily. A row that cannot be read is handed out
in its place as the `UserError` that says why, so that who reads the rows decides whether to go on; a reader raises where the
whole file cannot be read.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mlx_sft.errors import UserError

INSTALL_HINT = "install the readers for it: pip install 'mlx-sft[data]'"
_JSON_LINES_HINT = 'write one JSON object a line, such as {"messages": [...]}'


@dataclass(frozen=True, slots=True)
class Row:
    """One row as its file holds it: `origin` is `chats.jsonl:17`, `chats.json[16]` or `hf:owner/name:train[16]`."""

    origin: str
    value: dict[str, Any]


Rows = Iterator[Row | UserError]


def parse_json(text: str) -> Any:
    """`json.loads` without NaN and Infinity; raises `ValueError` for whatever is not JSON, too deep nesting included."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def as_row(origin: str, value: Any, hint: str = _JSON_LINES_HINT) -> Row | UserError:
    if isinstance(value, dict):
        return Row(origin, value)
    return UserError(f"a row must be an object, not {_json_kind(value)}", where=origin, hint=hint)


def _json_kind(value: Any) -> str:
    names = {
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), "null")


def _text_lines(path: Path) -> Iterator[tuple[int, str | UserError]]:
    """Numbered lines with their ends; a line that is not UTF-8 is its error. A byte order mark is left out."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                yield (
                    number,
                    UserError(
                        f"not UTF-8 text: byte 0x{line[error.start]:02x} in column {error.start + 1}",
                        where=f"{path}:{number}",
                        hint="save the file as UTF-8",
                    ),
                )
                continue
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _read_json_lines(path: Path) -> Rows:
    for number, line in _text_lines(path):
        if isinstance(line, UserError):
            yield line
        elif line.strip():
            yield _parse_line(f"{path}:{number}", line.rstrip())


def _parse_line(origin: str, line: str) -> Row | UserError:
    try:
        return as_row(origin, parse_json(line))
    except ValueError as error:
        return UserError(f"not JSON: {_problem(error)}", where=origin, hint=_JSON_LINES_HINT)


def _problem(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} in column {error.colno}"
    return str(error)


def _read_json(path: Path) -> Rows:
    lines = []
    for _, line in _text_lines(path):
        if isinstance(line, UserError):
            raise line
        lines.append(line)
    hint = 'a .json file is a list of rows, or {"data": [rows]}; for one object a line name it .jsonl'
    try:
        value = parse_json("".join(lines))
    except ValueError as error:
        where = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else str(path)
        raise UserError(f"not JSON: {_problem(error)}", where=where, hint=hint) from None
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError("neither a list of rows nor an object with them", where=str(path), hint=hint)
    for index, row in enumerate(rows):
        yield as_row(f"{path}[{index}]", row, hint='write each row as an object, such as {"messages": [...]}')


def _read_csv(path: Path) -> Rows:
    # The csv module refuses cells over 128 KiB unless told otherwise; a long conversation is one cell.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(_csv_lines(path), strict=True)
    header: list[str] | None = None
    while True:
        origin = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield UserError(
                f"not CSV: {error}",
                where=origin,
                hint="quote cells that hold a comma, quote or line break",
            )
            continue
        if not any(cells):
            continue
        if header is None:
            header = _csv_header(cells, origin)
        elif len(cells) != len(header):
            hint = "quote cells that hold a comma, quote or line break"
            yield UserError(f"{len(cells)} cells under {len(header)} columns", where=origin, hint=hint)
        else:
            yield Row(origin, dict(zip(header, cells, strict=True)))


def _csv_header(cells: list[str], origin: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    if len(set(names)) < len(names) or not all(names):
        raise UserError(
            "the column names are not distinct",
            where=origin,
            hint="name each column in the first line",
        )
    return names


def _csv_lines(path: Path) -> Iterable[str]:
    for _, line in _text_lines(path):
        if isinstance(line, UserError):
            raise line  # inside a quoted cell there is no next row to go on with
        yield line


def _read_parquet(path: Path) -> Rows:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError("reading .parquet needs the package `pyarrow`", where=str(path), hint=INSTALL_HINT) from None
    index = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=256):
            for value in batch.to_pylist():
                yield as_row(f"{path}[{index}]", value)
                index += 1
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"not a readable Parquet file: {first_line(error)}",
            where=str(path),
            hint="write the file anew",
        ) from error


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""A file's suffix → the reader of its rows."""


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
