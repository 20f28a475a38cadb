"""Templates with calls put in."""

from __future__ import annotations

import pytest

from mlx_sft.data.mask.trace import NOBODY
from mlx_sft.data.mask.traced_template import Variant, has_tags, string_constants
from tests.data.mask.test_trace import pieces_by_message

pytestmark = pytest.mark.fast


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


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (Variant(), [("(", -1), ("a", 0), ("b", 1), ("a", 2), (")", -1)]),
        (Variant(captured=False), [("(aba)", -1)]),
        (Variant(loops=False, captured=False), [("(aba)", -1)]),
    ],
)
@pytest.mark.parametrize(
    "template",
    [
        "{% set t %}LOOP{% endset %}({{ t }})",
        "{% macro all() %}LOOP{% endmacro %}({{ all() }})",
    ],
)
def test_captured_text_is_traced_where_the_variant_says_so(
    template: str, variant: Variant, expected: list[tuple[str, int]]
) -> None:
    loop = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert pieces_by_message(template.replace("LOOP", loop), variant) == expected


def test_loops_are_traced_where_the_variant_says_so() -> None:
    loop = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert pieces_by_message(loop, Variant(captured=False)) == [("a", 0), ("b", 1), ("a", 2)]
    assert pieces_by_message(loop, Variant(loops=False, captured=False)) == [("aba", NOBODY)]


def test_the_strings_of_the_code_are_known_and_no_numbers() -> None:
    assert string_constants("a{{ 'b' if 1 else m['c'] }}{% set d = ['e', 2] %}") == {"b", "c", "e"}


def test_tags_are_known_from_other_call_blocks() -> None:
    assert has_tags("{% generation %}a{% endgeneration %}")
    assert not has_tags("{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}a{% endcall %}")


def test_loops_inside_of_a_tag_are_traced() -> None:
    loop = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    assert pieces_by_message(loop) == [("a", 0), ("b", 1), ("a", 2)]
