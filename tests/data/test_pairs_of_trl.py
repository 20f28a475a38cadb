"""Our tokens and masks of pairs beside those of TRL's `DPOTrainer`, by its own code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer

from mlx_sft.config import TrainConfig
from mlx_sft.data.chat_template import template_text
from mlx_sft.data.prepare import prepare
from tests.data.conftest import MakeTokenizer
from tests.data.mask.pictures import assistant, system, user
from tests.data.test_pairs import TALK

pytestmark = pytest.mark.parity

TOOLS = [{"type": "function", "function": {"name": "look", "description": "x", "parameters": {"type": "object"}}}]
CHATS: list[dict[str, Any]] = [
    {"prompt": [user("Bye")], "chosen": [assistant("So long")], "rejected": [assistant("No")]},
    {"prompt": [system("Brief."), *TALK], "chosen": [assistant("Yes")], "rejected": [assistant("Yes, but")]},
    {"chosen": [*TALK, assistant("So long")], "rejected": [*TALK, assistant("No")]},
    {"prompt": [user("Where?")], "chosen": [assistant("Here")], "rejected": [assistant("There")], "tools": TOOLS},
]
TEXTS = [
    {"prompt": "The cat sat on ", "chosen": "the mat.", "rejected": "the moon, and fell."},
    {"prompt": "Q: Why?\nA:", "chosen": " Because.\n", "rejected": " no"},
]


def beside_trl(
    tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **template_kwargs: Any
) -> tuple[list[tuple[str, str]], bool]:
    """Where an answer begins and ends: what TRL supervises more than we do before and behind it; and whether we say of it that it differs.

    The tokens are the same.
    """
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    rows = Dataset.from_list([row | ({"chat_template_kwargs": template_kwargs} if template_kwargs else {})])
    (its,) = DPOTrainer._prepare_dataset(trainer, rows, tokenizer, args, "train").to_list()
    config = TrainConfig(objective="dpo", chat_template_kwargs=template_kwargs)
    ours = prepare(config, tokenizer, rows=[row])
    more = []
    for example, key in zip(ours.train, ("chosen_ids", "rejected_ids"), strict=True):
        assert example.token_ids.tolist() == its["prompt_ids"] + its[key]
        supervised = np.flatnonzero(example.loss_weights)
        before = example.token_ids[len(its["prompt_ids"]) : supervised[0]]
        assert len(supervised) == supervised[-1] + 1 - supervised[0]
        more.append((tokenizer.decode(before), tokenizer.decode(example.token_ids[supervised[-1] + 1 :])))
    return more, bool(ours.report.facts.begun_otherwise)


@pytest.mark.parametrize("row", CHATS, ids=["prompt", "talk", "implicit", "tools"])
def test_the_tokens_of_chats_are_its_and_so_is_the_mask_but_for_the_line_break_at_the_end(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, qwen3: PreTrainedTokenizerFast
) -> None:
    for one in (tokenizer, qwen3):
        assert beside_trl(one, row) == ([("", "\n"), ("", "\n")], False)


def test_where_it_begins_elsewhere_we_say_so(qwen3: PreTrainedTokenizerFast) -> None:
    trained_on = beside_trl(qwen3, CHATS[0], enable_thinking=False)
    assert trained_on == ([("", "\n"), ("", "\n")], True), "TRL leaves out the empty think block, which we train on"


@pytest.mark.parametrize("row", TEXTS, ids=["mat", "question"])
def test_plain_texts_are_as_its_with_the_template_raw(row: dict[str, Any], make_tokenizer: MakeTokenizer) -> None:
    raw = make_tokenizer(template_text("raw"))
    assert beside_trl(raw, row) == ([("", ""), ("", "")], False)


def test_where_a_token_reaches_from_the_prompt_into_an_answer_we_say_so(
    tokenizer_of_bases: PreTrainedTokenizerFast,
) -> None:
    """TRL then begins the other answer as early, with what is its prompt's."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of_bases.backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = template_text("raw")
    row = {"prompt": "on the c", "chosen": "at", "rejected": "!"}
    assert beside_trl(tokenizer, row) == ([("", ""), ("c", "")], True)
