from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mlx_sft.data.conversation import Document
from mlx_sft.data.dataset import Examples, pack
from mlx_sft.data.encode import Encoder
from mlx_sft.data.example import Example, Outcome
from mlx_sft.data.splitting import BREAK, pieces, text_breaks
from mlx_sft.data.truncation import truncate

pytestmark = pytest.mark.fast

TEXT = st.text(alphabet="ab. \n!”。é😀", max_size=300)
BREAKS = st.lists(st.tuples(st.integers(1, 299), st.integers(0, 3)), max_size=40, unique_by=lambda place: place[0])


def test_a_text_may_be_split_between_paragraphs_sentences_and_lines() -> None:
    text = 'It rained.\n \nIt snowed. "So?" they\nasked.\nNo, 3.5.'
    words = list(re.finditer(r"\s*[^\s.!?]+|\s*[.!?]", text))  # each with the white space before it, and an end token
    breaks = text_breaks(text, np.array([word.start() for word in words]), len(words) + 1)
    assert breaks[-1].item() == (len(words) + 1, 0)
    levels = dict(breaks[:-1].tolist())
    shown = "".join(f"⟨{levels[index]}⟩{word[0]}" if index in levels else word[0] for index, word in enumerate(words))
    assert shown == 'It rained.⟨0⟩\n \nIt snowed.⟨2⟩ "So?"⟨2⟩ they⟨3⟩\nasked.⟨1⟩\nNo, 3.5.'


def test_sentences_without_spaces_end_at_their_stops() -> None:
    breaks = text_breaks("雨。雪！", np.arange(4), 4)
    assert breaks.tolist() == [(2, 2), (4, 0)]


def test_tokens_around_a_text_have_no_place_in_it() -> None:
    # <bos> A . B . <eos>, of which the tokenizer says that the special ones stand at 0
    breaks = text_breaks("A. B.", np.array([0, 0, 1, 2, 4, 0]), 6)
    assert breaks.tolist() == [(3, 2), (6, 0)]


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([], [(0, 10), (10, 20), (20, 25)]),
        ([(7, 0), (9, 0), (10, 2)], [(0, 9), (9, 19), (19, 25)]),  # the last of the best in the second half
        ([(4, 0), (8, 1)], [(0, 8), (8, 18), (18, 25)]),  # not a short one
        ([(23, 0)], [(0, 10), (10, 20), (20, 25)]),
    ],
)
def test_a_piece_ends_at_the_last_of_the_best_breaks_in_its_second_half(
    places: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    assert list(pieces(np.array([*places, (25, 0)], BREAK), 25, 10)) == expected


@given(BREAKS, st.integers(1, 300), st.integers(2, 80))
def test_pieces_are_all_of_a_text_and_none_is_too_long_or_short(
    places: list[tuple[int, int]], length: int, longest: int
) -> None:
    breaks = np.array([*sorted(place for place in places if place[0] < length), (length, 0)], BREAK)
    found = list(pieces(breaks, length, longest))
    assert [start for start, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == length
    assert all(0 < end - start <= longest for start, end in found)
    if len(found) > 1 and longest > 2:
        assert all(end - start >= max(2, longest // 2) for start, end in found)


@settings(max_examples=50)
@given(st.lists(TEXT.filter(str.strip), min_size=1, max_size=4), st.integers(3, 60))
def test_the_pieces_of_a_text_are_its_tokens_each_once(
    tokenizer: PreTrainedTokenizerFast, texts: list[str], longest: int
) -> None:
    encoder = Encoder(tokenizer)
    wholes = [example for index, text in enumerate(texts) for example in encoder.encode(Document(f"a:{index}", text))]
    examples = Examples([pack(Outcome(whole.origin, [whole]) for whole in wholes)])
    truncation = truncate(examples, longest, None)
    assert (truncation.notes, truncation.tokens.supervised_lost) == ([], 0)
    assert truncation.split == sum(len(whole) > longest for whole in wholes)
    assert all(len(piece) <= longest for piece in truncation.examples)
    for row, whole in enumerate(wholes):
        own = [truncation.examples[index] for index in np.flatnonzero(truncation.examples.rows == row).tolist()]
        assert np.concatenate([piece.token_ids for piece in own]).tolist() == whole.token_ids.tolist()
        assert all(piece.loss_weights.tolist() == [0.0] + [1.0] * (len(piece) - 1) for piece in own)
        ends = [token for piece in own for token in piece.token_ids.tolist()].count(tokenizer.eos_token_id)
        assert ends == whole.token_ids.tolist().count(tokenizer.eos_token_id) == 1
        if len(own) > 1:
            assert [piece.origin for piece in own] == [f"a:{row}#{number}" for number in range(1, len(own) + 1)]
            assert {truncation.examples.row_origin(i) for i in np.flatnonzero(truncation.examples.rows == row)} == {
                f"a:{row}"
            }


def test_what_may_not_be_split_is_truncated_or_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    text = Encoder(tokenizer).encode(Document("a:1", "b" * 30))[0]
    other = Example("a:2", np.arange(50, dtype=np.int32), np.array([0.0] + [1.0] * 49, np.float32))
    examples = Examples([pack([Outcome("a:1", [text]), Outcome("a:2", [other])])])
    both = truncate(examples, 20, None)
    assert [len(one) for one in both.examples] == [20, 11, 20]
    assert [(number, note.fate) for number, note in both.notes] == [(1, "truncated")]
    assert (both.split, both.tokens.supervised_lost) == (1, 30)
    with pytest.raises(Exception, match="50 tokens, where max_length is 20, and only text can be split"):
        truncate(examples, 20, "split")
    noted = truncate(examples, 20, "split", strict=False)
    assert [(number, note.fate) for number, note in noted.notes] == [(1, "bad")]
    assert [len(one) for one in truncate(examples, 20, "truncate").examples] == [20, 20]
    assert [len(one) for one in truncate(examples, 20, None, compared=True).examples] == [20, 20]


def test_only_whole_stores_are_split(tokenizer: Any) -> None:
    examples = Examples.of(Encoder(tokenizer).encode(Document("a:1", "b" * 30)))
    with pytest.raises(ValueError, match="only all examples"):
        examples.select([0]).split_to(10)
