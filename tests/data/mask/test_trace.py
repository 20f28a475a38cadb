from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mlx_sft.data.mask.trace import NOBODY, PrivateCharacters, Trace
from mlx_sft.data.mask.traced_template import VARIANTS, Variant, traced

pytestmark = pytest.mark.fast

MESSAGES: list[dict[str, Any]] = [{"content": "a"}, {"content": "b", "calls": ["x", "y"]}, {"content": "a"}]


def pieces_by_message(template: str, variant: Variant = VARIANTS[0], **variables: Any) -> list[tuple[str, int]]:
    """The text in pieces that were written for one message."""
    characters = PrivateCharacters.absent_from("", len(MESSAGES))
    assert characters is not None
    trace = Trace(MESSAGES, characters)
    marked = traced(template, variant).render(messages=MESSAGES, **variables, **trace.functions())
    read = characters.read(marked)
    pieces: list[tuple[str, int]] = []
    for character, message in zip(read.text, read.char_to_message, strict=True):
        if pieces and pieces[-1][1] == message:
            pieces[-1] = (pieces[-1][0] + character, message)
        else:
            pieces.append((character, int(message)))
    return pieces


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "({% for m in messages %}{{ m.content }},{% endfor %})",
            [("(", -1), ("a,", 0), ("b,", 1), ("a,", 2), (")", -1)],
        ),
        ("{% for m in messages[1:] %}{{ m.content }}{% endfor %}", [("b", 1), ("a", 2)]),
        ("{% for m in messages[::-1] %}{{ m.content }}{% endfor %}", [("a", 2), ("b", 1), ("a", 0)]),
        (
            "{% for m in messages %}{{ m.content }}{% for c in m.calls %}{{ c }}{% endfor %};{% endfor %}",
            [("a;", 0), ("bxy;", 1), ("a;", 2)],
        ),
        (
            "{% for m in messages %}<{% for n in messages %}{{ n.content }}{% endfor %}>{% break %}{% endfor %}.",
            [("<a", 0), ("b", 1), ("a", 2), (">", 0), (".", -1)],
        ),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}.",
            [("b", 1), ("a", 2), (".", -1)],
        ),
        ("{% for c in 'xy' %}{{ c }}{% endfor %}", [("xy", -1)]),
        ("{% for m in [] %}{% else %}none{% endfor %}", [("none", -1)]),
        ("{% for c, m in [('x', messages[1])] %}{{ c }}{{ m.content }}{% endfor %}", [("xb", 1)]),
        (
            "{% set all %}{% for m in messages %}{{ m.content }}{% endfor %}.{% endset %}[{{ all }}]",
            [("[", -1), ("a", 0), ("b", 1), ("a", 2), (".]", -1)],
        ),
    ],
)
def test_characters_belong_to_the_innermost_item_that_is_a_message(
    template: str, expected: list[tuple[str, int]]
) -> None:
    assert pieces_by_message(template) == expected


def by_variables(text: str, expected: list[tuple[str, int]]) -> None:
    assert pieces_by_message(text, variant=Variant(variables=True)) == expected


@pytest.mark.parametrize("sign", ["+", "~"])
def test_text_that_is_written_later_belongs_to_the_message_that_added_it(sign: str) -> None:
    by_variables(
        "{% set ns = namespace(t='(') %}{% for m in messages %}{% set ns.t = ns.t SIGN m.content SIGN ',' %}{% endfor %}"
        "{{ ns.t }})".replace("SIGN", sign),
        [("(", -1), ("a,", 0), ("b,", 1), ("a,", 2), (")", -1)],
    )


@pytest.mark.parametrize("sum_", ["ns.i + 1", "1 + ns.i", "ns.i + 0 + 1"])
def test_numbers_are_added_as_ever(sum_: str) -> None:
    by_variables(
        "{% set ns = namespace(i=0) %}{% for m in messages %}{% set ns.i = SUM %}{{ ns.i }}{% endfor %}".replace(
            "SUM", sum_
        ),
        [("1", 0), ("2", 1), ("3", 2)],
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for i in range(5) %}{{ i }}{% endfor %}", [("0", 0), ("1", 1), ("2", 2), ("34", -1)]),
        ("{% for i in range(-1, 1) %}{{ i }}{% endfor %}", [("-1", -1), ("0", 0)]),
        ("{% for m in messages[1:] %}{% for i in range(2) %}{{ i }}{% endfor %}{% endfor %}", [("01", 1), ("01", 2)]),
    ],
)
def test_a_number_of_a_range_is_that_of_a_message(template: str, expected: list[tuple[str, int]]) -> None:
    by_variables(template, expected)


def test_a_macro_writes_for_the_message_that_it_is_given() -> None:
    by_variables(
        "{% macro say(m, sign) %}{{ m.content + sign }}{% endmacro %}{{ say(messages[1], ',') }}{{ say({'content': ''}, '.') }}",
        [("b,", 1), (".", -1)],
    )


def test_tags_are_read_with_the_inner_ones_first() -> None:
    characters = PrivateCharacters.absent_from("", 1)
    assert characters is not None
    start, end = characters.tag_starts, characters.tag_ends
    read = characters.read(f"{end}{characters.marker(0)}a{start}b{start}c{end}d{end}e")
    assert (read.text, read.tags) == ("abcde", ((2, 3), (1, 4)))
    assert read.char_to_message.tolist() == [0] * 5


def test_private_characters_are_absent_from_the_text() -> None:
    text = "".join(map(chr, range(0xF0000, 0xF0020)))
    characters = PrivateCharacters.absent_from(text, 3)
    assert characters is not None
    kinds: list[Callable[[int], str]] = [characters.marker, characters.probe_letter]
    used = [character(index) for character in kinds for index in range(3)] + [characters.marker(NOBODY)]
    assert len(set(used)) == 7
    assert not set(used) & set(text)


def test_too_many_messages_have_no_private_characters() -> None:
    assert PrivateCharacters.absent_from("", 30_000) is not None
    assert PrivateCharacters.absent_from("", 40_000) is None
