"""A file's bytes → its text, in numbered lines or in pieces.

Knows the encoding, and where in the text something is wrong; knows nothing of compressions (`streams`) or of what the text holds.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from mlx_sft.data.json_text import LONGEST_ROW
from mlx_sft.data.streams import DamagedError, OnBytes, open_bytes
from mlx_sft.errors import UserError

_DAMAGED_HINT = "fetch or compress the file anew"
_CHUNK = 1 << 20


def text_lines(path: Path, on_bytes: OnBytes | None) -> Iterator[tuple[int, str | UserError]]:
    """Numbered lines with their ends; a line that is not UTF-8, or too long, is its error. A byte order mark is left out."""
    number = 0
    try:
        with open_bytes(path, on_bytes) as file:
            while line := file.readline(LONGEST_ROW):
                number += 1
                if len(line) == LONGEST_ROW and not line.endswith(b"\n"):
                    while line and not line.endswith(b"\n"):
                        line = file.readline(_CHUNK)
                    yield number, _too_long(f"{path}:{number}")
                else:
                    yield number, _decoded(line, number == 1, f"{path}:{number}")
    except DamagedError as error:
        raise _damaged(error, f"{path}:{number + 1}") from error


def _decoded(line: bytes, is_first: bool, origin: str) -> str | UserError:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(line[: error.start].decode("utf-8").removeprefix("\ufeff")) + 1
        return _not_utf_8(line[error.start], column, origin)
    return text.removeprefix("\ufeff") if is_first else text


def _too_long(origin: str) -> UserError:
    hint = "a row is one conversation or document; split it, or check that its line breaks are there"
    return UserError(f"a line of more than {LONGEST_ROW >> 20} MiB", where=origin, hint=hint)


def _not_utf_8(byte: int, column: int, origin: str) -> UserError:
    return UserError(
        f"not UTF-8 text: byte 0x{byte:02x} in column {column}", where=origin, hint="save the file as UTF-8"
    )


def _damaged(error: DamagedError, origin: str) -> UserError:
    return UserError(f"the compressed file is damaged here: {error}", where=origin, hint=_DAMAGED_HINT)


def text_chunks(path: Path, on_bytes: OnBytes | None) -> Iterator[str]:
    """The text in pieces. A byte order mark is left out."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    line, column = 1, 1
    try:
        with open_bytes(path, on_bytes) as file:
            while data := file.read(_CHUNK):
                text = decode(data)
                text = text.removeprefix("\ufeff") if (line, column) == (1, 1) else text
                line, column = _moved(line, column, text)
                yield text
            decode(b"", True)
    except DamagedError as error:
        raise _damaged(error, f"{path}:{line}") from error
    except UnicodeDecodeError as error:
        line, column = _moved(line, column, error.object[: error.start].decode("utf-8"))
        raise _not_utf_8(error.object[error.start], column, f"{path}:{line}") from None


def _moved(line: int, column: int, text: str) -> tuple[int, int]:
    newlines = text.count("\n")
    return line + newlines, len(text) - text.rfind("\n") if newlines else column + len(text)


def first_character(path: Path) -> str:
    """The first that is not white space, where it is near the beginning."""
    try:
        with open_bytes(path) as file:
            return file.peek(1).removeprefix(codecs.BOM_UTF8).lstrip()[:1].decode("latin-1")
    except DamagedError:
        return ""


def first_lines(path: Path) -> tuple[str, str]:
    """The first two lines that are not blank, without white space around them; one that cannot be read counts as text."""
    lines = ("unreadable" if isinstance(line, UserError) else line.strip() for _, line in text_lines(path, None))
    first, second = islice([*islice(filter(None, lines), 2), "", ""], 2)
    return first, second
