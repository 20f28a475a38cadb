"""Letters by which a message is known where a template writes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mlx_sft.data.mask import probes
from mlx_sft.data.mask.probes import AsciiProbeLetters, Constants, PrivateProbeLetters, count_letters
from mlx_sft.data.mask.trace import NOBODY, PrivateCharacters
from tests.data.mask.pictures import (
    MakeTokenizer,
    assistant,
    refusal,
    shown,
    user,
)
from tests.data.mask.templates import (
    END,
    LOOP,
    PROMPT,
    TURN,
)

pytestmark = pytest.mark.fast


def test_private_use_characters_in_the_content_do_no_harm(tokenizer: PreTrainedTokenizerFast) -> None:
    icons = "\U000f0000 \U000f0001 \U000f0009 \U00100000 \U0010fffd"
    assert shown(tokenizer, user(icons), assistant(f"{icons}b")).endswith(f"⟦{icons}b<|im_end|>⟧\n")


@pytest.mark.parametrize("filter_", ["tojson(ensure_ascii=true)", "urlencode", "upper"])
def test_text_that_depends_on_letters_is_probed_with_ascii_letters(make_tokenizer: MakeTokenizer, filter_: str) -> None:
    tokenizer = make_tokenizer(
        LOOP + TURN.replace("message['content']", f"(message.content | {filter_})") + END + PROMPT
    )
    turns = [message for _ in range(15) for message in (user("Né? yes"), assistant("Héllo, You"))]
    text = shown(tokenizer, *turns)
    said = {"upper": "HÉLLO, YOU", "urlencode": "H%C3%A9llo%2C%20You"}.get(filter_, '"H\\u00e9llo, You"')
    assert text.count(f"<|im_start|>assistant\n⟦{said}<|im_end|>⟧\n") == 15
    assert text.count("⟦") == 15


MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Hi"},
    {"role": "user", "content": "Hi, you"},
    {
        "role": "assistant",
        "name": "Ann",
        "content": [{"type": "text", "text": "Né 4_x"}],
        "reasoning_content": "</think>ok",
    },
]


def letters(*constants: str) -> tuple[PrivateCharacters, PrivateProbeLetters, AsciiProbeLetters]:
    characters = PrivateCharacters.absent_from("", 40)
    assert characters is not None
    return (
        characters,
        PrivateProbeLetters(characters, Constants(constants)),
        AsciiProbeLetters(Constants(constants)),
    )


def test_the_pictures_are_what_happens() -> None:
    characters, private, ascii_letters = letters()
    drawn = [
        line.split('"content": "')[1].split('"}')[0]
        for line in (probes.__doc__ or "").splitlines()
        if '"content"' in line
    ]
    ((_, hidden, _),) = private.replace_in(MESSAGES)
    written = [MESSAGES[1]["content"], hidden["content"].replace(characters.probe_letter(1), "⬤")]
    written += [messages[1]["content"] for messages in ascii_letters.replace_in(MESSAGES)]
    assert written == drawn


def test_only_a_messages_own_words_are_replaced_and_no_constant() -> None:
    characters, private, _ = letters("</think>", "text")
    letter = characters.probe_letter(2)
    assert private.replace_in(MESSAGES)[0][2] == {
        "role": "assistant",
        "name": "Ann",
        "content": [{"type": "text", "text": f"{letter}{letter} {letter}_{letter}"}],
        "reasoning_content": f"</think>{letter}{letter}",
    }


@pytest.mark.parametrize(
    ("constants", "pieces"),
    [
        (("ab", "bc"), ["x", "abc", "xb"]),
        (("ab", "abc"), ["x", "abc", "xb"]),
        (("b",), ["xa", "b", "cx", "b", ""]),
        (("ab", "cx"), ["x", "abcx", "b"]),
        (("-", " "), ["xabcxb"]),
        ((), ["xabcxb"]),
    ],
)
def test_constants_may_overlap(constants: tuple[str, ...], pieces: list[str]) -> None:
    assert Constants(constants).split("xabcxb") == pieces


def test_letters_are_counted_where_they_are_to_be_written() -> None:
    call = {"function": {"name": "ab", "arguments": {"c": "de", "f": ["g", 1]}}}
    message = {"content": "ab c!", "thinking": "d", "reasoning_content": "d", "tool_calls": [call], "name": "xyz"}
    _, private, ascii_letters = letters()
    ((probed,),) = private.replace_in([message])
    assert count_letters(probed, 0, private) == count_letters(message, 0, ascii_letters) == 7
    parts = {"content": [{"type": "text", "text": "ab"}, {"type": "text", "text": "c"}, "d"]}
    assert count_letters(parts, 0, ascii_letters) == 3


def test_private_letters_are_read_only_where_nothing_else_differs() -> None:
    characters, private, _ = letters()
    nobody = np.full(3, NOBODY, np.int32)
    one, two = characters.probe_letter(0), characters.probe_letter(1)
    assert private.find([f"{one}-{two}"], "a-b", nobody).tolist() == [0, -1, 1]  # type: ignore[union-attr]
    assert private.find([f"{one}_{two}"], "a-b", nobody) is None
    assert private.find([f"{one}-{two}"], "a-bc", nobody) is None


@pytest.mark.parametrize(
    ("first", "second", "text", "expected"),
    [
        ("b-B", "o-O", "x-Y", [1, -1, 27]),
        ("b-b", "o-n", "x-y", None),  # no shift of 13
        ("b-b", "o-o", "x-é", None),  # no ASCII letter
        ("b-1", "o-1", "x-2", None),  # changed, and no letter of the first rendering
        ("b-b", "o-o", "x-", None),
        ("{-b", "o-o", "x-y", None),
        ("z-n", "m-a", "x-y", [25, -1, 39]),
    ],
)
def test_ascii_letters_are_the_messages_nearest_to_the_one_being_written(
    first: str, second: str, text: str, expected: list[int] | None
) -> None:
    _, _, ascii_letters = letters()
    found = ascii_letters.find([first, second], text, np.array([25, 25, 39][: len(first)], np.int32))
    assert (None if found is None else found.tolist()) == expected


def test_a_message_without_letters_is_no_obstacle_to_ascii_letters(make_tokenizer: MakeTokenizer) -> None:
    escaping = make_tokenizer(
        LOOP + TURN.replace("message['content']", "(message.content | tojson(ensure_ascii=true))") + END + PROMPT
    )
    assert shown(escaping, user("?!"), assistant("é yes"), user("..."), assistant("No")) == (
        '<|im_start|>user\n"?!"<|im_end|>\n<|im_start|>assistant\n⟦"\\u00e9 yes"<|im_end|>⟧\n'
        '<|im_start|>user\n"..."<|im_end|>\n<|im_start|>assistant\n⟦"No"<|im_end|>⟧\n'
    )
    error = refusal(escaping, user("Да?"), assistant("Yes"))  # words that no ASCII letter shows
    assert error.what.endswith("its writing depends on the letters of the messages, or on being traced")
