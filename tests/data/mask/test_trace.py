from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mlx_sft.data.mask.trace import PrivateCharacters, Trace
from mlx_sft.data.mask.traced_rendering import NOBODY
from mlx_sft.data.mask.traced_template import VARIANTS, Variant, traced

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


def test_assignments_inside_loops_are_followed_where_variables_are_traced() -> None:
    template = "{% for i in [0, 1, 2] %}<{% set m = messages[i] %}{{ m.content }}>{% endfor %}"
    assert pieces_by_message(template) == [("<a><b><a>", NOBODY)]
    assert pieces_by_message(template, variant=Variant(variables=True)) == [
        *[("<", -1), ("a>", 0)],
        *[("<", -1), ("b>", 1)],
        *[("<", -1), ("a>", 2)],
    ]
    outside = "{% set m = messages[1] %}{{ m.content }}"
    assert pieces_by_message(outside, variant=Variant(variables=True)) == [("b", NOBODY)]


def test_a_traced_template_keeps_its_white_space_control() -> None:
    template = "{%- for m in messages %}\n  {{- m.content }}\n{%- endfor -%}\n."
    assert "".join(text for text, _ in pieces_by_message(template)) == "aba."


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
