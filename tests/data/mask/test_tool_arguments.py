"""Arguments of calls, as text and as objects, reach every template in the form that it writes unquoted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_sft.data.conversation import Conversation
from mlx_sft.data.encode import Encoder, encode_conversation

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


def test_arguments_that_are_no_object_stay_as_they_are(make_tokenizer: Callable[..., Any]) -> None:
    assert '"[1' in text(make_tokenizer(TEMPLATES["takes objects"]), "[1, 2]")
    assert "not json" in text(make_tokenizer(TEMPLATES["takes both"]), "not json")


def test_the_function_for_your_own_use_takes_messages_as_they_are(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(TEMPLATES["takes objects"])
    messages = conversation(TEXT).messages
    token_ids, _ = encode_conversation(tokenizer, messages)
    assert token_ids == tokenizer.apply_chat_template(messages, return_dict=False)
