from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_sft.data.formats import SHAPES, Conversation, Document, read_item
from mlx_sft.data.readers import Row
from mlx_sft.errors import UserError

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}


def item(**row: Any) -> Conversation | Document:
    return read_item(Row("chats.jsonl:17", row))


def conversation(**row: Any) -> Conversation:
    read = item(**row)
    assert isinstance(read, Conversation)
    return read


def test_messages_are_a_conversation() -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    read = conversation(messages=[USER, ASSISTANT], tools=tools, chat_template_kwargs={"enable_thinking": False})
    assert read == Conversation("chats.jsonl:17", [USER, ASSISTANT], tools, {"enable_thinking": False}, 0)


def test_nulls_are_left_out_and_text_parts_joined() -> None:
    read = conversation(
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "3", "tool_calls": None},
            {"role": "assistant", "content": "It is 3", "tool_calls": []},
        ],
        tools=None,
        other=3,
    )
    assert read.messages == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "It is 3"},
    ]
    assert read.tools is None


def test_a_tool_call_may_be_bare_and_its_arguments_text() -> None:
    bare = {"name": "weather", "arguments": '{"city": "Köln"}'}
    read = conversation(messages=[USER, {"role": "assistant", "tool_calls": [bare]}])
    assert read.messages[1]["tool_calls"] == [bare]


def test_prompt_and_completion_become_two_messages() -> None:
    read = conversation(prompt="Hi", completion="Hello")
    assert read.messages == [USER, ASSISTANT]
    assert read.first_learnt == 1


def test_only_the_completion_of_message_lists_is_learnt() -> None:
    read = conversation(prompt=[USER, ASSISTANT, USER], completion=[ASSISTANT])
    assert read.messages == [USER, ASSISTANT, USER, ASSISTANT]
    assert read.first_learnt == 3


def test_text_is_a_document() -> None:
    assert item(text=" a ") == Document("chats.jsonl:17", " a ")


def test_a_row_with_keys_of_several_shapes_is_the_first_of_them() -> None:
    assert conversation(messages=[USER, ASSISTANT], prompt="x", completion="y", text="z").messages == [USER, ASSISTANT]


def test_a_table_may_hold_structure_as_json_text() -> None:
    read = conversation(messages=json.dumps([USER, ASSISTANT]), tools="", chat_template_kwargs='{"a": 1}')
    assert read.messages == [USER, ASSISTANT]
    assert read.tools is None
    assert read.template_kwargs == {"a": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "a row without a known shape: it is empty"),
        ({"a": 1, "messages": None}, "a row without a known shape: it has 'a', 'messages' (null)"),
        ({"prompt": "a"}, "a row without a known shape: it has 'prompt'"),
        ({"messages": []}, "messages is empty"),
        ({"messages": 3}, "messages must be a list, not a number"),
        ({"messages": "hello"}, "messages is neither a list or object nor JSON text of one"),
        ({"messages": ["hello"]}, "messages[0] must be an object with role and content, not a string"),
        ({"messages": [{"content": "a"}]}, "messages[0] has no role"),
        ({"messages": [{"role": None, "content": "a"}]}, "messages[0] has no role"),
        (
            {"messages": [{"role": "usr", "content": "a"}]},
            "messages[0] has the unknown role 'usr'; did you mean \"user\"?",
        ),
        (
            {"messages": [{"role": "x" * 10_000, "content": "a"}]},
            f"messages[0] has the unknown role '{'x' * 59}...; known are system, developer, user, assistant, tool",
        ),
        (
            {"messages": [{"role": ["user"], "content": "a"}]},
            "messages[0] has the unknown role ['user']; known are system, developer, user, assistant, tool",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0] has no content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0] has no content"),
        (
            {"messages": [USER, {"role": "assistant", "content": 3}]},
            "messages[1].content must be a string or a list of text parts, not a number",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            'messages[0].content[0] is not a text part, such as {"type": "text", "text": "..."}',
        ),
        (
            {"messages": [USER, {**ASSISTANT, "reasoning_content": 3}]},
            "messages[1].reasoning_content must be a string, not a number",
        ),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, "messages[0] has tool_calls, which only"),
        ({"messages": [{**ASSISTANT, "tool_calls": "x"}]}, "messages[0].tool_calls must be a list, not a string"),
        ({"messages": [{**ASSISTANT, "tool_calls": [{}]}]}, "messages[0].tool_calls[0] names no function"),
        (
            {"messages": [{**ASSISTANT, "tool_calls": [{"name": "f", "arguments": 3}]}]},
            "messages[0].tool_calls[0] has arguments that are neither an object nor a string",
        ),
        ({"messages": [USER]}, "a conversation with nothing to learn: it has no assistant turn"),
        (
            {"messages": [USER, {"role": "assistant", "content": " "}]},
            "a conversation with nothing to learn: every assistant turn is empty",
        ),
        ({"prompt": [USER, ASSISTANT], "completion": [USER]}, "a conversation with nothing to learn"),
        ({"prompt": 3, "completion": "a"}, "prompt must be a list, not a number"),
        ({"prompt": "a", "completion": [3]}, "completion[0] must be an object with role and content, not a number"),
        ({"messages": [USER, ASSISTANT], "tools": "{"}, "tools is neither a list or object nor JSON text of one"),
        ({"messages": [USER, ASSISTANT], "tools": {"a": 1}}, "tools must be a list of objects, not an object"),
        (
            {"messages": [USER, ASSISTANT], "chat_template_kwargs": [1]},
            "chat_template_kwargs must be an object, not a list",
        ),
        ({"text": 3}, "text must be a string, not a number"),
        ({"text": " \n"}, "text is empty: there is nothing to learn"),
    ],
)
def test_a_row_that_is_wrong_says_where_and_how(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        item(**row)
    assert caught.value.where == "chats.jsonl:17"
    assert caught.value.what.startswith(reason)


def test_a_row_without_a_known_shape_is_told_all_shapes() -> None:
    with pytest.raises(UserError) as caught:
        item(a=1)
    assert all(shape.example in caught.value.hint for shape in SHAPES)


def test_every_shape_reads_its_own_keys() -> None:
    samples: dict[str, Any] = {"messages": [USER, ASSISTANT], "prompt": "a", "completion": "b", "text": "c"}
    for shape in SHAPES:
        read = item(**{key: samples[key] for key in shape.keys})
        assert isinstance(read, Conversation | Document)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(["messages", "prompt", "completion", "text", "tools", "chat_template_kwargs"])
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant"]) | json_values, "content": json_values},
        optional={"tool_calls": json_values, "thinking": json_values},
    )
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(keys, json_values | messages))
def test_any_row_is_an_item_or_one_clear_error(row: dict[str, Any]) -> None:
    try:
        read: Conversation | Document | UserError = item(**row)
    except UserError as error:
        read = error
    if isinstance(read, UserError):
        assert read.where == "chats.jsonl:17"
        assert read.hint
    else:
        assert isinstance(read, Conversation | Document)
