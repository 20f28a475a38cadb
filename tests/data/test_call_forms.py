"""Calls reach every template in the form that it takes: arguments as text or as objects, content absent, null or empty."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_sft.data.conversation import Conversation
from mlx_sft.data.encode import Encoder, EncodeSettings, encode_conversation
from mlx_sft.data.template import Facts

pytestmark = pytest.mark.fast

ARGUMENTS = {"city": 'Köln "Süd"', "days": 3}
TEXT = json.dumps(ARGUMENTS, ensure_ascii=False)
LOOP = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{% set a = call.function.arguments %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "takes objects": LOOP.replace("CALL", "{{ a | tojson }}"),
    "takes objects alone": LOOP.replace("CALL", "{ {%- for k, v in a.items() %}{{ k }}={{ v }};{% endfor %}}"),
    "takes text": LOOP.replace("CALL", "{{ '' + a }}"),
    "writes as it is": LOOP.replace("CALL", "{{ a }}"),
    "takes both": LOOP.replace("CALL", "{{ a if a is string else a | tojson }}"),
}


def conversation(arguments: Any) -> Conversation:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return Conversation("chats.jsonl:1", messages)


def text(tokenizer: PreTrainedTokenizerFast, arguments: Any) -> str:
    (example,) = Encoder(tokenizer).encode(conversation(arguments))
    return str(tokenizer.decode(example.token_ids))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_arguments_as_text_are_never_quoted(make_tokenizer: Callable[..., Any], template: str) -> None:
    written = text(make_tokenizer(template), TEXT)
    assert "\\" + '"city' not in written
    assert 'Köln "Süd"' in written or 'Köln \\"Süd\\"' in written


def test_objects_are_text_for_a_template_that_takes_text_alone(make_tokenizer: Callable[..., Any]) -> None:
    assert TEXT in text(make_tokenizer(TEMPLATES["takes text"]), ARGUMENTS)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_objects_are_never_written_as_python_writes_them(make_tokenizer: Callable[..., Any], template: str) -> None:
    assert "{'" not in text(make_tokenizer(template), ARGUMENTS)


def test_a_template_that_takes_both_gets_objects(
    make_tokenizer: Callable[..., Any], public_template: Callable[[str], str]
) -> None:
    both = LOOP.replace("CALL", "{{ '{' + a + '}' if a is string else a | tojson }}")
    for tokenizer in (make_tokenizer(both), make_tokenizer(public_template("gemma4"))):
        assert text(tokenizer, TEXT) == text(tokenizer, ARGUMENTS)
        assert "{{" not in text(tokenizer, TEXT)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_empty_arguments_are_taken_by_every_template(make_tokenizer: Callable[..., Any], template: str) -> None:
    written = text(make_tokenizer(template), {})
    assert written.count("{}") == 1
    assert '"{}"' not in written


def test_arguments_that_are_no_object_stay_as_they_are(make_tokenizer: Callable[..., Any]) -> None:
    assert '"[1' in text(make_tokenizer(TEMPLATES["takes objects"]), "[1, 2]")
    assert "not json" in text(make_tokenizer(TEMPLATES["takes both"]), "not json")


def test_the_function_for_your_own_use_takes_messages_as_they_are(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(TEMPLATES["takes objects"])
    messages = conversation(TEXT).messages
    token_ids, _ = encode_conversation(tokenizer, messages)
    assert token_ids == tokenizer.apply_chat_template(messages, return_dict=False)


# Content

BEGIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
CALLS = "{% for call in m.tool_calls %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
WANT = {
    "anything": "{{ m.content or '' }}{% if m.tool_calls %}CALLS{% endif %}",
    "no content": "{% if 'content' in m %}{{ m.content }}{% else %}CALLS{% endif %}",
    "null": "{% if m['content'] is none %}CALLS{% else %}{{ m['content'] + '' }}{% endif %}",
    "text": "{{ m['content'] + '' }}{% if m.tool_calls %}CALLS{% endif %}",
    "text, else None": "{{ m.get('content') }}{% if m.tool_calls %}CALLS{% endif %}",
    "nothing called": "{{ m['content'] + '' }}",
}
CONTENTS: dict[str, dict[str, Any]] = {"absent": {}, "empty": {"content": ""}, "blank": {"content": "\n"}}


def spoken(content: dict[str, Any], arguments: Any = ARGUMENTS) -> Conversation:
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Warm? None or null?"},
        {"role": "assistant", **content, "tool_calls": [call]},
        {"role": "tool", "content": "null"},
        {"role": "assistant", "content": "Yes."},
    ]
    return Conversation("chats.jsonl:1", messages)


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
@pytest.mark.parametrize("arguments", [ARGUMENTS, TEXT], ids=["object", "text"])
@pytest.mark.parametrize("want", [want for want in WANT if want != "nothing called"])
def test_a_call_without_words_is_written_by_every_template(
    make_tokenizer: Callable[..., Any], want: str, content: dict[str, Any], arguments: Any
) -> None:
    tokenizer = make_tokenizer(BEGIN + WANT[want].replace("CALLS", CALLS) + END)
    (example,) = Encoder(tokenizer).encode(spoken(content, arguments))
    supervised = tokenizer.decode(example.token_ids[example.loss_weights > 0]).replace("\n", "")
    assert supervised == f"[weather {TEXT}]<|im_end|>Yes.<|im_end|>"
    assert example.facts.turns == 2
    assert example.facts.turns_with_text_left_out == 0


@pytest.mark.parametrize("content", CONTENTS.values(), ids=CONTENTS.keys())
def test_a_call_that_no_form_makes_a_template_write_is_counted(
    make_tokenizer: Callable[..., Any], content: dict[str, Any]
) -> None:
    (example,) = Encoder(make_tokenizer(BEGIN + WANT["nothing called"] + END)).encode(spoken(content))
    assert example.facts.turns == 1
    assert example.facts.turns_with_text_left_out == 1


def test_the_form_that_was_chosen_is_told(make_tokenizer: Callable[..., Any]) -> None:
    def facts(want: str, content: dict[str, Any], arguments: Any) -> Facts:
        tokenizer = make_tokenizer(BEGIN + WANT[want].replace("CALLS", CALLS) + END)
        (example,) = Encoder(tokenizer).encode(spoken(content, arguments))
        return example.facts

    assert facts("anything", {}, ARGUMENTS) == Facts(turns=2)
    assert facts("anything", {}, TEXT) == Facts(turns=2, arguments_as_objects=1)
    assert facts("null", {}, ARGUMENTS) == Facts(turns=2, contents_as_null=1)
    assert facts("text", {}, ARGUMENTS) == Facts(turns=2, contents_as_empty=1)
    assert facts("no content", {"content": ""}, ARGUMENTS) == Facts(turns=2, contents_left_out=1)
    told = Encoder(make_tokenizer(TEMPLATES["takes text"])).encode(conversation(ARGUMENTS))[0].facts
    assert told.arguments_as_text == 1


def test_each_turn_as_an_example_tells_the_form_once(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(BEGIN + WANT["null"].replace("CALLS", CALLS) + END)
    examples = Encoder(tokenizer, EncodeSettings(train_on="every-turn")).encode(spoken({}))
    assert [example.facts.contents_as_null for example in examples] == [1, 0]


@pytest.mark.parametrize("name", ["deepseekv3", "deepseek_r1_distill", "qwen3", "llama3_1", "glm4moe"])
@pytest.mark.parametrize("arguments", [ARGUMENTS, TEXT], ids=["object", "text"])
def test_public_templates_take_openais_own_form(
    make_tokenizer: Callable[..., Any], public_template: Callable[[str], str], name: str, arguments: Any
) -> None:
    tokenizer = make_tokenizer(public_template(name))
    (example,) = Encoder(tokenizer).encode(spoken({}, arguments))
    supervised = tokenizer.decode(example.token_ids[example.loss_weights > 0])
    assert "weather" in supervised
    assert "Köln" in supervised
    assert '\\"city' not in supervised
    assert "Warm" not in supervised
    assert example.facts.turns == 2
