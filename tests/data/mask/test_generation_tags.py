"""Templates whose authors tagged what is generated. What is supervised is shown between ⟦ and ⟧."""

from __future__ import annotations

import pytest

from mlx_sft.data.template import Facts
from tests.data.mask.pictures import (
    MakeTokenizer,
    assistant,
    refusal,
    rendered,
    shown,
    tool,
    user,
)
from tests.data.mask.templates import (
    PROMPT,
    TAGGED,
    TAGGED_VARIANTS,
)

pytestmark = pytest.mark.fast


@pytest.mark.parametrize("template", TAGGED_VARIANTS.values(), ids=TAGGED_VARIANTS.keys())
def test_tags_say_what_is_generated(make_tokenizer: MakeTokenizer, template: str) -> None:
    tokenizer = make_tokenizer(template)
    messages = [user("Hi"), assistant("Hello 😀 "), user("And?"), assistant("42.")]
    assert shown(tokenizer, *messages) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello 😀 <|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦42.<|im_end|>⟧\n"
    )
    assert "⟦Hello" not in shown(tokenizer, *messages, supervised=[3])
    assert rendered(tokenizer, *messages).facts == Facts(turns=2)


def test_a_tag_around_anothers_words_is_refused(make_tokenizer: MakeTokenizer) -> None:
    wrong = make_tokenizer(
        "{% for m in messages %}{% generation %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endgeneration %}{% endfor %}" + PROMPT
    )
    assert refusal(wrong, user("Hi"), assistant("Hello")).what.endswith("it tags words of others as generated")


def test_a_tag_around_anothers_words_is_refused_though_there_are_as_many_tags_as_answers(
    make_tokenizer: MakeTokenizer,
) -> None:
    """An empty answer's tag encloses nothing, so that the user's tag could be taken for the second answer's."""
    everyones = make_tokenizer(
        "{% for m in messages %}{{ '<' + m.role + '>' }}{% generation %}{{ m.content }}{% endgeneration %}{{ '<|im_end|>' }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    error = refusal(everyones, assistant("Yo"), user("Hi"), assistant(""))
    assert error.what.endswith("it tags words of others as generated")


@pytest.mark.parametrize("variant", ["as they should be", "not watched"])
def test_tags_of_answers_without_letters_are_told_apart(make_tokenizer: MakeTokenizer, variant: str) -> None:
    """By the message that they were written for; where that is not seen, by the conversation's prefixes."""
    tokenizer = make_tokenizer(TAGGED_VARIANTS[variant])
    messages = [user("1?"), assistant("42."), user("2?"), assistant("...")]
    for supervised, said in (([1], "42."), ([3], "...")):
        assert shown(tokenizer, *messages, supervised=supervised).count("⟦") == 1
        assert f"assistant\n⟦{said}<|im_end|>⟧" in shown(tokenizer, *messages, supervised=supervised)


SEVERAL = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ ' :) ' }}{% generation %}{{ '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_an_answer_may_have_several_tags(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(SEVERAL)
    messages = [user("Hi"), assistant("Hello "), user("?"), assistant("")]
    assert shown(tokenizer, *messages) == (
        "<user>Hi\n<assistant>⟦Hello ⟧ :) ⟦<|im_end|>⟧\n<user>?\n<assistant> :) ⟦<|im_end|>⟧\n"
    )
    assert rendered(tokenizer, *messages).facts.turns_without_end == 0


def test_what_a_tag_encloses_behind_the_end_of_the_turn_is_supervised_too(make_tokenizer: MakeTokenizer) -> None:
    shouting = make_tokenizer(
        "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>!' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = [user("Hi"), assistant("Hello"), user("?"), assistant("Yo")]
    assert shown(shouting, *messages) == "<user>Hi<assistant>⟦Hello<|im_end|>!⟧<user>?<assistant>⟦Yo<|im_end|>!⟧"
    assert rendered(shouting, *messages).facts.turns_without_end == 2


CLOSING = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% generation %}{{ ' <|im_end|>' }}{% endgeneration %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_tag_around_the_end_of_the_conversation_is_the_last_answers(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(CLOSING)
    messages = [user("Hi"), assistant("Hello"), user("?"), assistant("Fine")]
    assert shown(tokenizer, *messages) == ("<user>Hi\n<assistant>⟦Hello⟧\n<user>?\n<assistant>⟦Fine⟧\n⟦ <|im_end|>⟧")
    assert shown(tokenizer, *messages, supervised=[1]) == (
        "<user>Hi\n<assistant>⟦Hello⟧\n<user>?\n<assistant>Fine\n <|im_end|>"
    )
    facts = rendered(tokenizer, *messages).facts
    assert (facts.turns, facts.turns_without_end) == (2, 1)


@pytest.mark.parametrize(
    ("content", "said"), [("x<|im_end|>", "x<|im_end|><|im_end|>"), ("x ", "x <|im_end|>"), ("x.\n", "x.\n<|im_end|>")]
)
@pytest.mark.parametrize("variant", ["as they should be", "with white space inside", "without the end token"])
def test_what_ends_a_content_does_not_end_its_turn(
    make_tokenizer: MakeTokenizer, variant: str, content: str, said: str
) -> None:
    tokenizer = make_tokenizer(TAGGED_VARIANTS[variant])
    assert shown(tokenizer, user("Hi"), assistant(content)).endswith(f"assistant\n⟦{said}⟧\n")


def test_an_answer_without_an_end_token_has_no_end(make_tokenizer: MakeTokenizer) -> None:
    """White space that the template adds within the tag is no part of what must be written."""
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + ' \n' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    messages = [user("Hi"), assistant("Hello"), user("?"), assistant("Fine")]
    assert shown(tokenizer, *messages) == "<user>Hi<assistant>⟦Hello⟧ \n<user>?<assistant>⟦Fine⟧ \n"
    assert rendered(tokenizer, *messages).facts.turns_without_end == 2


def test_a_header_in_a_tag_ends_before_what_says_that_there_is_no_reasoning(make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<assistant>' + ('<think>' + m.thinking + '</think>' if m.thinking else '</think>') + m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ '<user>' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant></think>{% endif %}"
    )
    assert shown(tokenizer, user("Hi"), assistant("Hello")) == "<user>Hi<assistant></think>⟦Hello<|im_end|>⟧"
    assert shown(tokenizer, user("Hi"), assistant("Hello", thinking="hm")) == (
        "<user>Hi<assistant>⟦<think>hm</think>Hello<|im_end|>⟧"
    )


def test_a_tag_with_letters_is_their_messages_though_there_are_fewer_tags_than_answers(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(TAGGED_VARIANTS["not watched"])
    messages = [user("Hi"), assistant(""), user("?"), assistant("Yes")]
    assert shown(tokenizer, *messages, supervised=[3]).endswith("assistant\n⟦Yes<|im_end|>⟧\n")
    assert "⟦" not in shown(tokenizer, *messages, supervised=[1])


def test_what_stands_before_the_model_is_not_supervised_though_a_tag_encloses_it(make_tokenizer: MakeTokenizer) -> None:
    """DeepSeek V3's training template tags what ends the tools' answers, which is longer than the header of an answer."""
    template = (
        "{% set ns = namespace(tool=false) %}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{% if not ns.tool %}<bot>{% endif %}{% generation %}{{ '<end of tools>' if ns.tool else '' }}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% set ns.tool = false %}{% else %}{{ '<' + m.role + '>' + m.content }}"
        "{% set ns.tool = m.role == 'tool' %}{% endif %}{% endfor %}{{ '<end of tools>' if ns.tool else '' }}"
        "{{ '<bot>' if add_generation_prompt and not ns.tool else '' }}"
    )
    talk = (user("Hi"), assistant("I look"), tool("3"), assistant("It is 3"))
    assert shown(make_tokenizer(template), *talk) == (
        "<user>Hi<bot>⟦I look<|im_end|>⟧<tool>3<end of tools>⟦It is 3<|im_end|>⟧"
    )


def test_of_tags_inside_of_tags_the_outermost_count(make_tokenizer: MakeTokenizer) -> None:
    nested = TAGGED.replace("{{ m.content", "{% generation %}{{ m.content[:2] }}{% endgeneration %}{{ m.content[2:]")
    rendering = rendered(make_tokenizer(nested), user("Hi"), assistant("Hello"))
    assert [turn.text(rendering.text) for turn in rendering.turns] == ["Hello<|im_end|>"]
