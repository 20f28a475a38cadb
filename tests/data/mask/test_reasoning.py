"""Where reasoning is opened and closed in a prompt."""

from __future__ import annotations

import pytest

from mlx_sft.data.mask.reasoning import (
    after_empty_think_block,
    before_no_reasoning,
    before_reasoning,
    without_opened_reasoning,
)

pytestmark = pytest.mark.fast

BLOCKS = [
    *(("<think>", "</think>"), ("<think:opensource>", "</think:opensource>"), ("<thinking>", "</thinking>")),
    *(("<reasoning>", "</reasoning>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]")),
    *(("<longcat_think>", "</longcat_think>"), ("<|START_THINKING|>", "<|END_THINKING|>")),
    *(("<|inner_prefix|>", "<|inner_suffix|>"), ("<|channel>thought", "<channel|>"), ("<|think|>", "<|/think|>")),
    *(("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"), ("◁think▷", "◁/think▷")),
]


@pytest.mark.parametrize(("opener", "closer"), BLOCKS)
def test_every_familys_think_block_is_known(opener: str, closer: str) -> None:
    header = "<assistant>"
    assert before_reasoning(f"{header}{opener}\n") == header
    assert before_no_reasoning(f"{header}{closer}\n") == header
    assert without_opened_reasoning(f"Hi{header}{opener}\n") == f"Hi{header}"
    assert without_opened_reasoning(f"Hi{header}{opener}\n{closer}\n\n") == f"Hi{header}"
    block = f"{opener}\n\n{closer}\n\n"
    assert after_empty_think_block(f"x{block}Hello", 1, len(block) + 6) == len(block) + 1


def test_a_prompt_without_reasoning_stays_as_it_is() -> None:
    for same in (before_reasoning, before_no_reasoning, without_opened_reasoning):
        assert same("<user>Hi<assistant>") == "<user>Hi<assistant>"


def test_reasoning_before_the_prompt_is_not_the_prompts() -> None:
    context = "<think>hm</think>Hello<user>?<assistant><think>"
    first = context.index("<user>")
    assert before_reasoning(context, first) == "<think>hm</think>Hello<user>?<assistant>"
    assert before_reasoning(context, 0) == ""


def test_an_opener_may_begin_with_what_another_text_has_in_common_with_the_prompt() -> None:
    assert before_reasoning("<assistant><think>", len("<assistant><")) == "<assistant>"
    assert before_reasoning("<think>", len("<think>")) == "<think>"


def test_reasoning_that_is_not_opened_at_the_very_end_stays() -> None:
    said = "<assistant><think>hm"
    assert without_opened_reasoning(said) == said


def test_a_block_that_holds_something_or_stands_elsewhere_is_not_empty() -> None:
    assert after_empty_think_block("<think>hm</think>", 0, 17) == 0
    assert after_empty_think_block("Hi<think></think>", 0, 17) == 0
    assert after_empty_think_block("<think></think>", 0, 10) == 0
