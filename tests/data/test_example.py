from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mlx_sft.data.conversation import Conversation
from mlx_sft.data.encode import (
    IGNORED,
    Encoder,
    Example,
    decoded_segments,
    encode_conversation,
)

pytestmark = pytest.mark.fast

MESSAGES = [{"role": "user", "content": "Hi 😀"}, {"role": "assistant", "content": "Hé 👩‍👩‍👧‍👦"}]


def only(examples: list[Example]) -> Example:
    (example,) = examples
    return example


def test_an_example_has_its_labels_unshifted_and_none_at_its_first_token(tokenizer: PreTrainedTokenizerFast) -> None:
    example = only(Encoder(tokenizer).encode(Conversation("a.jsonl:1", MESSAGES)))
    token_ids, mask = encode_conversation(tokenizer, MESSAGES)
    assert example.origin == "a.jsonl:1"
    assert example.token_ids.dtype == example.labels.dtype == np.int32
    assert example.token_ids.tolist() == token_ids
    assert example.labels.tolist() == [t if bit else IGNORED for t, bit in zip(token_ids, mask, strict=True)]
    assert example.supervised_tokens == sum(mask)


def test_segments_show_what_is_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    example = only(Encoder(tokenizer).encode(Conversation("a:1", MESSAGES)))
    assert decoded_segments(tokenizer, example) == [
        ("<|im_start|>user\nHi 😀<|im_end|>\n<|im_start|>assistant\n", False),
        ("Hé 👩‍👩‍👧‍👦<|im_end|>", True),
        ("\n", False),
    ]
    assert decoded_segments(tokenizer, example.truncated(3)) == [("<|im_start|>us", False)]


def test_examples_are_equal_in_content_only_with_equal_tokens_and_weights() -> None:
    ids, others = np.array([1, 2, 3], np.int32), np.array([4, 2, 3], np.int32)
    weights, halves = np.array([0, 1, 1], np.float32), np.array([0, 1, 0.5], np.float32)
    assert Example("a", ids, weights).digest() == Example("b", ids, weights).digest()
    different = Example("a", ids, weights), Example("a", others, weights), Example("a", ids, halves)
    assert len({example.digest() for example in different}) == 3
