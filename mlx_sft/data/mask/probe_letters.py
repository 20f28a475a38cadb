"""Probe letters: every letter of a message is replaced by one by which the message is known where a template writes it.

message             {"role": "user", "content": "Hi, you"}
private letters     {"role": "user", "content": "⬤⬤, ⬤⬤⬤"}          one private-use character a message
ASCII letters       {"role": "user", "content": "Bb, bbb"}           for templates that depend on letters: twice, in
                    {"role": "user", "content": "Oo, ooo"}           different ones; what changes is the message's
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.mask.trace import PrivateCharacters
from mlx_sft.data.mask.traced_rendering import NOBODY, Integers, Messages, called_functions
from mlx_sft.data.messages import REASONING_KEYS

REPLACED_KEYS = frozenset({"content", "text", "arguments", *REASONING_KEYS})
"""The parts of a message whose letters are its own words; the others (role, names, ids) steer the template."""

_LETTER = re.compile(r"[^\W_]")
_ASCII_LETTER, _CAPITAL, _SMALL = re.compile("[A-Za-z]"), re.compile("[A-Z]"), re.compile("[a-z]")
_LETTERS = 26
_SHIFT = 13
"""How far the letters of the second rendering are from those of the first."""


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


@dataclass(frozen=True, slots=True)
class PrivateProbeLetters:
    """One private-use character a message, which replaces all its letters.

    Args:
        characters: Supplies the letters.
        constants: The strings that the template's code holds, which are kept, so that it finds in a message what it
            looks for (`</think>`).
    """

    characters: PrivateCharacters
    constants: Constants

    def replace_in(self, messages: Messages) -> list[Messages]:
        """The messages with probe letters, once for each rendering that is needed; every text keeps its length."""

        def probed(message: dict[str, Any], letter: str) -> Any:
            return _replaced(message, self.constants, lambda piece: _LETTER.sub(letter, piece))

        return [[probed(message, self.characters.probe_letter(index)) for index, message in enumerate(messages)]]

    def find(self, renderings: Sequence[str], text: str, char_to_message: Integers) -> Integers | None:
        """The message whose letter each character of the text is, `NOBODY` where it is none's.

        Args:
            renderings: What the template wrote of the messages with probe letters.
            text: What it writes of the messages as they are.
            char_to_message: The message that each character was written for: where a letter may stand for several
                messages, it is taken for this one's.

        Returns:
            Shape (characters,); None where the texts differ in anything but probe letters.
        """
        written, plain = _code_points(renderings[0]), _code_points(text)
        letters = self.characters.messages_of_letters(written)
        if len(written) != len(plain) or ((written != plain) & (letters == NOBODY)).any():
            return None
        return letters

    def count(self, probed: str, index: int) -> int:
        """How many probe letters are in a text of message `index`, as it is first rendered."""
        return probed.count(self.characters.probe_letter(index))


@dataclass(frozen=True, slots=True)
class AsciiProbeLetters:
    """A Latin letter a message, another one in a second rendering: only ASCII letters are replaced, in their case, so that
    what escapes, measures or asks for letters writes as much as before. Every 26th message has the same letter."""

    constants: Constants

    def replace_in(self, messages: Messages) -> list[Messages]:
        def probed(message: dict[str, Any], letter: int) -> Any:
            capital, small = chr(ord("A") + letter % _LETTERS), chr(ord("a") + letter % _LETTERS)
            return _replaced(message, self.constants, lambda piece: _SMALL.sub(small, _CAPITAL.sub(capital, piece)))

        return [[probed(message, index + shift) for index, message in enumerate(messages)] for shift in (0, _SHIFT)]

    def find(self, renderings: Sequence[str], text: str, char_to_message: Integers) -> Integers | None:
        first, second, plain = (_code_points(part) for part in (*renderings, text))
        if not len(first) == len(second) == len(plain) == len(char_to_message):
            return None
        letter, shifted, own = (_letter_numbers(part) for part in (first, second, plain))
        changed = first != second
        known = changed & (own >= 0) & (letter >= 0) & (shifted == (letter + _SHIFT) % _LETTERS)
        if ((changed & ~known) | (~changed & (first != plain))).any():
            return None
        nearest = char_to_message - (char_to_message - letter) % _LETTERS
        return np.where(known, np.where(nearest < 0, nearest + _LETTERS, nearest), NOBODY).astype(np.int32)

    def count(self, probed: str, index: int) -> int:
        return sum(len(_ASCII_LETTER.findall(piece)) for piece in self.constants.split(probed)[::2])


ProbeLetters = PrivateProbeLetters | AsciiProbeLetters


def count_letters(message: dict[str, Any], index: int, letters: ProbeLetters) -> int:
    """How many probe letters of a message are to be written: in its content, its reasoning, and its calls' arguments."""
    content = message.get("content")
    parts = [part.get("text") for part in content if isinstance(part, dict)] if isinstance(content, list) else [content]
    # The reasoning is in the message under several names, and is to be written once.
    reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
    arguments = [function.get("arguments") for function in called_functions(message)]
    return sum(_count(part, index, letters) for part in (*parts, reasoning, *arguments))


def _replaced(value: Any, constants: Constants, replace: Callable[[str], str], words: bool = False) -> Any:
    """A copy of a message with other letters in its own words, except in the constants that they hold."""
    if isinstance(value, dict):
        return {key: _replaced(item, constants, replace, words or key in REPLACED_KEYS) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, constants, replace, words) for item in value]
    if not words or not isinstance(value, str):
        return value
    pieces = constants.split(value)
    pieces[::2] = [replace(piece) for piece in pieces[::2]]
    return "".join(pieces)


def _count(value: Any, index: int, letters: ProbeLetters) -> int:
    if isinstance(value, dict):
        return sum(_count(item, index, letters) for item in value.values())
    if isinstance(value, list):
        return sum(_count(item, index, letters) for item in value)
    return letters.count(value, index) if isinstance(value, str) else 0


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _letter_numbers(code_points: NDArray[np.uint32]) -> NDArray[np.int64]:
    """0 to 25 for A to Z and a to z, -1 for other characters."""
    numbers = (code_points | 0x20).astype(np.int64) - ord("a")
    return np.where((numbers >= 0) & (numbers < _LETTERS), numbers, -1)
