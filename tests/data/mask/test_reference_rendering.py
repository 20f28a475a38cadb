"""What the tokenizer's own template writes, and what it rejects."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast

from tests.data.mask.pictures import (
    TOOLS,
    MakeTokenizer,
    Template,
    assistant,
    refusal,
    shown,
    system,
    user,
)
from tests.data.mask.templates import (
    CHATML_VARIANTS,
)


def test_a_tokenizer_without_a_template_is_an_error(make_tokenizer: MakeTokenizer) -> None:
    error = refusal(make_tokenizer(None, name="base-model"), user("Hi"), assistant("Hello"))
    assert error.what == "base-model has no chat template"
    assert "instruct model" in error.hint


def test_what_the_template_rejects_is_an_error_with_its_words(
    make_tokenizer: MakeTokenizer, public_template: Template
) -> None:
    error = refusal(make_tokenizer(public_template("gemma")), system("Be brief"), user("Hi"), assistant("Hello"))
    assert error.what == "the chat template rejects this conversation: System role not supported"


def test_a_template_that_fails_on_a_message_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    assert refusal(tokenizer, user("Hi"), {"role": "assistant"}).what.startswith(
        "the chat template rejects this conversation"
    )


def test_a_malformed_template_is_an_error(make_tokenizer: MakeTokenizer) -> None:
    error = refusal(make_tokenizer("{% for m in messages %}"), user("Hi"), assistant("Hello"))
    assert error.what.startswith("the chat template rejects this conversation: Unexpected end of template")


def test_too_deep_nesting_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    deep: list[Any] = []
    for _ in range(20_000):
        deep = [deep]
    error = refusal(tokenizer, user("Hi"), assistant("Hello", more=deep))
    assert error.what == "the chat template rejects this conversation: it is nested too deeply"


def test_the_tool_use_template_of_several_is_taken_where_there_are_tools(
    make_tokenizer: MakeTokenizer, public_template: Template
) -> None:
    tokenizer = make_tokenizer({"default": CHATML_VARIANTS["plain text"], "tool_use": public_template("qwen3")})
    assert "<tools>" in shown(tokenizer, user("Hi"), assistant("Hello"), tools=TOOLS)
    assert "<think>" not in shown(tokenizer, user("Hi"), assistant("Hello"))


def test_a_template_that_takes_no_system_message_is_said_to(
    make_tokenizer: MakeTokenizer, public_template: Template
) -> None:
    gemma = make_tokenizer(public_template("gemma"))
    assert "takes no system message" in refusal(gemma, system("Be brief"), user("Hi"), assistant("Hello")).hint
    error = refusal(gemma, system("Be brief"), user("Hi"), user("Hi"), assistant("Hello"))
    assert error.hint.startswith("change the messages")
