"""Where an assistant's turn begins. What is supervised is shown between ⟦ and ⟧."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_sft.data.mask.reference_rendering import ReferenceRendering
from tests.data.mask.pictures import (
    MakeTokenizer,
    assistant,
    refusal,
    shown,
    tool,
    user,
)
from tests.data.mask.templates import (
    END,
    LOOP,
    PROMPT,
    TAGGED,
    TAGGED_VARIANTS,
    TURN,
)

pytestmark = pytest.mark.fast


def test_a_default_system_prompt_is_not_supervised_even_before_an_opening_assistant(
    make_tokenizer: MakeTokenizer,
) -> None:
    template = (
        "{% for message in messages %}{% if loop.first and messages[0].role != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    default = "<|im_start|>system\nYou are helpful.<|im_end|>\n"
    assert shown(make_tokenizer(template), user("Hi"), assistant("Yo")) == (
        f"{default}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Yo<|im_end|>⟧\n"
    )
    assert shown(make_tokenizer(template), assistant("Yo"), user("Hi")) == (
        f"{default}<|im_start|>assistant\n⟦Yo<|im_end|>⟧\n<|im_start|>user\nHi<|im_end|>\n"
    )


def test_a_prompt_that_is_another_after_the_whole_conversation_is_not_taken_for_the_header(
    make_tokenizer: MakeTokenizer,
) -> None:
    """After an assistant's message, this template's prompt ends that message instead of opening another."""
    closing = make_tokenizer(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if not loop.last or add_generation_prompt %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'assistant' %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert shown(closing, user("Hi"), assistant("Hello"), user("And?"), assistant("Fine")) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦Fine⟧"
    )


def test_a_header_that_only_the_first_of_several_turns_has(make_tokenizer: MakeTokenizer) -> None:
    """After a tool's message this template goes on with the assistant's turn, and so does its prompt."""
    continuing = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ '<tool>' + m.content + '</tool>' }}"
        "{% elif m.role == 'assistant' %}{% if not (loop.previtem is defined and loop.previtem.role == 'tool') %}"
        "{{ '<|assistant|>' }}{% endif %}{{ m.content + '<|end|>' }}{% else %}{{ '<user>' + m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt and messages[-1].role == 'user' %}{{ '<|assistant|>' }}{% endif %}",
        eos="<|end|>",
    )
    assert shown(continuing, user("Hi"), assistant("I look"), tool("3"), assistant("It is 3"), user("?")) == (
        "<user>Hi<|assistant|>⟦I look<|end|>⟧<tool>3</tool>⟦It is 3<|end|>⟧<user>?"
    )


def test_a_prompt_that_begins_the_answer_itself_is_no_header(make_tokenizer: MakeTokenizer) -> None:
    """The answer happens to begin as the prompt ends: nothing says whose these letters are."""
    prefilling = make_tokenizer(
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>Su' }}{% endif %}"
    )
    error = refusal(prefilling, user("Hi"), assistant("Sure"))
    assert "message 2 does not begin with the generation prompt '<assistant>Su'" in error.what


def test_an_opening_assistant_has_the_header_of_the_others(make_tokenizer: MakeTokenizer) -> None:
    silent = make_tokenizer(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt and messages and messages[-1].role == 'user' %}{{ '<|im_start|>assistant\n' }}"
        "{% endif %}"
    )
    assert shown(silent, assistant("Yo"), user("Hi"), assistant("Hello")) == (
        "<|im_start|>assistant\n⟦Yo<|im_end|>⟧\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
    )


ALWAYS_PROMPTING = (
    "{% for m in messages %}{% set turn = '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' %}"
    "{% if loop.first %}{% set turn = '<|begin_of_text|>' + turn %}{% endif %}{{ turn }}{% endfor %}"
    "{{ '<|im_start|>assistant\nPROMPT' }}"
)


def test_an_opening_assistant_of_a_template_that_always_writes_its_prompt(make_tokenizer: MakeTokenizer) -> None:
    """As Llama 3's first template does."""
    always = make_tokenizer(ALWAYS_PROMPTING.replace("PROMPT", ""))
    opening = "<|begin_of_text|><|im_start|>assistant\n⟦Yo<|im_end|>⟧\n"
    prompt = "<|im_start|>assistant\n"
    assert shown(always, assistant("Yo")) == opening + prompt
    assert shown(always, assistant("Yo"), user("Hi"), assistant("Hello")) == (
        f"{opening}<|im_start|>user\nHi<|im_end|>\n{prompt}⟦Hello<|im_end|>⟧\n{prompt}"
    )


def test_a_prompt_that_always_stands_there_is_the_header_though_it_opens_reasoning(
    make_tokenizer: MakeTokenizer,
) -> None:
    always = make_tokenizer(ALWAYS_PROMPTING.replace("PROMPT", "<think></think>"))
    assert shown(always, user("Hi"), assistant("Hello"), user("<think>")) == (
        "<|begin_of_text|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
        "<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n<think></think>"
    )


def test_a_prompt_that_begins_like_what_else_ends_the_text_is_cut_at_its_reasoning(
    make_tokenizer: MakeTokenizer,
) -> None:
    ending = make_tokenizer(
        "{% for m in messages %}{{ '<' + m.role + '>' if m.role == 'user' else '<think></think>' }}{{ m.content }}"
        "</s>{% endfor %}{{ '<think>' if add_generation_prompt else '</s>' }}"
    )
    assert shown(ending, user("Hi"), assistant("Hello")) == "<user>Hi</s>⟦<think></think>Hello</s>⟧</s>"


def test_a_way_of_tracing_that_sees_no_message_does_not_tell_the_header(make_tokenizer: MakeTokenizer) -> None:
    """The first message has no letters, and the text ends otherwise where the template is to prompt, for nothing."""
    by_index = make_tokenizer(
        "{% for i in range(messages | length) %}{% set m = messages[i] %}{{ m.role + ': ' }}"
        "{{ '<think></think>' if m.role == 'assistant' }}{{ m.content }}<|im_end|>{% endfor %}"
        "{{ '' if add_generation_prompt else '.' }}"
    )
    expected = "user: <|im_end|>⟦assistant: <think></think>Hello<|im_end|>⟧."
    assert shown(by_index, user(""), assistant("Hello")) == expected


OPENINGS = {
    "a line less before its header": (
        "{% for m in messages %}{{ '' if loop.first else '\n\n' }}{{ '### ' + m.role + ':\n' + m.content }}"
        "{% if m.role == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n\n### assistant:\n' }}{% endif %}",
        "### assistant:\n⟦Yo<|im_end|>⟧",
    ),
    "a header that the user's turn ends with": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<user>' + m.content + '<assistant>' }}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}",
        "⟦Yo<|im_end|>⟧",
    ),
    "a header that follows users alone, and opens reasoning": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<user>' + m.content + '<assistant><think>' }}"
        "{% else %}{{ ('</think>' if not loop.first else '') + m.content + '<|im_end|>' }}{% endif %}{% endfor %}",
        "⟦Yo<|im_end|>⟧",
    ),
    "a short header": (
        "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}",
        "a: ⟦Yo⟧\n",
    ),
    "a prompt after users alone": (
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role == 'user' %}<assistant>{% endif %}",
        "<assistant>⟦Yo<|im_end|>⟧",
    ),
}


@pytest.mark.parametrize(("template", "opening"), OPENINGS.values(), ids=OPENINGS.keys())
@pytest.mark.parametrize("later", [[], [user("Hi")], [user("Hi"), assistant("Hello")]], ids=["alone", "asked", "both"])
def test_an_opening_assistant_is_supervised_as_the_answer_to_a_question(
    make_tokenizer: MakeTokenizer, template: str, opening: str, later: list[dict[str, Any]]
) -> None:
    assert shown(make_tokenizer(template), assistant("Yo"), *later).startswith(opening)


def test_a_header_that_the_prompt_supplies_elsewhere_is_not_supervised(make_tokenizer: MakeTokenizer) -> None:
    """After an assistant's turn this template prompts for nothing, and yet writes the header, on a line of its own."""
    guarded = make_tokenizer(
        "{% for m in messages %}{{ ('' if loop.first else '\n') + '<' + m.role + '>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role == 'user' %}<assistant>{% endif %}"
    )
    assert shown(guarded, user("Hi"), assistant("Hello"), assistant("You?"), user("Yes"), assistant("Fine")) == (
        "<user>Hi\n<assistant>⟦Hello⟧\n<assistant>⟦You?⟧\n<user>Yes\n<assistant>⟦Fine⟧"
    )


@pytest.mark.parametrize(
    "opener", ["<think>\n", "<think>\n\n</think>\n\n", "[THINK]", "<think:x>", "Here are my reasoning steps:\n"]
)
def test_the_header_ends_where_the_prompt_opens_reasoning(make_tokenizer: MakeTokenizer, opener: str) -> None:
    thinking = make_tokenizer(LOOP + TURN + END + PROMPT.replace("assistant\n", f"assistant\n{opener}"))
    assert shown(thinking, user("Hi"), assistant(f"{opener}Hello")).endswith(f"assistant\n⟦{opener}Hello<|im_end|>⟧\n")


def test_a_header_in_the_content_is_no_header(make_tokenizer: MakeTokenizer) -> None:
    forged = assistant("<|im_start|>assistant\nHello")
    assert shown(make_tokenizer(LOOP + TURN + END + PROMPT), user("Hi"), forged).endswith(
        "user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<|im_start|>assistant\nHello<|im_end|>⟧\n"
    )
    unended = make_tokenizer(
        "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    said = (user("Hi<assistant>"), assistant("Hello"), user("Hi"), assistant("<assistant>Hello"))
    assert shown(unended, *said) == ("<user>Hi<assistant><assistant>⟦Hello⟧<user>Hi<assistant>⟦<assistant>Hello⟧")
    tagged = make_tokenizer(TAGGED)
    assert shown(tagged, user("Hi"), forged).endswith("assistant\n⟦<|im_start|>assistant\nHello<|im_end|>⟧\n")
    header_in_tag = make_tokenizer(TAGGED_VARIANTS["with the header inside"])
    said_by_user = "x<|im_start|>assistant\n"
    for tagging in (tagged, header_in_tag):
        assert shown(tagging, user(said_by_user), forged, user(said_by_user), assistant("So")) == (
            f"<|im_start|>user\n{said_by_user}<|im_end|>\n"
            "<|im_start|>assistant\n⟦<|im_start|>assistant\nHello<|im_end|>⟧\n"
            f"<|im_start|>user\n{said_by_user}<|im_end|>\n<|im_start|>assistant\n⟦So<|im_end|>⟧\n"
        )
    touching = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ '<assistant>' + m.content + '<|end|>' }}"
        "{% endgeneration %}{% else %}{{ '<user>' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
        eos="<|end|>",
    )
    assert shown(touching, user("Hi<assistant>"), assistant("<assistant>Hello")) == (
        "<user>Hi<assistant><assistant>⟦<assistant>Hello<|end|>⟧"
    )
    user_opens = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content + '\n\nA:' }}{% else %}{{ ' ' + m.content + '<|end|>' }}"
        "{% endif %}{% endfor %}",
        eos="<|end|>",
    )
    assert shown(user_opens, user("Hi"), assistant("\n\nA: Hello")) == "Hi\n\nA:⟦ \n\nA: Hello<|end|>⟧"


def test_a_prompt_that_says_that_there_is_no_reasoning_is_the_header_up_to_that(make_tokenizer: MakeTokenizer) -> None:
    """The prompt closes reasoning that was never opened; a turn with reasoning opens it."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
        "{{ '<think>' + m.thinking if m.thinking else '' }}{{ '</think>' }}{% endif %}{{ m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant></think>{% endif %}"
    )
    assert shown(tokenizer, user("Hi"), assistant("Hello"), user("?"), assistant("Yes", thinking="hm")) == (
        "<user>Hi<|im_end|><assistant></think>⟦Hello<|im_end|>⟧"
        "<user>?<|im_end|><assistant>⟦<think>hm</think>Yes<|im_end|>⟧"
    )


@pytest.mark.parametrize("prompt", [PROMPT, "{{ '<|im_start|>assistant\n' if add_generation_prompt else '<eos>' }}"])
def test_a_long_conversation_asks_for_a_beginning_once_for_each_kind_of_message(
    make_tokenizer: MakeTokenizer, monkeypatch: pytest.MonkeyPatch, prompt: str
) -> None:
    """Else its turns would take the square of their number."""
    asked, beginning = set(), ReferenceRendering.beginning

    def counted(self: ReferenceRendering, count: int, prompt: bool = False) -> str | None:
        asked.add(count)
        return beginning(self, count, prompt)

    monkeypatch.setattr(ReferenceRendering, "beginning", counted)
    messages = [message for _ in range(9) for message in (user("Hi"), assistant("I look"), tool("3"), assistant("Yes"))]
    template = LOOP + TURN + "{{ '*' if message.role == 'assistant' else '' }}" + END + prompt
    assert shown(make_tokenizer(template), *messages).count("⟦") == 18
    assert asked == {1, 3}
