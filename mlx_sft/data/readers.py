"""A file → rows, one reader a format.

Rows are read lazily. A row that cannot be read is handed out in its place as the `UserError` that says why, so that who reads
the rows decides whether to go on; a reader raises where the whole file cannot be read, or what follows cannot be told apart.

A compression is told by a file's first bytes and not by its name, and kinds of file that hold no rows as text are named.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mlx_sft.data.json_text import LONGEST_ROW, BrokenJsonError, NotRowsError, kind, list_elements, parse_json
from mlx_sft.errors import UserError, blamed_on

OnBytes = Callable[[int], None]
"""Told how many bytes of a file, as it lies on the disk, have been read."""
COMPRESSIONS = (".gz", ".zst")
"""The suffixes that a compressed file's name has behind that of its format."""
INSTALL_HINT = "install the readers for it: pip install 'mlx-sft[data]'"

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_CHUNK = 1 << 20

_AS_UTF_8 = "save the file as UTF-8, as with: iconv -f UTF-16 -t UTF-8 OLD > NEW"
_UNPACK = "unpack it and give a file from it (.gz and .zst are read as they are)"
_DOWNLOAD = "download the file itself, not the page that shows it"
_NOT_TEXT: tuple[tuple[bytes, str, str], ...] = (
    (codecs.BOM_UTF16_LE, "UTF-16 text, not UTF-8", _AS_UTF_8),
    (codecs.BOM_UTF16_BE, "UTF-16 text, not UTF-8", _AS_UTF_8),
    (b"PAR1", "a Parquet file", "name it .parquet"),
    (b"ARROW1", "an Arrow file", "save it as .parquet or .jsonl"),
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (_GZIP, "gzip inside of another compression", _UNPACK),
    (_ZSTD, "zstd inside of another compression", _UNPACK),
    (b"SQLite format 3\x00", "an SQLite database", "export its rows as .jsonl or .csv"),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself", "fetch it: git lfs pull"),
    (b"<!doctype html", "a web page", _DOWNLOAD),
    (b"<html", "a web page", _DOWNLOAD),
)


# Bytes and text


@contextmanager
def open_bytes(path: Path, on_bytes: OnBytes | None = None, line: Callable[[], int] = lambda: 1) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed where they are compressed, in bounded memory.

    Args:
        line: The line that is being read, for the error of a compressed file that is damaged there.

    Raises:
        UserError: for a kind of file that holds no rows as text, naming it, and for a compressed file that is damaged.
    """
    with ExitStack() as opened:
        file: Any = opened.enter_context(io.BufferedReader(_CountedFile(path, on_bytes), _CHUNK))
        start = file.peek(4)
        damage: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
        if start.startswith(_GZIP):
            file = opened.enter_context(gzip.GzipFile(fileobj=file))
        elif start.startswith(_ZSTD):
            zstd = _zstd(path)
            # It refuses a frame that asks for more than 128 MiB to be decompressed in.
            file, damage = opened.enter_context(zstd.ZstdFile(file)), (EOFError, zstd.ZstdError)
        try:
            refuse_other_kinds(file.peek(64), path)
            yield file
        except damage as error:
            what, hint = f"the compressed file is damaged here: {error}", "fetch or compress the file anew"
            raise UserError(what, where=f"{path}:{line()}", hint=hint) from error


def refuse_other_kinds(start: bytes, path: Path) -> None:
    """Raise `UserError` where a file's first bytes show that it is of a kind that holds no rows as text."""
    head = start[:64].lower()
    for magic, name, hint in _NOT_TEXT:
        if head.startswith(magic.lower()):
            raise UserError(f"this is {name}", where=str(path), hint=hint)
    if b"\x00" in start[:2] and start[:2] != b"\x00\x00":  # ASCII in two bytes a character
        raise UserError("this is UTF-16 text, not UTF-8", where=str(path), hint=_AS_UTF_8)


class _CountedFile(io.FileIO):
    """A file that tells how far it has been read."""

    def __init__(self, path: Path, on_bytes: OnBytes | None) -> None:
        super().__init__(path)
        self._on_bytes = on_bytes

    def readinto(self, buffer: Any, /) -> int:
        count = super().readinto(buffer) or 0
        if self._on_bytes:
            self._on_bytes(self.tell())
        return count


def _zstd(path: Path) -> Any:
    """The module that reads zstd: Python's own, or the same for Pythons before 3.14."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise UserError("reading zstd needs the package `backports.zstd`", where=str(path), hint=INSTALL_HINT) from None
    return zstd


def text_lines(path: Path, on_bytes: OnBytes | None) -> Iterator[tuple[str, str | UserError]]:
    """Lines with their ends, each with its place, `chats.jsonl:17`; one that is not UTF-8, or too long, is its error."""
    number = 0
    with open_bytes(path, on_bytes, lambda: number + 1) as file:
        while line := file.readline(LONGEST_ROW):
            number += 1
            place = f"{path}:{number}"
            if len(line) == LONGEST_ROW and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = file.readline(_CHUNK)
                hint = "a row is one conversation or document; split it, or check that its line breaks are there"
                yield place, UserError(f"a line of more than {LONGEST_ROW >> 20} MiB", where=place, hint=hint)
                continue
            try:
                yield place, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                column = len(error.object[: error.start].decode("utf-8")) + 1
                yield place, _not_utf_8(error, f" in column {column}", place)


def text_chunks(path: Path, on_bytes: OnBytes | None) -> Iterator[str]:
    """The text in pieces, which may end anywhere."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    line = 1
    with open_bytes(path, on_bytes, lambda: line) as file:
        try:
            while data := file.read(_CHUNK):
                yield decode(data)
                line += data.count(b"\n")
            decode(b"", True)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            raise _not_utf_8(error, "", f"{path}:{line}") from None


def _not_utf_8(error: UnicodeDecodeError, column: str, place: str) -> UserError:
    what = f"not UTF-8 text: byte 0x{error.object[error.start]:02x}{column}"
    return UserError(what, where=place, hint="save the file as UTF-8")


# Rows

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
