"""Messages in colours: the letters by which each is known where a template writes them, and whether it does.

Knows the keys of a message; knows nothing of templates.

    message       {"role": "user", "content": "Hi, you"}
    as colours    {"role": "user", "content": "⬤⬤, ⬤⬤⬤"}          one private-use character a message
    in phases     {"role": "user", "content": "Bb, bbb"}           where a template depends on letters: twice, in
                  {"role": "user", "content": "Oo, ooo"}           other ones; what changes is the message's
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.formats import REASONING_KEYS
from mlx_sft.data.mask.assistant_spans import NOBODY, Integers, Messages, called_functions
from mlx_sft.data.mask.trace import Alphabet

COLOURED_KEYS = frozenset({"content", "text", "arguments", *REASONING_KEYS})
"""The parts of a message whose letters are its own words; the others (role, names, ids) steer the template."""

_LETTER = re.compile(r"[^\W_]")
_ASCII_LETTER, _CAPITAL, _SMALL = re.compile("[A-Za-z]"), re.compile("[A-Z]"), re.compile("[a-z]")
_LETTERS = 26
_SHIFT = 13
"""How far the second phase's letters are from the first's."""


class Constants:
    """Strings that are kept where a text holds them; they may overlap there."""

    def __init__(self, strings: Iterable[str]) -> None:
        with_letters = sorted({s for s in strings if _LETTER.search(s)}, key=lambda s: (-len(s), s))
        self._pattern = re.compile("|".join(map(re.escape, with_letters)) or "(?!)")

    def split(self, text: str) -> list[str]:
        """The text in pieces, of which every second is kept."""
        bounds = [0]
        found = self._pattern.search(text)
        while found:
            start, end = found.span()
            if len(bounds) > 1 and start <= bounds[-1]:
                bounds[-1] = max(end, bounds[-1])
            else:
                bounds += [start, end]
            found = self._pattern.search(text, start + 1)
        return [text[first:last] for first, last in pairwise([*bounds, len(text)])]


class Colouring(Protocol):
    """A way to colour messages, and to find the colours in what a template writes of them."""

    def paint(self, messages: Messages) -> list[Messages]:
        """The messages in each phase of the colouring; every text keeps its length."""
        ...

    def read(self, written: Sequence[str], text: str, owners: Integers) -> Integers | None:
        """Whose letter each character of the text is, `NOBODY` where it is nobody's.

        Args:
            written: What the template wrote of the messages of each phase.
            text: What it writes of the plain messages.
            owners: Who wrote each character: where a colour may stand for several messages, it is taken for theirs.

        Returns:
            Shape (characters,); None where the texts differ in anything but coloured letters.
        """
        ...

    def count(self, painted: str, index: int) -> int:
        """How many coloured letters are in a text of message `index`, as the first phase paints it."""
        ...


@dataclass(frozen=True, slots=True)
class PrivateColours:
    """One private-use character a message, in which all its letters are painted.

    Args:
        alphabet: Supplies the characters.
        constants: The strings that the template's code holds, which are kept, so that it finds in a message what it
            looks for (`</think>`).
    """

    alphabet: Alphabet
    constants: Constants

    def paint(self, messages: Messages) -> list[Messages]:
        def painted(message: dict[str, Any], colour: str) -> Any:
            return _painted(message, self.constants, lambda piece: _LETTER.sub(colour, piece))

        return [[painted(message, self.alphabet.colour(index)) for index, message in enumerate(messages)]]

    def read(self, written: Sequence[str], text: str, owners: Integers) -> Integers | None:
        characters, plain = _code_points(written[0]), _code_points(text)
        colours = self.alphabet.colours(characters)
        if len(characters) != len(plain) or ((characters != plain) & (colours == NOBODY)).any():
            return None
        return colours

    def count(self, painted: str, index: int) -> int:
        return painted.count(self.alphabet.colour(index))


@dataclass(frozen=True, slots=True)
class AsciiPhases:
    """A Latin letter a message, twice: only ASCII letters are painted, in their case, so that what escapes, measures or
    asks for letters writes as much as before. Every 26th message has the same letter."""

    constants: Constants

    def paint(self, messages: Messages) -> list[Messages]:
        def painted(message: dict[str, Any], letter: int) -> Any:
            capital, small = chr(ord("A") + letter % _LETTERS), chr(ord("a") + letter % _LETTERS)
            return _painted(message, self.constants, lambda piece: _SMALL.sub(small, _CAPITAL.sub(capital, piece)))

        return [[painted(message, index + shift) for index, message in enumerate(messages)] for shift in (0, _SHIFT)]

    def read(self, written: Sequence[str], text: str, owners: Integers) -> Integers | None:
        first, second, plain = (_code_points(part) for part in (*written, text))
        if not len(first) == len(second) == len(plain) == len(owners):
            return None
        letter, shifted, own = (_letter_numbers(part) for part in (first, second, plain))
        changed = first != second
        known = changed & (own >= 0) & (letter >= 0) & (shifted == (letter + _SHIFT) % _LETTERS)
        if ((changed & ~known) | (~changed & (first != plain))).any():
            return None
        nearest = owners - (owners - letter) % _LETTERS
        return np.where(known, np.where(nearest < 0, nearest + _LETTERS, nearest), NOBODY).astype(np.int32)

    def count(self, painted: str, index: int) -> int:
        return sum(len(_ASCII_LETTER.findall(piece)) for piece in self.constants.split(painted)[::2])


def own_letters(message: dict[str, Any], index: int, colouring: Colouring) -> int:
    """How many coloured letters of a painted message there are to write: content, reasoning, and calls' arguments."""
    content = message.get("content")
    parts = [part.get("text") for part in content if isinstance(part, dict)] if isinstance(content, list) else [content]
    # The reasoning is in the message under several names, and is to be written once.
    reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
    arguments = [function.get("arguments") for function in called_functions(message)]
    return sum(_letters(part, index, colouring) for part in (*parts, reasoning, *arguments))


def _painted(value: Any, constants: Constants, paint: Callable[[str], str], words: bool = False) -> Any:
    """A copy of a message whose own words are painted, except the constants in them."""
    if isinstance(value, dict):
        return {key: _painted(item, constants, paint, words or key in COLOURED_KEYS) for key, item in value.items()}
    if isinstance(value, list):
        return [_painted(item, constants, paint, words) for item in value]
    if not words or not isinstance(value, str):
        return value
    pieces = constants.split(value)
    pieces[::2] = [paint(piece) for piece in pieces[::2]]
    return "".join(pieces)


def _letters(value: Any, index: int, colouring: Colouring) -> int:
    if isinstance(value, dict):
        return sum(_letters(item, index, colouring) for item in value.values())
    if isinstance(value, list):
        return sum(_letters(item, index, colouring) for item in value)
    return colouring.count(value, index) if isinstance(value, str) else 0


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _letter_numbers(code_points: NDArray[np.uint32]) -> NDArray[np.int64]:
    """0 to 25 for A to Z and a to z, -1 for other characters."""
    numbers = (code_points | 0x20).astype(np.int64) - ord("a")
    ascii_letter = (numbers >= 0) & (numbers < _LETTERS) & (code_points < 128)
    return np.where(ascii_letter, numbers, -1)
