"""Examples as a sequence and as columns, however they were packed, selected, joined and cut."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_sft.data.dataset import Examples, Store, pack
from mlx_sft.data.example import Example, Outcome, spans_of, weights_of
from mlx_sft.data.screening import SIGNS
from mlx_sft.data.template import Facts

pytestmark = pytest.mark.fast

WEIGHTS = st.lists(st.sampled_from([0.0, 0.0, 1.0, 0.5, 3.0]), max_size=30)


def example(*weights: float, origin: str = "a:1", turns: int = 1) -> Example:
    """Tokens 10, 11, ... with these weights."""
    token_ids = np.arange(10, 10 + len(weights), dtype=np.int32)
    return Example(origin, token_ids, np.array(weights, np.float32), Facts(turns=turns))


def same(found: Examples, expected: list[Example]) -> None:
    """Everything that a sequence of examples says is what these examples say."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.origin, one.facts, one.digest()) == (other.origin, other.facts, other.digest())
        assert (one.token_ids.dtype, one.loss_weights.dtype) == (np.int32, np.float32)
    assert found.lengths.tolist() == [len(one) for one in expected]
    assert found.supervised_tokens.tolist() == [one.supervised_tokens for one in expected]
    assert found.largest_token_ids.tolist() == [one.token_ids.max(initial=0) for one in expected]
    needed = [one.needed_length if one.supervised_tokens else 0 for one in expected]
    assert found.needed_lengths.tolist() == needed
    assert found.fingerprint() == hashlib.sha256(b"".join(one.digest() for one in expected)).hexdigest()
    assert found.facts() == sum((one.facts for one in expected), Facts())
    assert len(set(found.content_ids().tolist())) == len({one.digest() for one in expected})


EXAMPLES = [
    example(0, 1, 1, 0, 1, origin="a:1"),
    example(0, 0, 0.5, 2, origin="a:2", turns=3),
    example(0, 1, origin="a:3"),
    example(0, 1, 0, 0, 0, 0, 0, 1, origin="a:4"),
    example(0, 1, 1, 0, 1, origin="a:5"),
]


@given(WEIGHTS)
def test_weights_are_the_inverse_of_spans(weights: list[float]) -> None:
    array = np.array(weights, np.float32)
    spans = spans_of(array)
    assert weights_of(spans, len(array)).tolist() == weights
    assert weights_of(spans, len(array) // 2).tolist() == weights[: len(array) // 2]
    assert all(spans["weight"] != 0)


def test_a_sequence_says_what_its_examples_say() -> None:
    same(Examples.of(EXAMPLES), EXAMPLES)
    same(Examples.of([]), [])


@settings(max_examples=60, deadline=None)
@given(st.lists(WEIGHTS, max_size=6), st.integers(1, 12), st.data())
def test_selecting_cutting_and_joining_commute_with_what_is_stored(
    rows: list[list[float]], longest: int, data: st.DataObject
) -> None:
    expected = [example(*weights, origin=f"a:{number}") for number, weights in enumerate(rows)]
    found = Examples.of(expected)
    for _ in range(3):
        match data.draw(st.sampled_from(["select", "cut", "join"])):
            case "select":
                chosen = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=6)) if expected else []
                found, expected = found.select(chosen), [expected[index] for index in chosen]
            case "cut":
                found, expected = found.truncated_to(longest), [one.truncated(longest) for one in expected]
            case "join":
                found, expected = Examples.joined([found, found[1:]]), expected + expected[1:]
        if data.draw(st.booleans()):
            same(found, expected)
    same(found, expected)


def test_examples_are_found_by_any_index_and_slice() -> None:
    found = Examples.of(EXAMPLES)
    assert [one.origin for one in (found[0], found[-1], found[np.int64(2)])] == ["a:1", "a:5", "a:3"]
    assert isinstance(found[1:4], Examples)
    assert [one.origin for one in found[1:4][::-1]] == ["a:4", "a:3", "a:2"]
    for index in (5, -6):
        with pytest.raises(IndexError):
            found[index]


def store(name: str, *rows: tuple[int, int]) -> Store:
    """A source whose rows have so many examples and these signs."""
    outcomes = [
        Outcome(
            f"{name}:{number}",
            [example(0, 1, origin=f"{name}:{number}" + (f"#{turn}" if turns > 1 else "")) for turn in range(turns)],
            frozenset(name for bit, name in enumerate(SIGNS) if signs >> bit & 1),
        )
        for number, (turns, signs) in enumerate(rows)
    ]
    return pack(outcomes)


def test_the_turns_of_a_row_share_its_number_and_no_other_row_has_it() -> None:
    first, second = Examples([store("a", (1, 0), (3, 0), (0, 0))]), Examples([store("b", (0, 0), (1, 0), (2, 0))])
    found = Examples.joined([first, second])
    assert found.rows.tolist() == [0, 1, 1, 1, 4, 5, 5]
    assert found.by_row() == [[0], [1, 2, 3], [4], [5, 6]]
    assert found.select([6, 0, 5]).by_row() == [[1], [0, 2]]
    assert [found.row_origin(index) for index in (0, 1, 3, 4, 6)] == ["a:0", "a:1", "a:1", "b:1", "b:2"]
    assert [found[index].origin for index in (0, 1, 6)] == ["a:0", "a:1#0", "b:2#1"]
    assert found.counts() == [4, 3]
    assert found.select([6, 0, 5]).counts() == [1, 2]
    assert found.select([6, 0, 5]).rows.tolist() == [5, 0, 5]


def test_signs_are_counted_by_row() -> None:
    found = Examples([store("a", (1, 0b01), (3, 0b11), (1, 0))])
    assert found.sign_counts(["one", "two", "three"]) == {"one": 2, "two": 1}
    assert found.signs.tolist() == [1, 3, 3, 3, 0]


def test_what_is_joined_stays_as_it_is_truncated() -> None:
    found = Examples.of(EXAMPLES)
    expected = [one.truncated(longest) for longest in (2, 3) for one in EXAMPLES]
    same(Examples.joined([found.truncated_to(2), found.truncated_to(3)]), expected)
    same(found, EXAMPLES)
    assert len(Examples.joined([])) == 0


@pytest.mark.parametrize(
    "other",
    [
        EXAMPLES[::-1],
        EXAMPLES[:-1],
        [],
        [*EXAMPLES[:-1], replace(EXAMPLES[-1], loss_weights=np.zeros(5, np.float32))],
        [*EXAMPLES[:-1], example(0, 1, 1, 0, 0.5)],
    ],
)
def test_the_fingerprint_tells_any_change(other: list[Example]) -> None:
    assert Examples.of(other).fingerprint() != Examples.of(EXAMPLES).fingerprint()


def test_the_fingerprint_does_not_tell_a_name() -> None:
    renamed: list[Any] = [replace(one, origin="elsewhere") for one in EXAMPLES]
    assert Examples.of(renamed).fingerprint() == Examples.of(EXAMPLES).fingerprint()
