"""What the tokenizer's own template writes, and what it rejects."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_sft.data.conversation import Conversation
from mlx_sft.data.mask.reference_rendering import ReferenceRendering, reason_of
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

pytestmark = pytest.mark.fast


def test_a_tokenizer_without_a_template_is_an_error(make_tokenizer: MakeTokenizer) -> None:
    error = refusal(make_tokenizer(None, name="base-model"), user("Hi"), assistant("Hello"))
    assert error.what == "base-model has no chat template"
    assert "--chat-template" in error.hint


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


def reference(template: str, *messages: dict[str, Any], make: MakeTokenizer) -> ReferenceRendering:
    return ReferenceRendering(make(template), Conversation("chats.jsonl:17", list(messages)))


TALK = (user("Hi"), assistant("Yo"), user("?"), assistant("So"))
PLAIN = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}"
PROMPTING = PLAIN + "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"


@pytest.mark.parametrize("opener", ["", "<think>", "<think>\n</think>"])
def test_a_turn_is_what_its_message_adds_to_the_context_in_which_it_is_written(
    make_tokenizer: MakeTokenizer, opener: str
) -> None:
    plain = reference(PROMPTING.replace("<assistant>", f"<assistant>{opener}"), *TALK, make=make_tokenizer)
    assert plain.text == "<user>Hi</s><assistant>Yo</s><user>?</s><assistant>So</s>"
    assert plain.prompted == f"{plain.text}<assistant>{opener}"
    assert plain.beginning(1) == "<user>Hi</s>"
    assert plain.beginning(1, prompt=True) == f"<user>Hi</s><assistant>{opener}"
    assert plain.context(1) == "<user>Hi</s><assistant>"
    assert plain.header(1) == plain.header(3) == "<assistant>"
    start, end = plain.added(3) or (0, 0)
    assert plain.text[start:end] == "So</s>"
    assert not plain.adds_nothing(3)


def test_what_a_template_rejects_is_not_known(make_tokenizer: MakeTokenizer) -> None:
    pairs = "{% if messages | length % 2 %}{{ raise_exception('pairs') }}{% endif %}" + PROMPTING
    rejecting = reference(pairs, *TALK, make=make_tokenizer)
    assert rejecting.beginning(2) is not None
    assert rejecting.beginning(3) is rejecting.context(1) is rejecting.header(1) is rejecting.added(1) is None
    assert rejecting.beginning(0) is rejecting.context(0) is None  # there is no message


def test_where_a_beginning_is_not_that_of_the_text_it_is_not_known_what_a_message_adds(
    make_tokenizer: MakeTokenizer,
) -> None:
    counting = reference("{{ messages | length }}" + PROMPTING, *TALK, make=make_tokenizer)
    assert counting.context(1) == "1<user>Hi</s><assistant>"
    assert counting.added(1) is counting.added(3) is None
    last_differs = reference(PROMPTING + "{{ '!' if messages | length == 4 }}", *TALK, make=make_tokenizer)
    assert last_differs.added(1) is not None
    closing = reference(PROMPTING + "{{ '!' if messages | length == 2 }}", *TALK, make=make_tokenizer)
    assert closing.added(1) is None


def test_an_end_token_instead_of_a_prompt_hides_the_header(make_tokenizer: MakeTokenizer) -> None:
    ending = reference(PLAIN + "{{ '<assistant>' if add_generation_prompt else '<eos>' }}", *TALK, make=make_tokenizer)
    assert ending.context(1) == "<user>Hi</s><assistant>"
    assert ending.header(1) is None


def test_a_message_that_is_left_out_adds_nothing(make_tokenizer: MakeTokenizer) -> None:
    users = reference(PLAIN.replace("messages", "messages if m.role == 'user'"), *TALK, make=make_tokenizer)
    assert users.adds_nothing(1)
    assert users.adds_nothing(3)
    assert not users.adds_nothing(2)


def test_beginnings_are_rendered_once_and_the_latest_kept(make_tokenizer: MakeTokenizer) -> None:
    messages = [message for _ in range(20) for message in TALK[:2]]
    many = reference(PROMPTING, *messages, make=make_tokenizer)
    first = many.beginning(1)
    assert many.beginning(1) is first
    for count in range(2, 17):
        many.beginning(count)
    assert many.beginning(1) is first
    for count in range(17, 33):
        many.beginning(count)
    assert many.beginning(1) == first
    assert many.beginning(1) is not first


def test_messages_are_what_transformers_gives_a_template(make_tokenizer: MakeTokenizer) -> None:
    thoughtful = assistant(None, reasoning="hm", tool_calls=None)
    given = reference(PLAIN, thoughtful, make=make_tokenizer).messages
    assert given == [{"role": "assistant", "reasoning": "hm", "thinking": "hm", "reasoning_content": "hm"}]


@pytest.mark.parametrize("tools", [["now"], [*TOOLS, "now"]], ids=["none", "not all"])
def test_tools_that_are_no_schemas_are_an_error(make_tokenizer: MakeTokenizer, tools: list[Any]) -> None:
    error = refusal(make_tokenizer(), user("Hi"), assistant("Hello"), tools=tools)
    assert error.what == "the chat template rejects this conversation: tools must be JSON schemas"


def test_an_errors_message_is_shortened_and_never_empty(make_tokenizer: MakeTokenizer) -> None:
    assert reason_of(ValueError("x" * 501)) == "x" * 500
    assert reason_of(ValueError()) == "ValueError"
    assert reason_of(RecursionError("maximum depth")) == "it is nested too deeply"
