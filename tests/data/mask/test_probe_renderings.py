"""Ways in which templates write messages, and how tracing sees them. What is supervised is shown between ⟦ and ⟧."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from tests.data.mask.pictures import (
    MakeTokenizer,
    assistant,
    refusal,
    shown,
    system,
    tool,
    user,
)
from tests.data.mask.templates import (
    CHATML_VARIANTS,
    NOT_UNDERSTOOD,
    PROMPT,
    WRITTEN_LATER,
)

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("template", CHATML_VARIANTS.values(), ids=CHATML_VARIANTS.keys())
def test_chatml_in_every_spelling(make_tokenizer: MakeTokenizer, template: str) -> None:
    assert shown(
        make_tokenizer(template),
        system("Be brief"),
        user("Hi"),
        assistant("Hello 😀 \n"),
        user("And?"),
        assistant("42."),
    ) == (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello 😀 \n<|im_end|>⟧\n<|im_start|>user\nAnd?<|im_end|>\n"
        "<|im_start|>assistant\n⟦42.<|im_end|>⟧\n"
    )


def test_equal_messages_are_told_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    same = user("echo")
    assert shown(tokenizer, same, assistant("echo"), same, assistant("echo")).count("⟦echo<|im_end|>⟧") == 2


@pytest.mark.parametrize(("template", "reason"), NOT_UNDERSTOOD.values(), ids=NOT_UNDERSTOOD.keys())
def test_a_template_that_is_not_understood_is_refused(
    make_tokenizer: MakeTokenizer, template: str, reason: str
) -> None:
    error = refusal(make_tokenizer(template, name="odd-model"), user("é? yes"), assistant("Hello é"), user("Bye"))
    assert error.what.startswith("the chat template of odd-model is not understood")
    assert error.what.endswith(reason)


def test_a_developer_message_that_the_template_writes_is_context(tokenizer: PreTrainedTokenizerFast) -> None:
    text = shown(tokenizer, {"role": "developer", "content": "Be brief"}, user("Hi"), assistant("Hello"))
    assert text.startswith("<|im_start|>developer\nBe brief<|im_end|>\n<|im_start|>user")


@pytest.mark.parametrize("template", WRITTEN_LATER.values(), ids=WRITTEN_LATER.keys())
@pytest.mark.parametrize(
    "answer", ["42.", "...", "assistant", ""], ids=["words", "no letters", "a constant", "nothing"]
)
def test_turns_are_found_in_text_that_is_written_later(
    make_tokenizer: MakeTokenizer, template: str, answer: str
) -> None:
    assert shown(make_tokenizer(template), user("Hi"), assistant("Hello 😀"), user("And?"), assistant(answer)) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello 😀<|im_end|>⟧\n"
        f"<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦{answer}<|im_end|>⟧\n"
    )


def test_tool_results_inside_the_turn_that_called_are_found_by_the_conversations_prefixes(
    make_tokenizer: MakeTokenizer,
) -> None:
    """Each assistant's loop item writes the tools' messages that follow, as Gemma 4's does."""
    scanning = make_tokenizer(
        "{% for m in messages %}{% if m.role != 'tool' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% for n in messages[loop.index:] %}{% if n.role != 'tool' %}{% break %}{% endif %}"
        "{{ '<result>' + n.content | string + '</result>' }}{% endfor %}{% endif %}{% endfor %}" + PROMPT
    )
    assert shown(scanning, user("Hi"), assistant("I look"), tool("three"), assistant("It is 3")) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦I look<|im_end|>⟧\n"
        "<result>three</result><|im_start|>assistant\n⟦It is 3<|im_end|>⟧\n"
    )


TRACED_ALONE = {
    name: text
    for name, text in WRITTEN_LATER.items()
    if name not in ("a list that is joined", "messages made of messages", "the last outside the loop", "no loop at all")
}


@pytest.mark.parametrize("template", TRACED_ALONE.values(), ids=TRACED_ALONE.keys())
def test_turns_are_traced_where_no_prefix_of_the_conversation_is_one_of_the_text(
    make_tokenizer: MakeTokenizer, template: str
) -> None:
    tokenizer = make_tokenizer("{{ messages | length }}:" + template)
    assert shown(tokenizer, user("Hi"), assistant("Hello 😀"), user("And?"), assistant("42.")) == (
        "4:<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello 😀<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦42.<|im_end|>⟧\n"
    )


def test_an_answer_that_the_question_s_item_writes_is_found_by_the_conversations_prefixes(
    make_tokenizer: MakeTokenizer,
) -> None:
    pairs = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% if loop.nextitem is defined %}{{ ' ' + loop.nextitem.content + '<|im_end|>' }}{% endif %}{% endif %}{% endfor %}"
    )
    messages = [user("Hi"), assistant("Hello"), user("?"), assistant("Yes")]
    assert shown(make_tokenizer(pairs), *messages) == (
        "[INST] Hi [/INST]⟦ Hello<|im_end|>⟧[INST] ? [/INST]⟦ Yes<|im_end|>⟧"
    )
    error = refusal(make_tokenizer("{{ messages | length }}" + pairs), *messages)
    assert "stand where another message is written" in error.what


def test_an_answer_without_letters_that_is_certainly_not_written_is_left_out(make_tokenizer: MakeTokenizer) -> None:
    users = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
    assert shown(make_tokenizer(users), user("1?"), assistant("...")) == "1?\n"
    error = refusal(make_tokenizer("{{ messages | length }}" + users), user("1?"), assistant("..."))
    assert error.what.endswith("it does not show whether it writes message 2")
