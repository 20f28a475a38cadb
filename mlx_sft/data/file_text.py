"""A file → its bytes, decompressed, and its text in lines or pieces.

A compression is told by a file's first bytes and not by its name, and kinds of file that hold no rows as text are named.
"""

from __future__ import annotations

import codecs
import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from mlx_sft.data.json_text import LONGEST_ROW
from mlx_sft.errors import UserError

OnBytes = Callable[[int], None]
"""Told how many bytes of a file, as it lies on the disk, have been read."""
COMPRESSIONS = (".gz", ".zst")
"""The suffixes that a compressed file's name has behind that of its format."""
INSTALL_HINT = "install mlx-sft with the readers for it: pip install 'mlx-sft[data]', in a clone '.[data]'; uv tool and pipx likewise"

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_CHUNK = 1 << 20
_NEW_LINES = b"\n" * _CHUNK
_BLANK_LINES = 1 << 12
"""So many in a row come one by one; they are as much as plain text has in one row. The others come together, a thousand times as fast."""

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
    (b"BZh91AY&SY", "a bzip2 archive", _UNPACK),
    (_GZIP, "gzip inside of another compression", _UNPACK),
    (_ZSTD, "zstd inside of another compression", _UNPACK),
    (b"SQLite format 3\x00", "an SQLite database", "export its rows as .jsonl or .csv"),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself", "fetch it: git lfs pull"),
    (b"<!doctype html", "a web page", _DOWNLOAD),
    (b"<html", "a web page", _DOWNLOAD),
)


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
    """Lines with their ends, each with its place, `chats.jsonl:17`; one that is not UTF-8, or too long, is its error.

    Of a long run of blank lines, many come as one text, in the place of the first.
    """
    number = blank = 0
    with open_bytes(path, on_bytes, lambda: number + 1) as file:
        while line := (blank > _BLANK_LINES and _blank_lines(file)) or file.readline(LONGEST_ROW):
            place = f"{path}:{number + 1}"
            number += max(1, line.count(b"\n")) if blank else 1
            blank = blank + 1 if line.isspace() else 0
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


def _blank_lines(file: IO[bytes]) -> bytes:
    """The blank lines that come next, as far as they are read from the disk; nothing where another line comes."""
    ahead: bytes = file.peek(_CHUNK)  # type: ignore[attr-defined]
    if ahead == _NEW_LINES[: len(ahead)]:  # a hundred times as fast as to look at each
        return file.read(len(ahead))
    blank = len(ahead) - len(ahead.lstrip(b" \t\r\n"))
    return file.read(ahead.rfind(b"\n", 0, blank) + 1)


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
    return UserError(what, where=place, hint="save the file as UTF-8, which Excel calls `CSV UTF-8`")
