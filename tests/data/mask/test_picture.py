"""The picture in the room's docstring is what happens."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mlx_sft.data import mask
from mlx_sft.data.conversation import Conversation
from mlx_sft.data.mask.probes import traced_renderings
from mlx_sft.data.mask.reference_rendering import ReferenceRendering
from mlx_sft.data.mask.trace import NOBODY, TracedRendering
from tests.data.mask.pictures import assistant, rendered, shown, user

pytestmark = pytest.mark.fast

MESSAGES = [user("How?"), assistant("So.")]


def drawn(label: str) -> str:
    """A line of the picture, as long as its text."""
    lines = {line[4:27].strip(): line[27:] for line in (mask.__doc__ or "").splitlines() if line.startswith("    ")}
    return lines[label].ljust(len(lines["text"])).replace("↵", "\n")


def marked(length: int, *spans: tuple[int, int], sign: str) -> str:
    line = [" "] * length
    for start, end in spans:
        line[start:end] = sign * (end - start)
    return "".join(line)


def test_the_supervised_part_is_the_one_in_brackets(tokenizer: PreTrainedTokenizerFast) -> None:
    assert drawn("↵ is a line break") == shown(tokenizer, *MESSAGES)


def test_characters_and_letters_have_the_messages_that_are_drawn(tokenizer: PreTrainedTokenizerFast) -> None:
    traced = next(traced_renderings(ReferenceRendering(tokenizer, Conversation("", MESSAGES)), [1]))
    assert isinstance(traced, TracedRendering)
    assert traced.text == drawn("text")
    assert traced.char_to_message.tolist() == [int(digit) for digit in drawn("char_to_message")]
    letters = [NOBODY if digit == "." else int(digit) for digit in drawn("letter_to_message")]
    assert traced.letter_to_message.tolist() == letters
    assert traced.letters == [3, 2]
    assert traced.char_to_message.dtype == traced.letter_to_message.dtype == np.int32


def test_the_header_is_the_generation_prompt_and_the_output_follows_it(tokenizer: PreTrainedTokenizerFast) -> None:
    rendering = rendered(tokenizer, *MESSAGES)
    ((start, end),) = rendering.turns[0].spans
    prompt = "<|im_start|>assistant\n"
    assert drawn("header") == marked(len(rendering.text), (start - len(prompt), start), sign="-")
    assert drawn("output") == marked(len(rendering.text), (start, end), sign="=")
    assert rendering.text[:start].endswith(prompt)
