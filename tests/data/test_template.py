"""What is learnt, shown as the text between ⟦ and ⟧."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from mlx_sft.data.encode import IGNORED, Encoder, encode_conversation
from mlx_sft.data.formats import Conversation
from mlx_sft.data.mask.assistant_spans import assistant_messages
from mlx_sft.data.template import Facts, Rendering, render
from mlx_sft.errors import UserError

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]
Template = Callable[[str], str]

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": 'Köln "Süd"', "days": 3}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": {}}}]


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def rendered(
    tokenizer: PreTrainedTokenizerFast,
    *messages: dict[str, Any],
    tools: Any = None,
    learnt: Sequence[int] | None = None,
    think_prefill: bool = True,
    silent_turns: bool = True,
    in_context: bool = False,
    **template_kwargs: Any,
) -> Rendering:
    """With every assistant turn to be learnt, unless told otherwise."""
    conversation = Conversation("chats.jsonl:17", list(messages), tools, template_kwargs)
    ends = frozenset({tokenizer.eos_token} if tokenizer.eos_token else ())
    rendering = render(
        tokenizer,
        conversation,
        assistant_messages(messages) if learnt is None else learnt,
        end_tokens=ends,
        think_prefill=think_prefill,
        silent_turns=silent_turns,
        in_context=in_context,
    )
    assert rendering.text == tokenizer.apply_chat_template(
        list(messages), tools=tools, tokenize=False, **template_kwargs
    )
    assert len(rendering.owners) == len(rendering.text)
    return rendering


def shown(tokenizer: PreTrainedTokenizerFast, *messages: dict[str, Any], **options: Any) -> str:
    rendering = rendered(tokenizer, *messages, **options)
    text = rendering.text
    for start, end in sorted(spans(rendering), reverse=True):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text


def spans(rendering: Rendering) -> list[tuple[int, int]]:
    return [span for turn in rendering.turns for span in turn.spans]


def refusal(tokenizer: PreTrainedTokenizerFast, *messages: dict[str, Any], **options: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        rendered(tokenizer, *messages, **options)
    assert caught.value.where == "chats.jsonl:17"
    assert caught.value.hint
    return caught.value


# ChatML in its several spellings

PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURN = "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
LOOP = "{% for message in messages %}"
END = "{% endfor %}"
CHATML_VARIANTS = {
    "one expression": LOOP + TURN + END + PROMPT,
    "set in the loop": LOOP
    + "{% set text = '<|im_start|>' ~ message.role ~ '\n' ~ message.content %}{{ text }}{{ '<|im_end|>\n' }}"
    + END
    + PROMPT,
    "by index": "{% for i in range(messages | length) %}{% set message = messages[i] %}" + TURN + END + PROMPT,
    "plain text": LOOP
    + "\n<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    + END
    + "\n{% if add_generation_prompt %}\n<|im_start|>assistant\n{% endif %}",
    "prompt inside the loop": LOOP
    + TURN
    + "{% if loop.last and add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    + END,
    "system taken out": "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% else %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}" + TURN + END + PROMPT,
    "macro": "{% macro turn(message) %}" + TURN + "{% endmacro %}" + LOOP + "{{ turn(message) }}" + END + PROMPT,
    "filtered loop": "{% for message in messages if message.role != 'tool' %}" + TURN + END + PROMPT,
}


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


def test_a_default_system_prompt_is_not_learnt_even_before_an_opening_assistant(make_tokenizer: MakeTokenizer) -> None:
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


def test_only_the_turns_that_are_asked_for_are_learnt(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (user("a"), assistant("b"), user("c"), assistant("d"))
    last_only = (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧\n"
    )
    assert shown(tokenizer, *turns, learnt=[3]) == last_only


def test_equal_messages_are_told_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    same = user("echo")
    assert shown(tokenizer, same, assistant("echo"), same, assistant("echo")).count("⟦echo<|im_end|>⟧") == 2


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


def test_private_use_characters_in_the_content_do_no_harm(tokenizer: PreTrainedTokenizerFast) -> None:
    icons = "\U000f0000 \U000f0001 \U000f0009 \U00100000 \U0010fffd"
    assert shown(tokenizer, user(icons), assistant(f"{icons}b")).endswith(f"⟦{icons}b<|im_end|>⟧\n")


# Qwen 3


@pytest.fixture(scope="module")
def qwen3(make_tokenizer: MakeTokenizer, public_template: Template) -> PreTrainedTokenizerFast:
    return make_tokenizer(public_template("qwen3"))


def test_qwen3_learns_the_empty_think_block_that_it_adds(qwen3: PreTrainedTokenizerFast) -> None:
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
def test_qwen3_learns_reasoning_where_its_template_keeps_it(
    qwen3: PreTrainedTokenizerFast, thoughtful: dict[str, Any]
) -> None:
    assert shown(qwen3, user("Hi"), thoughtful, user("And?"), thoughtful) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦<think>\nhmm\n</think>\n\nHello<|im_end|>⟧\n"
    )


def test_qwen3_learns_tool_calls_and_not_their_responses(qwen3: PreTrainedTokenizerFast) -> None:
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


# Llama 3


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


def test_the_end_token_directly_after_the_loop_is_learnt(
    make_tokenizer: MakeTokenizer, public_template: Template
) -> None:
    phi = make_tokenizer(public_template("phi3"), eos="<|endoftext|>")
    assert shown(phi, user("Hi"), assistant("Hello")) == (
        "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello<|end|>⟧\n⟦<|endoftext|>⟧"
    )
    assert shown(phi, user("Hi"), assistant("Hello"), user("?")) == (
        "<|user|>\nHi<|end|>\n<|assistant|>\n⟦Hello<|end|>⟧\n<|user|>\n?<|end|>\n<|endoftext|>"
    )


# Against templates whose authors tagged what is generated

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


# What the template leaves out


def left_out(tokenizer: PreTrainedTokenizerFast, *messages: dict[str, Any], **options: Any) -> int:
    return rendered(tokenizer, *messages, **options).facts.turns_with_text_left_out


THINKING = assistant("Hello", reasoning_content="hmm")
NAME_ONLY = {"type": "function", "function": {"name": "now", "arguments": {}}}


@pytest.mark.parametrize(
    ("messages", "count"),
    [
        ([user("Hi"), assistant("Hello")], 0),
        ([user("Hi"), assistant("")], 0),
        ([user("Hi"), THINKING], 0),
        ([user("Hi"), assistant("Hello", thinking="hmm")], 0),
        ([user("Hi"), assistant("Hello", reasoning="hmm")], 0),
        ([user("Hi"), assistant("<think>\nhmm\n</think>\n\nHello")], 0),
        ([user("Hi"), assistant(None, tool_calls=[CALL, NAME_ONLY]), tool("3"), THINKING], 0),
        ([user("Hi"), THINKING, user("And?"), THINKING], 1),
        ([user("Hi"), assistant("<think>\nhmm\n</think>\n\nHello"), user("And?"), THINKING, user("So?"), THINKING], 2),
    ],
)
def test_turns_whose_earlier_reasoning_qwen3_leaves_out_are_counted(
    qwen3: PreTrainedTokenizerFast, messages: list[dict[str, Any]], count: int
) -> None:
    assert left_out(qwen3, *messages) == count


def test_only_turns_that_are_learnt_are_counted(qwen3: PreTrainedTokenizerFast) -> None:
    messages = [user("Hi"), THINKING, user("And?"), THINKING]
    assert left_out(qwen3, *messages, learnt=[3]) == 0


@pytest.mark.parametrize("call", [CALL, NAME_ONLY], ids=["with arguments", "a name alone"])
def test_a_call_that_the_template_leaves_out_is_counted(tokenizer: PreTrainedTokenizerFast, call: Any) -> None:
    messages = [user("Hi"), assistant("I look", tool_calls=[call]), tool("3"), assistant("It is 3")]
    assert left_out(tokenizer, *messages) == 1
    assert shown(tokenizer, *messages).count("⟦I look<|im_end|>⟧") == 1


def test_parts_of_a_content_are_its_words(make_tokenizer: MakeTokenizer) -> None:
    first_only = make_tokenizer(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content[0].text + '<|im_end|>\n' }}{% endfor %}"
        + PROMPT
    )
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    asked = {"role": "user", "content": parts}
    assert left_out(first_only, asked, {"role": "assistant", "content": parts[:1]}) == 0
    assert left_out(first_only, asked, {"role": "assistant", "content": parts}) == 1


STRIPS_REASONING = (
    "{% for m in messages %}{% set content = m.content %}{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}{% endfor %}" + PROMPT
)


def test_a_turn_of_which_only_the_end_is_left_is_learnt_only_where_it_is_asked_for(
    make_tokenizer: MakeTokenizer,
) -> None:
    tokenizer = make_tokenizer(STRIPS_REASONING)
    messages = [
        user("Hi"),
        assistant("<think>hmm</think>"),
        user("And?"),
        assistant("<think>hmm</think>Fine"),
        user("?"),
    ]
    messages += [assistant("")]
    assert left_out(tokenizer, *messages) == 2
    for silent_turns, first in ((False, "<|im_end|>"), (True, "⟦<|im_end|>⟧")):
        assert shown(tokenizer, *messages, silent_turns=silent_turns) == (
            f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{first}\n"
            "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦Fine<|im_end|>⟧\n"
            "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>⟧\n"
        )
    token_ids, mask = encode_conversation(tokenizer, messages)
    learnt = [token_id for token_id, bit in zip(token_ids, mask, strict=True) if bit]
    assert tokenizer.decode(learnt) == "<|im_end|>Fine<|im_end|><|im_end|>"
    (example,) = Encoder(tokenizer).encode(Conversation("chats.jsonl:17", messages))
    assert tokenizer.decode(example.labels[example.labels != IGNORED]) == "Fine<|im_end|><|im_end|>"


# What is refused


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


NOT_UNDERSTOOD = {
    "without a loop over messages": (
        "{{ messages | map(attribute='content') | join('<|im_end|>') }}" + PROMPT,
        "words of message 2 stand where another message is written",
    ),
    "an assistant's words repeated by the next message": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if loop.previtem is defined %}"
        "{{ loop.previtem.content }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}" + PROMPT,
        "words of message 1 stand where another message is written",
    ),
    "text that depends on the letters": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content | unique | join) + '<|im_end|>' }}"
        "{% endfor %}" + PROMPT,
        "its writing depends on the letters of the messages, or on being watched",
    ),
    "another header than the prompt's": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}" + PROMPT,
        "message 2 does not begin with the generation prompt '<|im_start|>assistant\\n'",
    ),
    "a turn in two places": (
        "{% for m in messages %}{{ m.content }}{% endfor %}|{% for m in messages %}{{ m.content }}{% endfor %}",
        "it writes message 2 in several places",
    ),
}


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


@pytest.mark.parametrize("name", ["add_generation_prompt", "tokenize", "messages", "continue_final_message"])
def test_arguments_that_are_not_the_templates_are_refused(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    error = refusal(tokenizer, user("Hi"), assistant("Hello"), **{name: True})
    assert error.what == f"{name} is not a variable of a chat template"


def test_the_tool_use_template_of_several_is_taken_where_there_are_tools(
    make_tokenizer: MakeTokenizer, public_template: Template
) -> None:
    tokenizer = make_tokenizer({"default": CHATML_VARIANTS["plain text"], "tool_use": public_template("qwen3")})
    assert "<tools>" in shown(tokenizer, user("Hi"), assistant("Hello"), tools=TOOLS)
    assert "<think>" not in shown(tokenizer, user("Hi"), assistant("Hello"))


# The header, turn by turn


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


def test_a_way_of_watching_that_sees_no_message_does_not_tell_the_header(make_tokenizer: MakeTokenizer) -> None:
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
def test_an_opening_assistant_is_learnt_as_the_answer_to_a_question(
    make_tokenizer: MakeTokenizer, template: str, opening: str, later: list[dict[str, Any]]
) -> None:
    assert shown(make_tokenizer(template), assistant("Yo"), *later).startswith(opening)


def test_a_header_that_the_prompt_supplies_elsewhere_is_not_learnt(make_tokenizer: MakeTokenizer) -> None:
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


def test_an_end_token_that_the_next_message_writes_is_learnt(make_tokenizer: MakeTokenizer) -> None:
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


# Tags of the template's author

TAGGED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}" + PROMPT
)
TAGGED_VARIANTS = {
    "as they should be": TAGGED,
    "with the header inside": TAGGED.replace(
        "{{ '<|im_start|>assistant\n' }}{% generation %}", "{% generation %}{{ '<|im_start|>assistant\n' }}"
    ),
    "with a part of the header inside": TAGGED.replace(
        "assistant\n' }}{% generation %}", "' }}{% generation %}{{ 'assistant\n' }}", 1
    ),
    "with white space inside": TAGGED.replace(
        "'<|im_end|>' }}{% endgeneration %}{{ '\n' }}", "'<|im_end|>\n' }}{% endgeneration %}"
    ),
    "without the end token": TAGGED.replace(
        "m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}",
        "m.content }}{% endgeneration %}{{ '<|im_end|>\n' }}",
    ),
    "in a macro": "{% macro said(m) %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% endmacro %}"
    + TAGGED.replace("{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}", "{{ said(m) }}"),
    "not watched": "{% set ns = namespace(i=-1) %}{% for letter in 'xxxx' %}{% set ns.i = ns.i + 1 %}"
    "{% if ns.i < messages | length %}{{ '<|im_start|>' + messages[ns.i].role + '\n' }}"
    "{% if messages[ns.i].role == 'assistant' %}{% generation %}{{ messages[ns.i].content }}{% endgeneration %}"
    "{% else %}{{ messages[ns.i].content }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}" + PROMPT,
}


@pytest.mark.parametrize("template", TAGGED_VARIANTS.values(), ids=TAGGED_VARIANTS.keys())
def test_tags_say_what_is_generated(make_tokenizer: MakeTokenizer, template: str) -> None:
    tokenizer = make_tokenizer(template)
    messages = [user("Hi"), assistant("Hello 😀 "), user("And?"), assistant("42.")]
    assert shown(tokenizer, *messages) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello 😀 <|im_end|>⟧\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n⟦42.<|im_end|>⟧\n"
    )
    assert "⟦Hello" not in shown(tokenizer, *messages, learnt=[3])
    assert rendered(tokenizer, *messages).facts == Facts(turns=2)


def test_a_tag_around_anothers_words_is_refused(make_tokenizer: MakeTokenizer) -> None:
    wrong = make_tokenizer(
        "{% for m in messages %}{% generation %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endgeneration %}{% endfor %}" + PROMPT
    )
    assert refusal(wrong, user("Hi"), assistant("Hello")).what.endswith("it tags words of others as generated")


# Ways of writing that hide the loop

WRITTEN_LATER = {
    "an accumulator": "{% set ns = namespace(text='') %}{% for m in messages %}"
    "{% set ns.text = ns.text + '<|im_start|>' + m.role + '\n' + m.content ~ '<|im_end|>' + '\n' %}{% endfor %}"
    "{{ ns.text }}" + PROMPT,
    "an accumulator by concatenation": "{% set ns = namespace(text='') %}{% for m in messages %}"
    "{% set ns.text = ns.text ~ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' %}{% endfor %}"
    "{{ ns.text }}" + PROMPT,
    "a list that is joined": "{% set ns = namespace(parts=[]) %}{% for m in messages %}"
    "{% set ns.parts = ns.parts + ['<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n'] %}{% endfor %}"
    "{{ ns.parts | join }}" + PROMPT,
    "a block that is trimmed": "{% set text %}\n\n {% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}  {% endset %}{{ text | trim + '\n' }}" + PROMPT,
    "a block that is stripped": "{% set text %}\n\n {% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}  {% endset %}{{ text.strip() + '\n' }}" + PROMPT,
    "a filter block": "{% filter trim %}  {% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}  {% endfilter %}{{ '\n' }}" + PROMPT,
    "a macro whose text is trimmed": "{% macro turn(m) %}\n  "
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}  {% endmacro %}"
    "{% for m in messages %}{{ turn(m) | trim + '\n' }}{% endfor %}" + PROMPT,
    "a macro around the loop": "{% macro all(list) %}  {% for m in list %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% endmacro %}{{ all(messages) | trim + '\n' }}" + PROMPT,
    "a call block": "{% macro turn(role) %}{{ '<|im_start|>' + role + '\n' + caller() + '<|im_end|>\n' }}{% endmacro %}"
    "{% for m in messages %}{% call turn(m.role) %}{{ m.content }}{% endcall %}{% endfor %}" + PROMPT,
    "messages made of messages": "{% set ns = namespace(list=[]) %}{% for m in messages %}"
    "{% set ns.list = ns.list + [{'role': m.role, 'text': m.content}] %}{% endfor %}"
    "{% for m in ns.list %}{{ '<|im_start|>' + m.role + '\n' + m.text + '<|im_end|>\n' }}{% endfor %}" + PROMPT,
    "numbers": "{% for i in range(messages | length) %}"
    "{{ '<|im_start|>' + messages[i].role + '\n' + messages[i].content + '<|im_end|>\n' }}{% endfor %}" + PROMPT,
    "the last outside the loop": "{% for m in messages[:-1] %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% set m = messages[-1] %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}" + PROMPT,
    "no loop at all": "{{ '<|im_start|>user\n' + messages[0].content + '<|im_end|>\n' }}"
    "{% if messages | length > 1 %}{{ '<|im_start|>assistant\n' + messages[1].content + '<|im_end|>\n' }}{% endif %}"
    "{% if messages | length > 2 %}{{ '<|im_start|>user\n' + messages[2].content + '<|im_end|>\n' }}{% endif %}"
    "{% if messages | length > 3 %}{{ '<|im_start|>assistant\n' + messages[3].content + '<|im_end|>\n' }}{% endif %}"
    + PROMPT,
}


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


@pytest.mark.parametrize("filter_", ["tojson(ensure_ascii=true)", "urlencode", "upper"])
def test_text_that_depends_on_letters_is_coloured_in_ascii(make_tokenizer: MakeTokenizer, filter_: str) -> None:
    tokenizer = make_tokenizer(
        LOOP + TURN.replace("message['content']", f"(message.content | {filter_})") + END + PROMPT
    )
    turns = [message for _ in range(15) for message in (user("Né? yes"), assistant("Héllo, You"))]
    text = shown(tokenizer, *turns)
    said = {"upper": "HÉLLO, YOU", "urlencode": "H%C3%A9llo%2C%20You"}.get(filter_, '"H\\u00e9llo, You"')
    assert text.count(f"<|im_start|>assistant\n⟦{said}<|im_end|>⟧\n") == 15
    assert text.count("⟦") == 15


def test_tool_results_inside_the_turn_that_called_are_found_by_the_conversations_beginnings(
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


# The context of inference


def test_a_turn_may_be_asked_to_stand_in_the_context_of_inference(
    make_tokenizer: MakeTokenizer, qwen3: PreTrainedTokenizerFast
) -> None:
    thoughtful = assistant("Hello", reasoning_content="hmm")
    assert shown(qwen3, user("Hi"), thoughtful, learnt=[1], in_context=True).endswith(
        "hmm\n</think>\n\nHello<|im_end|>⟧\n"
    )
    assert shown(qwen3, user("Hi"), thoughtful, user("And?"), thoughtful, learnt=[3], in_context=True)
    counting = make_tokenizer("{{ messages | length }} " + LOOP + TURN + END + PROMPT)
    conversation = Conversation("chats.jsonl:17", [user("Hi"), assistant("Hello 😀")])
    rendering = render(counting, conversation, [1], end_tokens=frozenset({"<|im_end|>"}), in_context=True)
    assert rendering.text == "1 <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello 😀<|im_end|>"
    assert [turn.text(rendering.text) for turn in rendering.turns] == ["Hello 😀<|im_end|>"]
    assert len(rendering.owners) == len(rendering.text)
    no_prompt = make_tokenizer(
        LOOP
        + TURN
        + "{% if loop.last and message.role == 'user' %}{{ raise_exception('unanswered') }}{% endif %}"
        + END
        + PROMPT
    )
    error = refusal(no_prompt, user("Hi"), assistant("Hello"), learnt=[1], in_context=True)
    assert "rejects the conversation where the model is to write message 2" in error.what


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


def test_an_empty_think_block_may_be_left_out(qwen3: PreTrainedTokenizerFast) -> None:
    text = shown(qwen3, user("Hi"), assistant("Hello"), think_prefill=False)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n⟦Hello<|im_end|>⟧\n")
    full = assistant("Hello", reasoning_content="hmm")
    assert shown(qwen3, user("Hi"), full, think_prefill=False) == shown(qwen3, user("Hi"), full)


# System messages


def test_system_messages_that_are_left_out_or_folded_are_counted(
    make_tokenizer: MakeTokenizer, public_template: Template, qwen3: PreTrainedTokenizerFast
) -> None:
    def systems(tokenizer: PreTrainedTokenizerFast, *messages: dict[str, Any]) -> tuple[int, int]:
        facts = rendered(tokenizer, *messages).facts
        return facts.systems_left_out, facts.systems_folded

    turns = [user("Hi"), assistant("Hello")]
    developer = {"role": "developer", "content": "Be brief"}
    assert systems(qwen3, system("Be brief"), *turns) == (0, 0)
    assert systems(qwen3, developer, *turns) == (1, 0)
    assert systems(qwen3, system(""), *turns) == (0, 0)
    folding = make_tokenizer(public_template("gemma3"), eos="<end_of_turn>", bos="<bos>")
    assert systems(folding, system("Be brief"), *turns) == (0, 1)
    users_only = make_tokenizer(
        "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}" + PROMPT
    )
    assert systems(users_only, system("Be brief"), *turns) == (1, 0)


def test_a_template_that_takes_no_system_message_is_said_to(
    make_tokenizer: MakeTokenizer, public_template: Template
) -> None:
    gemma = make_tokenizer(public_template("gemma"))
    assert "takes no system message" in refusal(gemma, system("Be brief"), user("Hi"), assistant("Hello")).hint
    error = refusal(gemma, system("Be brief"), user("Hi"), user("Hi"), assistant("Hello"))
    assert error.hint.startswith("change the messages")


def test_what_is_not_to_be_learnt_needs_no_understanding(make_tokenizer: MakeTokenizer) -> None:
    template, _ = NOT_UNDERSTOOD["a turn in two places"]
    assert "⟦" not in shown(make_tokenizer(template), user("é? yes"), assistant("Hello é"), learnt=[])


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=30)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_any_words_are_learnt_where_the_template_puts_them(
    tokenizer: PreTrainedTokenizerFast, turns: list[tuple[str, str]]
) -> None:
    messages = [message for said, answered in turns for message in (user(said), assistant(answered))]
    rendering = rendered(tokenizer, *messages)
    assert [turn.text(rendering.text) for turn in rendering.turns] == [f"{a}<|im_end|>" for _, a in turns]
