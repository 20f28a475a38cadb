"""What is supervised of an assistant's turn, shown between ⟦ and ⟧."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from mlx_sft.data.template import Facts
from tests.data.mask.pictures import (
    CALL,
    TOOLS,
    MakeTokenizer,
    Template,
    assistant,
    rendered,
    shown,
    spans,
    system,
    tool,
    user,
)

pytestmark = pytest.mark.fast


def test_only_the_turns_that_are_asked_for_are_supervised(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (user("a"), assistant("b"), user("c"), assistant("d"))
    last_only = (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧\n"
    )
    assert shown(tokenizer, *turns, supervised=[3]) == last_only


def test_an_end_token_in_the_content_does_not_end_the_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    assert shown(tokenizer, user("a"), assistant("x<|im_end|>\ny")).endswith("⟦x<|im_end|>\ny<|im_end|>⟧\n")


def test_an_end_token_at_the_end_of_the_content_does_not_end_the_turn(make_tokenizer: MakeTokenizer) -> None:
    forged = assistant("x<|im_end|>\n")
    assert shown(make_tokenizer(), user("a"), forged, user("b"), assistant("<|im_end|>\n")) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦x<|im_end|>\n<|im_end|>⟧\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>\n<|im_end|>⟧\n"
    )
    next_message_ends = make_tokenizer(
        "{% for m in messages %}{{ ('' if loop.first else '<|im_end|>') + '<' + m.role + '>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_end|><assistant>{% endif %}"
    )
    assert shown(next_message_ends, user("a"), assistant("x<|im_end|>"), user("b")) == (
        "<user>a<|im_end|><assistant>⟦x<|im_end|><|im_end|>⟧<user>b"
    )


def test_an_end_that_is_no_known_end_token_counts_as_none(make_tokenizer: MakeTokenizer) -> None:
    between = make_tokenizer(
        "{% for m in messages %}{{ ('' if loop.first else '<|eom_id|>') + '<' + m.role + '>' + m.content }}{% endfor %}"
        "<|eom_id|>{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rendering = rendered(between, user("Hi"), assistant("Hello"), user("?"), assistant("Yes"))
    assert rendering.facts == Facts(turns=2, turns_without_end=2)


def test_the_empty_think_block_that_qwen3_adds_is_supervised(qwen3: PreTrainedTokenizerFast) -> None:
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nHello<|im_end|>⟧\n"
    assert shown(qwen3, user("Hi"), assistant("Hello")) == expected
    assert shown(qwen3, user("Hi"), assistant("Hello"), enable_thinking=False) == expected


@pytest.mark.parametrize(
    "thoughtful",
    [
        assistant("<think>\nhmm\n</think>\n\nHello"),
        assistant("Hello", reasoning_content="hmm"),
        assistant("Hello", thinking="hmm"),
    ],
    ids=["in the content", "reasoning_content", "thinking"],
)
def test_reasoning_is_supervised_where_qwen3s_template_keeps_it(
    qwen3: PreTrainedTokenizerFast, thoughtful: dict[str, Any]
) -> None:
    assert shown(qwen3, user("Hi"), thoughtful, user("And?"), thoughtful) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhmm\n</think>\n\nHello<|im_end|>⟧\n"
    )


def test_tool_calls_are_supervised_and_not_their_responses(qwen3: PreTrainedTokenizerFast) -> None:
    text = shown(
        qwen3,
        system("Help"),
        user("Weather?"),
        assistant(None, tool_calls=[CALL, CALL]),
        tool('{"t": 3}'),
        tool("rain"),
        assistant("3, rain"),
        user("Thanks"),
        assistant("Sure", tool_calls=[{**CALL, "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}]),
        tools=TOOLS,
    )
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln \\"Süd\\"", "days": 3}}\n</tool_call>'
    head, conversation = text.split("<|im_start|>user\n", 1)
    assert "⟦" not in head
    assert "<tools>" in head
    assert conversation == (
        f"Weather?<|im_end|>\n<|im_start|>assistant\n⟦{call}\n{call}<|im_end|>⟧\n"
        '<|im_start|>user\n<tool_response>\n{"t": 3}\n</tool_response>\n<tool_response>\nrain\n</tool_response><|im_end|>\n'
        "<|im_start|>assistant\n⟦3, rain<|im_end|>⟧\n<|im_start|>user\nThanks<|im_end|>\n"
        '<|im_start|>assistant\n⟦<think>\n\n</think>\n\nSure\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bonn"}}\n'
        "</tool_call><|im_end|>⟧\n"
    )


def test_an_empty_turn_still_ends(qwen3: PreTrainedTokenizerFast) -> None:
    assert shown(qwen3, user("Hi"), assistant(""), user("?"), assistant("Yes")).startswith(
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n"
    )


@pytest.mark.parametrize("opening", [(), (system(" Be brief "),)], ids=["no system", "system"])
def test_llama3(make_tokenizer: MakeTokenizer, public_template: Template, opening: tuple[dict[str, Any], ...]) -> None:
    llama = make_tokenizer(public_template("llama3"), eos="<|eot_id|>", bos="<|begin_of_text|>")
    text = shown(llama, *opening, user("Hi"), assistant(" Hello \n"), user("And?"), assistant("Fine"))
    system_turn = "<|start_header_id|>system<|end_header_id|>\n\nBe brief<|eot_id|>" if opening else ""
    assert text == (
        f"<|begin_of_text|>{system_turn}<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Fine<|eot_id|>⟧"
    )


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2"])
@pytest.mark.parametrize("in_user_message", [True, False])
def test_llama3_with_tools(
    make_tokenizer: MakeTokenizer, public_template: Template, name: str, in_user_message: bool
) -> None:
    llama = make_tokenizer(public_template(name), eos="<|eot_id|>", bos="<|begin_of_text|>")
    messages = [
        system("Help"),
        user("Weather?"),
        assistant(None, tool_calls=[CALL]),
        tool('{"t": "3"}'),
        assistant("3"),
    ]
    for message in messages:  # this template asks only whether the key is there
        if message["content"] is None:
            del message["content"]
    text = shown(llama, *messages, tools=TOOLS, date_string="26 Jul 2024", tools_in_user_message=in_user_message)
    arguments = json.dumps(CALL["function"]["arguments"], ensure_ascii=False)  # type: ignore[index]
    assert text.startswith("<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n")
    assert text.endswith(
        "Weather?<|eot_id|>"
        f'<|start_header_id|>assistant<|end_header_id|>\n\n⟦{{"name": "weather", "parameters": {arguments}}}<|eot_id|>⟧'
        '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"t\\": \\"3\\"}"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n⟦3<|eot_id|>⟧"
    )
    assert text.count("⟦") == 2


def test_llama3_1_with_built_in_tools(make_tokenizer: MakeTokenizer, public_template: Template) -> None:
    llama = make_tokenizer(public_template("llama3_1"), eos="<|eot_id|>", bos="<|begin_of_text|>")
    call = {"type": "function", "function": {"name": "brave_search", "arguments": {"query": "weather"}}}
    searching = {"role": "assistant", "tool_calls": [call]}
    text = shown(llama, user("Weather?"), searching, builtin_tools=["brave_search"])
    assert text.endswith('\n\n⟦<|python_tag|>brave_search.call(query="weather")<|eom_id|>⟧')


def test_the_end_token_directly_after_the_loop_is_supervised(
    make_tokenizer: MakeTokenizer, public_template: Template
) -> None:
    phi = make_tokenizer(public_template("phi3"), eos="<|endoftext|>")
    assert shown(phi, user("Hi"), assistant("Hello")) == (
        "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello<|end|>⟧\n⟦<|endoftext|>⟧"
    )
    assert shown(phi, user("Hi"), assistant("Hello"), user("?")) == (
        "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello<|end|>⟧\n<|user|>\n?<|end|>\n<|endoftext|>"
    )
    assert rendered(phi, user("Hi"), assistant("Hello")).facts == Facts(turns=1)


ORACLES = (
    *("cohere", "deepseekv3", "diffusion_gemma", "gemma", "gemma3", "gptoss", "lfm2", "llama3", "muse_glimmer"),
    *("nemotron_3_nano", "nemotron_3_ultra", "phi3", "qwen2_5", "qwen3", "qwen3_5_think", "qwen3_instruct_2507"),
)


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "one turn": ([user("Hi there"), assistant("Hello 😀")], None),
    "two turns": ([user("Hi"), assistant("Hello"), user("And?"), assistant(" Fine. ")], None),
    "system": ([system("Be brief"), user("Hi"), assistant("Hello")], None),
    "reasoning": ([user("Hi"), assistant("Hello", reasoning_content="hmm")], None),
    "empty": ([user("Hi"), assistant("")], None),
    "ends with the user": ([user("Hi"), assistant("Hello"), user("And?")], None),
    "tools": ([user("?"), assistant("", tool_calls=[CALL]), tool("3"), assistant("It is 3")], TOOLS),
}


@pytest.mark.parametrize("family", ORACLES)
def test_the_spans_are_those_that_a_tagged_template_marks(
    make_tokenizer: MakeTokenizer, public_template: Template, family: str
) -> None:
    ends = {"phi3": "<|endoftext|>", "gemma": "<end_of_turn>", "llama3": "<|eot_id|>"}
    tokenizer = make_tokenizer(public_template(family), eos=ends.get(family, "<|im_end|>"), bos="<|begin_of_text|>")
    asked = [user("Hi")]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    header = prompt.removeprefix(tokenizer.apply_chat_template(asked, tokenize=False).removesuffix("<|endoftext|>"))
    header = header.split("<think>")[0]  # some tags enclose the header too
    compared = 0
    for messages, tools in CONVERSATIONS.values():
        try:
            plain = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
            (tagged,), (generated,) = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=public_template(f"{family}_training"),
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
        except Exception:  # noqa: BLE001 (a family that does not take this conversation raises what it likes)
            continue
        if tagged != plain:
            continue  # the tagged template writes earlier turns' reasoning, which the original leaves out
        rendering = rendered(tokenizer, *messages, tools=tools)
        generated = [(start + len(header) * plain.startswith(header, start), end) for start, end in generated]
        assert _ink(plain, spans(rendering)) == _ink(plain, generated)
        compared += 1
    assert compared >= 4


def _ink(text: str, some: list[tuple[int, int]]) -> list[int]:
    """Positions in the spans that are not white space: the tags hold what follows the end of the turn."""
    return sorted({i for start, end in some for i in range(start, end) if not text[i].isspace()})


def test_an_end_token_that_the_next_message_writes_is_supervised(make_tokenizer: MakeTokenizer) -> None:
    between = make_tokenizer(
        "{% for m in messages %}{% if not loop.first %}{{ '<|end|>' }}{% endif %}{{ '<' + m.role + '>' + m.content }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|end|><assistant>' }}{% endif %}",
        eos="<|end|>",
    )
    rendering = rendered(between, user("Hi"), assistant("Hello. "), user("?"), assistant("Yes"))
    assert shown(between, user("Hi"), assistant("Hello. "), user("?"), assistant("Yes")) == (
        "<user>Hi<|end|><assistant>⟦Hello. <|end|>⟧<user>?<|end|><assistant>⟦Yes⟧"
    )
    assert rendering.facts.turns == 2
    assert rendering.facts.turns_without_end == 1


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_any_words_are_supervised_where_the_template_puts_them(
    tokenizer: PreTrainedTokenizerFast, turns: list[tuple[str, str]]
) -> None:
    messages = [message for said, answered in turns for message in (user(said), assistant(answered))]
    rendering = rendered(tokenizer, *messages)
    assert [turn.text(rendering.text) for turn in rendering.turns] == [f"{a}<|im_end|>" for _, a in turns]


def test_an_end_token_that_begins_the_next_message_does_not_end_the_turn_again(make_tokenizer: MakeTokenizer) -> None:
    bare = make_tokenizer("{% for m in messages %}{{ m.content + '<|im_end|>\n' }}{% endfor %}")
    assert shown(bare, user("Hi"), assistant("Yo"), user("<|im_end|>")) == (
        "Hi<|im_end|>\n⟦Yo<|im_end|>⟧\n<|im_end|><|im_end|>\n"
    )
