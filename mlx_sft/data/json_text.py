"""JSON text → values, strictly: what a lenient parser passes over without a word (NaN, a key given twice) is an error here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

DEEPEST = 200
"""Levels of lists and objects in one another; what comes after reading (templates, pickling) recurses too."""
LONGEST_ROW = 16 << 20
"""Bytes or characters of one row as it is written, with JSON's escapes (six bytes for a Chinese character). What of it is tokenized may
have 4 MiB, which `encode` says."""

_TOO_LONG = f"a row of more than {LONGEST_ROW >> 20} million characters"
_SPACE = re.compile(r"[ \t\r\n]*")
_LONGEST_LITERAL = len("-Infinity") + 2


class BrokenJsonError(ValueError):
    """Text that is not JSON, so that what follows cannot be told apart.

    Args:
        line: Of the text, from 1.
    """

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


class NotRowsError(ValueError):
    """JSON that is neither a list nor an object with one under `data`."""


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: for what is not JSON (its message has the column), NaN, Infinity, a key that is given twice in one
            object, numbers beyond all measure, and nesting deeper than `DEEPEST`.
    """
    try:
        value, end = _decoded(text, _after_space(text, 0))
        end = _after_space(text, end)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        line = f" of line {error.lineno}" if error.lineno > 1 else ""
        raise ValueError(f"{_reason(error)} in column {error.colno}{line}") from None
    if isinstance(value, ValueError):
        raise value
    return value


def list_elements(chunks: Iterator[str]) -> Iterator[Any | ValueError]:
    """The elements of a JSON list, or of the list under `data` in an object, read as they come.

    Args:
        chunks: The text in pieces, which may end anywhere.

    Yields:
        The elements, none of a blank text. For one that `parse_json` would not accept, though it can be seen where it ends,
        the `ValueError`.

    Raises:
        BrokenJsonError: where the text stops being JSON.
        NotRowsError: where it is something else than a list or an object with one.
    """
    text = _Text(chunks)
    first = text.peek()
    if first == "[":
        yield from text.elements()
    elif first == "{":
        yield from _under_data(text)
    elif first:
        raise NotRowsError
    if text.peek():
        raise text.broken("Extra data")


def first_value(chunks: Iterator[str]) -> tuple[Any | ValueError, bool]:
    """The first value in a text, and whether anything stands behind it.

    Args:
        chunks: The text in pieces, which may end anywhere; nothing is read behind the first value.

    Raises:
        BrokenJsonError: where it is not JSON.
    """
    text = _Text(chunks)
    value = text.value()
    return value, bool(text.peek())


def _under_data(text: _Text) -> Iterator[Any | ValueError]:
    found = False
    for _ in text.separated("{", "}"):
        if text.peek() != '"':
            raise text.broken("Expecting property name enclosed in double quotes")
        key = text.value()
        text.expect(":")
        if key != "data":
            text.value()
        elif found:
            raise text.broken('the key "data" twice in one object')
        elif text.peek() != "[":
            raise NotRowsError
        else:
            found = True
            yield from text.elements()
    if not found:
        raise NotRowsError


class _Text:
    """Text that comes in pieces, of which only what is not yet read is kept, and a place in it."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks = filter(None, chunks)
        self._buffer, self._place = "", 0
        self._line, self._column = 1, 1  # of the buffer's first character

    def peek(self) -> str:
        """The next character that is not white space, or nothing at the end."""
        while True:
            self._place = _after_space(self._buffer, self._place)
            if self._place < len(self._buffer) or not self._more():
                return self._buffer[self._place : self._place + 1]

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise self.broken(f"Expecting '{character}' delimiter")
        self._place += 1

    def separated(self, opening: str, closing: str) -> Iterator[None]:
        """Stand before each of the things between two brackets, which the caller reads."""
        self.expect(opening)
        if self.peek() != closing:
            yield
            while self.peek() != closing:
                self.expect(",")
                yield
        self.expect(closing)

    def elements(self) -> Iterator[Any | ValueError]:
        for _ in self.separated("[", "]"):
            yield self.value()

    def value(self) -> Any | ValueError:
        self.peek()
        while True:
            try:
                value, end = _decoded(self._buffer, self._place)
            except json.JSONDecodeError as error:
                # What is cut off fails at its end; a string, where it begins.
                cut_off = error.msg.startswith("Unterminated") or error.pos > len(self._buffer) - _LONGEST_LITERAL
                if cut_off and len(self._buffer) - self._place > LONGEST_ROW:
                    raise self.broken(_TOO_LONG) from None
                if not (cut_off and self._more()):
                    raise self.broken(_reason(error), error.pos) from None
                continue
            # A number may go on in the next piece, from `1` or the 1 of `1e+`.
            if end + 2 < len(self._buffer) or not self._more():
                length, self._place = end - self._place, end
                return value if length <= LONGEST_ROW else ValueError(_TOO_LONG)

    def broken(self, reason: str, place: int | None = None) -> BrokenJsonError:
        line, column = self._line_and_column(self._place if place is None else place)
        return BrokenJsonError(f"{reason} in column {column}", line)

    def _more(self) -> bool:
        """Read on, and leave out what has been read; False at the end."""
        chunk = next(self._chunks, "")
        if chunk:
            self._line, self._column = self._line_and_column(self._place)
            self._buffer, self._place = self._buffer[self._place :] + chunk, 0
        return bool(chunk)

    def _line_and_column(self, place: int) -> tuple[int, int]:
        newlines = self._buffer.count("\n", 0, place)
        if not newlines:
            return self._line, self._column + place
        return self._line + newlines, place - self._buffer.rfind("\n", 0, place)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {json.dumps(twice[:60])} twice in one object")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _finite(digits: str) -> float:
    """The number of this JSON; Python takes `1e999` for infinity, which nothing can write as JSON again."""
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:60]} is a number too large to hold")
    return number


_STRICT = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite)
_LENIENT = json.JSONDecoder(parse_int=str)
"""It finds where a value ends that the strict one does not accept."""


def _decoded(text: str, place: int) -> tuple[Any | ValueError, int]:
    """The value at a place and where it ends; its error where it is JSON only to a lenient parser."""
    try:
        try:
            value, end = _STRICT.raw_decode(text, place)
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            too_long = str(error).startswith("Exceeds the limit")
            value = ValueError("a number of more than 4300 digits") if too_long else error
            _, end = _LENIENT.raw_decode(text, place)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, place) from None
    brackets = text.count("[", place, end) + text.count("{", place, end)
    return ValueError("nested too deeply") if brackets > DEEPEST and _is_too_deep(value) else value, end


def _after_space(text: str, place: int) -> int:
    space = _SPACE.match(text, place)
    return space.end() if space else place


def _reason(error: json.JSONDecodeError) -> str:
    """What is wrong; some of Python's messages end in `at`, for a place to be put behind them."""
    return error.msg.removesuffix(" at")


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        nested = [one for one in level if isinstance(one, dict | list)]
        level = [child for one in nested for child in (one.values() if isinstance(one, dict) else one)]
    return any(isinstance(one, dict | list) for one in level)


_KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string"}
_KINDS |= {list: "a list", dict: "an object"}


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    return _KINDS.get(type(value), f"a {type(value).__name__}")


def strings_in(value: Any) -> Iterator[str]:
    """Every string in a JSON value, the keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)


def is_blank(value: Any) -> bool:
    """Whether it is null, blank text, or empty: a table's cell that has to hold something, or arguments that were not found."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | dict) and not value)


_PRINTED = re.compile(r"\s*(?:array\()?[\[({][\s\[({]*'")
"""How Python, and pandas where it saves a column of lists as .csv, begins what it prints of them."""


def parsed(value: Any, name: str) -> Any:
    """A structured field, which tables (.csv, .parquet) may hold as JSON text, once or more times encoded; blank text is none.

    Raises:
        ValueError: for text that is not JSON, or JSON of mere words.
    """
    while isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = parse_json(value)
        except ValueError as error:
            if _PRINTED.match(value):
                what = f"{name} is written as Python prints a list or dict, with single quotes, and not as JSON"
                raise ValueError(f"{what}: write the column with json.dumps") from None
            raise ValueError(f"{name} is neither a list or object nor JSON text of one ({error})") from None
    return value
