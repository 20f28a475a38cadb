"""A chat template, watched while it writes: which message is each character of its output from?

Knows the marker characters that an instrumented template leaves; knows nothing of turns, roles or tokens.

    {% for message in messages %}           <M0>             <M1>                        <end>
      <|im_start|>role                  →   <|im_start|>user <|im_start|>assistant
      content<|im_end|>                     hello<|im_end|>  hi there<|im_end|>
    {% endfor %}

A character belongs to the innermost loop item that is, by identity, a message. Nothing is printed where the owner does
not change, so that loops over tool calls or text parts leave no trace.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.mask import traced_template as instrument
from mlx_sft.data.mask.assistant_spans import NOBODY, Integers, Span

_PRIVATE_PLANES = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


@dataclass(frozen=True, slots=True)
class Watched:
    """A text without its markers, the owner of each of its characters, and the spans that generation tags enclose."""

    text: str
    owners: Integers
    tags: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class Alphabet:
    """Private-use characters that a text does not hold: markers from `base` on, then a colour for each message."""

    base: int
    messages: int

    @classmethod
    def absent_from(cls, text: str, messages: int) -> Alphabet | None:
        """An alphabet for so many messages, or None where the text leaves no room for one."""
        lowest = chr(_PRIVATE_PLANES[0].start)
        taken = {ord(character) for character in set(text) if character >= lowest}
        size = 2 * messages + _OTHER_MARKERS
        for plane in _PRIVATE_PLANES:
            for base in range(plane.start, plane.stop - size, size):
                if taken.isdisjoint(range(base, base + size)):
                    return cls(base, messages)
        return None

    def marker(self, index: int) -> str:
        """Says: from here on message `index` writes (or `NOBODY`)."""
        return chr(self.base + index + 1)

    @property
    def tag_starts(self) -> str:
        return self.marker(self.messages)

    @property
    def tag_ends(self) -> str:
        return self.marker(self.messages + 1)

    def colour(self, index: int) -> str:
        """Stands for a letter of message `index`."""
        return chr(self.base + _OTHER_MARKERS + self.messages + index)

    def colours(self, code_points: NDArray[np.uint32]) -> Integers:
        """The message that each character is a colour of, `NOBODY` for other characters."""
        index = code_points.astype(np.int64) - ord(self.colour(0))
        return np.where((index >= 0) & (index < self.messages), index, NOBODY).astype(np.int32)

    def markers(self) -> re.Pattern[str]:
        """Splits a text at its markers, and keeps them."""
        return re.compile(f"([{chr(self.base)}-{self.tag_ends}])")

    def read(self, marked: str) -> Watched:
        """What the markers in a text say."""
        pieces = self.markers().split(marked)
        owners, lengths, position = [NOBODY], [len(pieces[0])], len(pieces[0])
        tags: list[Span] = []
        open_tags: list[int] = []
        for marker, text in zip(pieces[1::2], pieces[2::2], strict=True):
            index = ord(marker) - self.base - 1
            if marker == self.tag_starts:
                open_tags.append(position)
            elif marker == self.tag_ends:
                tags += [(open_tags.pop(), position)] if open_tags else []
            owners.append(index if index < self.messages else owners[-1])
            lengths.append(len(text))
            position += len(text)
        return Watched("".join(pieces[::2]), np.repeat(np.array(owners, np.int32), lengths), tuple(tags))


_OTHER_MARKERS = 3  # nobody's, and the two of tags


class Watch:
    """One rendering's inserted calls; they print a marker where the message that is being written changes.

    Args:
        messages: The very objects that the template is given.
        alphabet: Supplies the markers.
    """

    def __init__(self, messages: list[dict[str, Any]], alphabet: Alphabet) -> None:
        self._messages = len(messages)
        self._indices = {id(message): index for index, message in enumerate(messages)}
        self._made: list[Any] = []  # kept, so that no other object gets the same id
        self._alphabet = alphabet
        self._markers = alphabet.markers()
        self._current = NOBODY
        self._outer: list[int] = []

    def functions(self) -> dict[str, Callable[..., Any]]:
        """The variables that an instrumented template needs."""
        return {
            instrument.LOOP_STARTS: self._loop_starts,
            instrument.LOOP_ITEM: self._loop_item,
            instrument.RANGE_ITEM: self._range_item,
            instrument.LOOP_ENDS: self._loop_ends,
            instrument.ASSIGNED: self._assigned,
            instrument.TAG_STARTS: lambda: self._alphabet.tag_starts,
            instrument.TAG_ENDS: lambda: self._alphabet.tag_ends,
            instrument.APPENDED: self._appended,
            instrument.PRINTED: self._printed,
            instrument.MADE: self._make,
            instrument.STRIPPED: self._stripped,
        }

    def _loop_starts(self) -> str:
        self._outer.append(self._current)
        return ""

    def _loop_item(self, *targets: Any) -> str:
        """An item that is no message is part of what surrounds the loop."""
        found = (self._indices[id(target)] for target in targets if id(target) in self._indices)
        return self._write(next(found, self._outer[-1]))

    def _range_item(self, *targets: Any) -> str:
        """A number may be a message's; whether it is, the colours show."""
        number = targets[0] if targets else None
        is_index = isinstance(number, int) and self._outer[-1] == NOBODY and 0 <= number < self._messages
        return self._write(number if isinstance(number, int) and is_index else self._outer[-1])

    def _loop_ends(self) -> str:
        return self._write(self._outer.pop())

    def _assigned(self, value: Any) -> str:
        return self._write(self._indices.get(id(value), self._current))

    def _appended(self, old: Any, new: Any) -> Any:
        """`old + new`, where what is new is marked as written by the present message."""
        if isinstance(old, str) and isinstance(new, str):
            return old + self._marked(new)
        if isinstance(old, list) and isinstance(new, list):
            return old + [self._marked(item) if isinstance(item, str) else item for item in new]
        return old + new

    def _marked(self, text: str) -> str:
        return self._alphabet.marker(self._current) + text if text else text

    def _printed(self, value: Any) -> Any:
        """What holds markers of its own is followed by one that says who goes on."""
        if isinstance(value, str) and self._markers.search(value):
            return value + self._alphabet.marker(self._current)
        return value

    def _make(self, value: Any) -> Any:
        """An object that is made where a message is being written stands for that message."""
        if self._current != NOBODY:
            self._made.append(value)
            self._indices[id(value)] = self._current
        return value

    def _stripped(self, value: Any, method: str, *characters: Any) -> Any:
        """`value.strip(*characters)`, to which markers are no obstacle."""
        if not isinstance(value, str) or not self._markers.search(value):
            return getattr(str(value), method)(*characters)
        pieces = self._markers.split(value)
        texts = range(0, len(pieces), 2)
        sides = {"strip": ("lstrip", "rstrip")}.get(method, (method,))
        for side in sides:
            for index in texts if side == "lstrip" else reversed(texts):
                pieces[index] = getattr(pieces[index], side)(*characters)
                if pieces[index]:
                    break
        return "".join(pieces)

    def _write(self, index: int) -> str:
        if index == self._current:
            return ""
        self._current = index
        return self._alphabet.marker(index)
