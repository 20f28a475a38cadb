"""What was seen while a template wrote a conversation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_sft.data.mask.trace import (
    Refusal,
    TracedRendering,
    assistant_messages,
    called_functions,
    places_of,
)
from tests.data.mask.pictures import CALL, assistant, user

pytestmark = pytest.mark.fast


def traced(text: str, messages: str, letters: str, *said: dict[str, Any]) -> TracedRendering:
    """With the message of each character, and of each letter, drawn under the text."""

    def numbers(drawn: str) -> Any:
        return np.array([-1 if digit == "." else int(digit) for digit in drawn], np.int32)

    return TracedRendering(text, numbers(messages), numbers(letters), "", list(said), [1, 1])


TURNS = (user("Hi"), assistant("Yo."))


@pytest.mark.parametrize(
    ("messages", "letters", "misplaced"),
    [
        ("..000111", "...00.11", 0),
        ("..000111", "...0..11", 0),
        ("........", "........", 0),
        ("........", "...00...", 0),  # a user's, where nobody writes
        ("..000111", "...01.11", 2),  # the assistant's in the user's
        ("..000111", "1....11.", 2),  # and where nobody writes
        ("..000111", "...00.01", 1),  # the user's in the assistant's
    ],
)
def test_an_assistants_letters_stand_inside_its_turn_and_no_others(messages: str, letters: str, misplaced: int) -> None:
    rendering = traced("U:Hi A:Y", messages, letters, *TURNS)
    if not misplaced:
        rendering.check([1])
        return
    with pytest.raises(Refusal, match=f"words of message {misplaced} stand where another message is written"):
        rendering.check([1])


@pytest.mark.parametrize(
    ("content", "text", "expected"),
    [
        ("Yo.", "Yo.<end>", "Yo."),
        ("Yo<end>", "Yo<end><end>", "Yo<end>"),
        ("Yo", "Yo<end>", "Yo"),
        ("Yo. ", "Yo.<end>", "Yo"),  # the template wrote something else behind the words
        (None, "Yo<end>", "Yo"),
    ],
)
def test_a_content_ends_with_what_follows_its_last_letter_in_it(content: Any, text: str, expected: str) -> None:
    rendering = traced(text, "0" * len(text), "00" + "." * (len(text) - 2), assistant(content))
    assert text[: rendering.after_words(0, 2, len(text))] == expected


def test_a_content_does_not_end_behind_its_turn() -> None:
    rendering = traced("Yo..", "000.", "00..", assistant("Yo.."))
    assert rendering.after_words(0, 2, 3) == 3


def test_assistants_are_found_by_their_role() -> None:
    assert assistant_messages([user("a"), assistant("b"), {"content": "c"}, assistant("d")]) == [1, 3]


@pytest.mark.parametrize(
    ("calls", "functions"),
    [
        ([CALL], [CALL["function"]]),
        ([CALL["function"], CALL], [CALL["function"], CALL["function"]]),
        (["now", CALL, {"function": "now"}], [CALL["function"]]),
        (None, []),
        ("now", []),
    ],
)
def test_functions_are_found_in_either_form_of_call(calls: Any, functions: list[Any]) -> None:
    assert called_functions({"role": "assistant", "tool_calls": calls}) == functions


def test_the_places_of_all_messages_are_those_of_each() -> None:
    messages = np.array([0, -1, 2, 2, 0, 1, -1, 2], np.int32)
    assert [found.tolist() for found in places_of(messages, 4)] == [
        np.flatnonzero(messages == index).tolist() for index in range(4)
    ]
