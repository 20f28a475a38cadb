from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mlx_sft.data.mask.assistant_spans import NOBODY
from mlx_sft.data.mask.trace import Alphabet, Watch
from mlx_sft.data.mask.traced_template import VARIANTS, Variant, instrumented

MESSAGES: list[dict[str, Any]] = [{"content": "a"}, {"content": "b", "calls": ["x", "y"]}, {"content": "a"}]


def owners(template: str, variant: Variant = VARIANTS[0], **variables: Any) -> list[tuple[str, int]]:
    """The text in pieces of one owner."""
    alphabet = Alphabet.absent_from("", len(MESSAGES))
    assert alphabet is not None
    watch = Watch(MESSAGES, alphabet)
    marked = instrumented(template, variant).render(messages=MESSAGES, **variables, **watch.functions())
    watched = alphabet.read(marked)
    pieces: list[tuple[str, int]] = []
    for character, owner in zip(watched.text, watched.owners, strict=True):
        if pieces and pieces[-1][1] == owner:
            pieces[-1] = (pieces[-1][0] + character, owner)
        else:
            pieces.append((character, int(owner)))
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
    assert owners(template) == expected


def test_the_second_variant_follows_assignments_inside_loops() -> None:
    template = "{% for i in range(3) %}<{% set m = messages[i] %}{{ m.content }}>{% endfor %}"
    assert owners(template) == [("<a><b><a>", NOBODY)]
    assert owners(template, variant=Variant(assignments=True)) == [
        *[("<", -1), ("a>", 0)],
        *[("<", -1), ("b>", 1)],
        *[("<", -1), ("a>", 2)],
    ]
    outside = "{% set m = messages[1] %}{{ m.content }}"
    assert owners(outside, variant=Variant(assignments=True)) == [("b", NOBODY)]


def test_an_instrumented_template_keeps_its_white_space_control() -> None:
    template = "{%- for m in messages %}\n  {{- m.content }}\n{%- endfor -%}\n."
    assert "".join(text for text, _ in owners(template)) == "aba."


def test_an_alphabet_is_absent_from_the_text() -> None:
    text = "".join(map(chr, range(0xF0000, 0xF0020)))
    alphabet = Alphabet.absent_from(text, 3)
    assert alphabet is not None
    characters: list[Callable[[int], str]] = [alphabet.marker, alphabet.colour]
    used = [character(index) for character in characters for index in range(3)] + [alphabet.marker(NOBODY)]
    assert len(set(used)) == 7
    assert not set(used) & set(text)


def test_too_many_messages_have_no_alphabet() -> None:
    assert Alphabet.absent_from("", 30_000) is not None
    assert Alphabet.absent_from("", 40_000) is None
