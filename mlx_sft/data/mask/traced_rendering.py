"""A conversation as its chat template wrote it, with the message that each character was written for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOBODY = -1
"""Stands for the message of a character that the template wrote for none."""

Integers = NDArray[np.int32]
Messages = list[dict[str, Any]]
Span = tuple[int, int]
"""Characters `text[first:last]`."""


class Refusal(Exception):
    """Why it is not understood how a template writes a conversation; a person sees it inside a `UserError`."""


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

    def check(self) -> None:
        """Raise `Refusal` where an assistant's letters stand outside its turn, or another's inside it."""
        is_assistant = np.zeros(len(self.messages) + 1, bool)  # the last for NOBODY
        is_assistant[assistant_messages(self.messages)] = True
        writers, letters = self.char_to_message, self.letter_to_message
        misplaced = (is_assistant[letters] | is_assistant[writers]) & (writers != letters) & (letters != NOBODY)
        if misplaced.any():
            index = int(letters[np.argmax(misplaced)])
            raise Refusal(f"words of message {index + 1} stand where another message is written")

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


def assistant_messages(messages: Iterable[dict[str, Any]]) -> list[int]:
    """The indices of the assistants' messages."""
    return [index for index, message in enumerate(messages) if message.get("role") == "assistant"]


def called_functions(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The functions of a message's tool calls, in either of the forms that templates take."""
    calls = message.get("tool_calls")
    calls = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    functions = [call.get("function", call) for call in calls]
    return [function for function in functions if isinstance(function, dict)]
