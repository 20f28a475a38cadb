"""The rows of a file as plain readers see them: Python's own `json`, `csv` and `gzip`, and `pyarrow`.

Knows nothing of the product; where a file may be read in two ways, it gives both.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from types import ModuleType
from typing import Any

Rows = dict[str, Any]
"""The value of each row by what follows the file's name in its origin: `:17`, `[16]`."""


def zstd() -> ModuleType:
    """Python's own module, or the same for Pythons before 3.14."""
    return import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")


def readings(name: str, content: bytes) -> Iterator[Rows]:
    """The ways to read a file's rows; none where there is no plain way."""
    with suppress(OSError, EOFError, ValueError):
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        elif content.startswith(b"\x28\xb5\x2f\xfd"):
            content = zstd().decompress(content)
    if ".parquet" in name:
        yield from _parquet(content)
        return
    content = content.removeprefix(b"\xef\xbb\xbf")
    if ".csv" in name:
        yield from _csv(content)
        return
    yield _lines(content)
    with suppress(ValueError, RecursionError):
        whole = json.loads(content.decode(), parse_int=_integer)
        rows = whole.get("data") if isinstance(whole, dict) else whole
        if isinstance(rows, list):
            yield {f"[{index}]": value for index, value in enumerate(rows)}


def _integer(digits: str) -> int | str:
    """A number, or the digits of one that is too long for Python, so that the others can be read."""
    return int(digits) if len(digits) < 4300 else digits


def _lines(content: bytes) -> Rows:
    rows: Rows = {}
    for number, line in enumerate(content.split(b"\n"), 1):
        with suppress(ValueError, RecursionError):
            rows[f":{number}"] = json.loads(line.decode())
    return rows


def _csv(content: bytes) -> Iterator[Rows]:
    csv.field_size_limit(2**31 - 1)
    with suppress(ValueError, csv.Error):
        reader = csv.reader(io.StringIO(content.decode(), newline=""), strict=True)
        rows: Rows = {}
        header: list[str] | None = None
        first = 1
        for cells in reader:
            if cells and header is None:
                header = [cell.strip() for cell in cells]
            elif cells and header is not None and len(cells) == len(header):
                rows[f":{first}"] = dict(zip(header, cells, strict=True))
            first = reader.line_num + 1
        yield rows


def _parquet(content: bytes) -> Iterator[Rows]:
    import pyarrow
    from pyarrow import parquet

    with suppress(pyarrow.ArrowException, OSError, ValueError, OverflowError):
        table = parquet.read_table(io.BytesIO(content))
        yield {f"[{index}]": value for index, value in enumerate(table.to_pylist())}


def without_nulls(value: Any) -> Any:
    """A typed table's value without the nulls that its columns give every object."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def messages_of(row: dict[str, Any]) -> list[dict[str, str]] | None:
    """The messages of a row of which there can be no two opinions; None for any other."""
    match row:
        case {"messages": list(messages)} if set(row) == {"messages"}:
            simple = [m for m in messages if isinstance(m, dict) and set(m) == {"role", "content"}]
            pairs = [(m["role"], m["content"]) for m in simple]
            known = all(role in ("system", "user", "assistant") and isinstance(text, str) for role, text in pairs)
            return messages if known and len(simple) == len(messages) else None
        case {"conversations": list(turns)} if set(row) == {"conversations"}:
            roles = {"human": "user", "gpt": "assistant"}
            simple = [
                m for m in turns if isinstance(m, dict) and set(m) == {"from", "value"} and isinstance(m["value"], str)
            ]
            if len(simple) < len(turns) or not all(isinstance(m["from"], str) and m["from"] in roles for m in simple):
                return None
            return [{"role": roles[m["from"]], "content": m["value"]} for m in simple]
        case {"prompt": str(prompt), "completion": str(completion)} if set(row) == {"prompt", "completion"}:
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return None
