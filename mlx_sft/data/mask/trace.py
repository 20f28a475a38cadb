"""The calls in a traced template: they print a private marker wherever another message begins to be written.

    {% for message in messages %}           <M0>             <M1>                        <end>
      <|im_start|>role                  →   <|im_start|>user <|im_start|>assistant
      content<|im_end|>                     hello<|im_end|>  hi there<|im_end|>
    {% endfor %}

A character is written for the innermost loop item that is, by identity, a message. Nothing is printed where the message does
not change, so that loops over tool calls or text parts leave no marker.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.mask import traced_template

NOBODY = -1
"""Stands for the message of a character that the template wrote for none."""

Integers = NDArray[np.int32]
Messages = list[dict[str, Any]]
Span = tuple[int, int]
"""Characters `text[first:last]`."""


class Refusal(Exception):
    """Why it is not understood how a template writes a conversation; a person sees it inside a `UserError`.

    Args:
        cause: What the template does.
        hint: A way out that fits the cause, where one is known.
    """

    def __init__(self, cause: str, hint: str = "") -> None:
        super().__init__(cause)
        self.hint = hint


_TEXT_MOVED = "give --train-on every-turn, which trains on each turn as the model writes it; or leave the text out of messages with calls"


@dataclass(frozen=True, slots=True)
class TracedRendering:
    """A rendered conversation, and what was seen while the template wrote it.

    Args:
        text: As the template writes it.
        char_to_message: Shape (characters,): the message that each character was written for, or `NOBODY`.
        letter_to_message: Shape (characters,): the message whose own letter each character is, or `NOBODY`.
        header: The generation prompt that follows the whole conversation, cut at a reasoning opener.
        messages: The messages with probe letters in place of their own.
        letters: How many probe letters each message has to be written.
        tags: The spans that the template's own {% generation %} tags enclose.
    """

    text: str
    char_to_message: Integers
    letter_to_message: Integers
    header: str
    messages: Messages
    letters: list[int]
    tags: tuple[Span, ...] = ()

    def check(self, turns: Sequence[int]) -> None:
        """Raise `Refusal` where letters of one of these messages stand outside its turn, or another's inside it."""
        is_turn = np.zeros(len(self.messages) + 1, bool)  # the last for NOBODY
        is_turn[list(turns)] = True
        writers, letters = self.char_to_message, self.letter_to_message
        misplaced = (is_turn[letters] | is_turn[writers]) & (writers != letters) & (letters != NOBODY)
        if not misplaced.any():
            return
        place = int(np.argmax(misplaced))
        letter, writer = int(letters[place]), int(writers[place])
        if self._is_moved(writer, letter, place):
            cause = f"it moves the text of message {writer + 1} behind the answer to its call, where no model writes it"
            raise Refusal(cause, _TEXT_MOVED)
        raise Refusal(f"words of message {letter + 1} stand where another message is written")

    def _is_moved(self, calling: int, answer: int, place: int) -> bool:
        """Whether the words of a message with calls go on behind the answer of a tool."""
        is_answer = calling != NOBODY and self.messages[answer].get("role") == "tool"
        return (
            is_answer
            and bool(called_functions(self.messages[calling]))
            and bool((self.letter_to_message[place:] == calling).any())
        )

    def after_words(self, index: int, after_letters: int, last: int) -> int:
        """Where the content of a message ends: after what follows its last letter in it, such as `.` or `<|im_end|>`.

        Args:
            index: The message.
            after_letters: Where its last letter in the text ends.
            last: Where its turn ends at the latest.
        """
        content = self.messages[index].get("content")
        if not isinstance(content, str):
            return after_letters
        for end in range(min(last, after_letters + len(content)), after_letters, -1):
            if content.endswith(self.text[after_letters:end]):
                return end
        return after_letters


def places_of(messages: Integers, number: int) -> list[NDArray[np.int64]]:
    """Where each of a number of messages stands in an array of them, in order; found for all at once, as there may be ten thousand."""
    order = np.argsort(messages, kind="stable")
    bounds = np.searchsorted(messages[order], np.arange(number + 1)).tolist()
    return [order[first:last] for first, last in pairwise(bounds)]


def assistant_messages(messages: Iterable[dict[str, Any]]) -> list[int]:
    """The indices of the assistants' messages."""
    return [index for index, message in enumerate(messages) if message.get("role") == "assistant"]


def called_functions(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The functions of a message's tool calls, in either of the forms that templates take."""
    calls = message.get("tool_calls")
    calls = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    functions = [call.get("function", call) for call in calls]
    return [function for function in functions if isinstance(function, dict)]


_PRIVATE_PLANES = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


@dataclass(frozen=True, slots=True)
class TracedText:
    """A text without its markers, the message of each of its characters, and the spans that generation tags enclose."""

    text: str
    char_to_message: Integers
    tags: tuple[Span, ...] = ()


@dataclass(frozen=True, slots=True)
class PrivateCharacters:
    """Private-use characters that a text does not hold: markers from `base` on, then a probe letter for each message."""

    base: int
    messages: int

    @classmethod
    def absent_from(cls, text: str, messages: int) -> PrivateCharacters | None:
        """Characters for this many messages, or None where the text leaves no room for them."""
        lowest = chr(_PRIVATE_PLANES[0].start)
        taken = {ord(character) for character in set(text) if character >= lowest}
        size = 2 * messages + _OTHER_MARKERS
        for plane in _PRIVATE_PLANES:
            for base in range(plane.start, plane.stop - size, size):
                if taken.isdisjoint(range(base, base + size)):
                    return cls(base, messages)
        return None

    def marker(self, index: int) -> str:
        """Says: from here on message `index` is written (or `NOBODY`)."""
        return chr(self.base + index + 1)

    @property
    def tag_starts(self) -> str:
        return self.marker(self.messages)

    @property
    def tag_ends(self) -> str:
        return self.marker(self.messages + 1)

    def probe_letter(self, index: int) -> str:
        """Stands for any letter of message `index`."""
        return chr(self.base + _OTHER_MARKERS + self.messages + index)

    def messages_of_letters(self, code_points: NDArray[np.uint32]) -> Integers:
        """The message that each character is the probe letter of, `NOBODY` for other characters."""
        index = code_points.astype(np.int64) - ord(self.probe_letter(0))
        return np.where((index >= 0) & (index < self.messages), index, NOBODY).astype(np.int32)

    def markers(self) -> re.Pattern[str]:
        """Splits a text at its markers, and keeps them."""
        return re.compile(f"([{chr(self.base)}-{self.tag_ends}])")

    def read(self, marked: str) -> TracedText:
        """What the markers in a text say."""
        pieces = self.markers().split(marked)
        writers, lengths, position = [NOBODY], [len(pieces[0])], len(pieces[0])
        tags: list[Span] = []
        open_tags: list[int] = []
        for marker, text in zip(pieces[1::2], pieces[2::2], strict=True):
            index = ord(marker) - self.base - 1
            if marker == self.tag_starts:
                open_tags.append(position)
            elif marker == self.tag_ends:
                tags += [(open_tags.pop(), position)] if open_tags else []
            writers.append(index if index < self.messages else writers[-1])
            lengths.append(len(text))
            position += len(text)
        return TracedText("".join(pieces[::2]), np.repeat(np.array(writers, np.int32), lengths), tuple(tags))


_OTHER_MARKERS = 3  # nobody's, and the two of tags


class Trace:
    """The inserted calls of one rendering.

    Args:
        messages: The very objects that the template is given.
        characters: Supplies the markers.
    """

    def __init__(self, messages: list[dict[str, Any]], characters: PrivateCharacters) -> None:
        self._messages = len(messages)
        self._indices = {id(message): index for index, message in enumerate(messages)}
        self._characters = characters
        self._markers = characters.markers()
        self._current = NOBODY
        self._outer: list[int] = []

    def functions(self) -> dict[str, Callable[..., Any]]:
        """The variables that a traced template needs."""
        return {
            traced_template.LOOP_STARTS: self._loop_starts,
            traced_template.LOOP_ITEM: self._loop_item,
            traced_template.RANGE_ITEM: self._range_item,
            traced_template.LOOP_ENDS: self._loop_ends,
            traced_template.ASSIGNED: self._assigned,
            traced_template.TAG_STARTS: lambda: self._characters.tag_starts,
            traced_template.TAG_ENDS: lambda: self._characters.tag_ends,
            traced_template.APPENDED: self._appended,
            traced_template.PRINTED: self._printed,
        }

    def _loop_starts(self) -> str:
        self._outer.append(self._current)
        return ""

    def _loop_item(self, *targets: Any) -> str:
        """An item that is no message belongs to what surrounds the loop."""
        found = (self._indices[id(target)] for target in targets if id(target) in self._indices)
        return self._write(next(found, self._outer[-1]))

    def _range_item(self, *targets: Any) -> str:
        """A number may be that of a message; the probe letters show whether it is."""
        number, outer = (targets or (None,))[0], self._outer[-1]
        is_index = isinstance(number, int) and outer == NOBODY and 0 <= number < self._messages
        return self._write(number if is_index else outer)

    def _loop_ends(self) -> str:
        return self._write(self._outer.pop())

    def _assigned(self, value: Any) -> str:
        return self._write(self._indices.get(id(value), self._current))

    def _appended(self, old: Any, new: Any) -> Any:
        """`old + new`, where new text is marked as written for the present message."""
        if isinstance(old, str) and isinstance(new, str) and new:
            return old + self._characters.marker(self._current) + new
        return old + new

    def _printed(self, value: Any) -> Any:
        """What holds markers of its own is followed by one that says which message goes on."""
        if isinstance(value, str) and self._markers.search(value):
            return value + self._characters.marker(self._current)
        return value

    def _write(self, index: int) -> str:
        if index == self._current:
            return ""
        self._current = index
        return self._characters.marker(index)
