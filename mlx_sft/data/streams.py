"""A file → its bytes, decompressed, and where reading stands.

Knows compressions, by a file's first bytes and not by its name, and the kinds of file that hold no rows as text; knows
nothing of lines, encodings or rows.
"""

from __future__ import annotations

import io
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mlx_sft.errors import UserError

OnBytes = Callable[[int], None]
"""Told how many bytes of a file, as it lies on the disk, have been read."""
COMPRESSIONS = (".gz", ".zst")
"""The suffixes that a compressed file's name has behind that of its format."""
INSTALL_HINT = "install the readers for it: pip install 'mlx-sft[data]'"

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BUFFER = 1 << 20
# What so many compressed bytes can grow to at worst (1,000 and 32,000 times) must fit into memory.
_GZIP_CHUNK, _ZSTD_CHUNK = 1 << 14, 1 << 12

_AS_UTF_8 = "save the file as UTF-8, as with: iconv -f UTF-16 -t UTF-8 OLD > NEW"
_UNPACK = "unpack it and give a file from it (.gz and .zst are read as they are)"
_NOT_TEXT: tuple[tuple[bytes, str, str], ...] = (
    (b"\xff\xfe", "UTF-16 text, not UTF-8", _AS_UTF_8),
    (b"\xfe\xff", "UTF-16 text, not UTF-8", _AS_UTF_8),
    (b"PAR1", "a Parquet file", "name it .parquet"),
    (b"ARROW1", "an Arrow file", "save it as .parquet or .jsonl"),
    (b"PK\x03\x04", "a zip archive", _UNPACK),
    (b"\xfd7zXZ\x00", "an xz archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (_GZIP, "gzip inside of another compression", _UNPACK),
    (_ZSTD, "zstd inside of another compression", _UNPACK),
    (b"SQLite format 3\x00", "an SQLite database", "export its rows as .jsonl or .csv"),
    (b"%PDF-", "a PDF document", "give a file of rows"),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file itself", "fetch it: git lfs pull"),
    (b"<!doctype html", "a web page", "download the file itself, not the page that shows it"),
    (b"<html", "a web page", "download the file itself, not the page that shows it"),
)


class DamagedError(Exception):
    """Compressed bytes that cannot be read on; says why."""


class _Decompressor(Protocol):
    """One gzip member or zstd frame."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def open_bytes(path: Path, on_bytes: OnBytes | None = None) -> io.BufferedReader[Any]:
    """A file's bytes, decompressed where they are compressed; `DamagedError` is raised where reading comes to a broken place.

    Raises:
        UserError: for a kind of file that holds no rows as text, naming it.
        OSError: for a file that cannot be opened.
    """
    file: io.BufferedReader[Any] = io.BufferedReader(_Counted(path, on_bytes), _BUFFER)
    try:
        start = file.peek(4)
        if start.startswith(_GZIP):
            member = lambda: zlib.decompressobj(wbits=31)  # noqa: E731
            file = io.BufferedReader(_Decompressed(file, member, zlib.error, _GZIP_CHUNK), _BUFFER)
        elif start.startswith(_ZSTD):
            frame, error = _zstd(path)
            file = io.BufferedReader(_Decompressed(file, frame, error, _ZSTD_CHUNK), _BUFFER)
        refuse_other_kinds(file.peek(64), path)
    except BaseException:
        file.close()
        raise
    return file


def refuse_other_kinds(start: bytes, path: Path) -> None:
    """Raise `UserError` where a file's first bytes show that it is of a kind that holds no rows as text."""
    head = start[:64].lower()
    for magic, name, hint in _NOT_TEXT:
        if head.startswith(magic.lower()):
            raise UserError(f"this is {name}", where=str(path), hint=hint)
    if b"\x00" in start[:2] and start[:2] != b"\x00\x00":  # ASCII in two bytes a character
        raise UserError("this is UTF-16 text, not UTF-8", where=str(path), hint=_AS_UTF_8)


class _Counted(io.RawIOBase):
    """A file that tells how far it has been read."""

    def __init__(self, path: Path, on_bytes: OnBytes | None) -> None:
        self._file = path.open("rb", buffering=0)
        self._on_bytes = on_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        count = self._file.readinto(buffer) or 0
        self._position += count
        if self._on_bytes:
            self._on_bytes(self._position)
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _Decompressed(io.RawIOBase):
    """What is in a gzip or zstd file, of one part or of several one after the other."""

    def __init__(
        self, file: io.BufferedReader[Any], new: Callable[[], _Decompressor], error: type[Exception], chunk: int
    ) -> None:
        self._file, self._new, self._error, self._chunk = file, new, error, chunk
        self._part: _Decompressor | None = None
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            if not self._fill():
                return 0
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _fill(self) -> bool:
        """Decompress some more; False at the end."""
        data = self._compressed or self._file.read(self._chunk)
        self._compressed = b""
        if self._part is None:
            data = data.lstrip(b"\x00") if data else data  # gzip allows padding between its members
            if not data:
                return bool(self._file.peek(1))
            self._part = self._new()
        elif not data:
            raise DamagedError("it ends in the middle: it was cut off")
        try:
            self._ready = memoryview(self._part.decompress(data))
        except self._error as error:
            raise DamagedError(str(error)) from error
        if self._part.eof:
            self._compressed, self._part = self._part.unused_data, None
        return True

    def close(self) -> None:
        self._file.close()
        super().close()


def _zstd(path: Path) -> tuple[Callable[[], _Decompressor], type[Exception]]:
    if sys.version_info >= (3, 14):
        from compression.zstd import ZstdDecompressor, ZstdError

        return ZstdDecompressor, ZstdError
    try:
        import zstandard
    except ImportError:
        raise UserError("reading zstd needs the package `zstandard`", where=str(path), hint=INSTALL_HINT) from None
    return zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
