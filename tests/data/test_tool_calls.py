from __future__ import annotations

import json
import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mlx_sft.data.encode import Encoder
from mlx_sft.data.json_text import parse_json
from mlx_sft.data.readers import Row
from mlx_sft.data.row_reader import RowReader
from mlx_sft.data.tool_calls import as_tool, calls_in_content, read_call, read_calls
from mlx_sft.errors import UserError

pytestmark = pytest.mark.fast

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
json_objects = st.dictionaries(st.text(), json_values, max_size=3)
ROLL = {"type": "function", "function": {"name": "roll", "arguments": {"n": 6}}}


def encoded(value: Any, times: int) -> Any:
    for _ in range(times):
        value = json.dumps(value)
    return value


def arguments_of(value: Any) -> Any:
    """As an object, read from either form."""
    arguments = read_call({"name": "f", "arguments": value}, "call")["function"]["arguments"]
    return parse_json(arguments) if isinstance(arguments, str) else arguments


@settings(deadline=None)
@given(json_objects, st.integers(0, 5))
def test_arguments_are_an_object_however_often_they_were_encoded(arguments: dict[str, Any], times: int) -> None:
    assert arguments_of(encoded(arguments, times)) == arguments


@settings(deadline=None)
@given(json_values, st.integers(0, 4))
def test_no_other_arguments_are_passed_on(value: Any, times: int) -> None:
    innermost = value
    with suppress(ValueError):
        while isinstance(innermost, str) and innermost.strip():
            innermost = parse_json(innermost)
    if isinstance(innermost, dict):
        assert arguments_of(encoded(value, times)) == innermost
    elif innermost is None or (isinstance(innermost, str) and not innermost.strip()):
        assert arguments_of(encoded(value, times)) == {}
    else:
        with pytest.raises(ValueError, match="call has arguments that are "):
            arguments_of(encoded(value, times))


@pytest.mark.parametrize("times", range(4))
@pytest.mark.parametrize("nothing", [None, "", " \n"])
def test_empty_null_and_absent_arguments_are_an_empty_object(nothing: Any, times: int) -> None:
    assert arguments_of(encoded(nothing, times)) == {}
    assert read_call({"name": "f"}, "call")["function"]["arguments"] == {}
    assert read_call({"function": {"name": "f"}}, "call")["function"]["arguments"] == {}


def test_text_of_an_object_stays_the_text_that_it_is() -> None:
    text = '{ "n":6 }'
    for value in (text, json.dumps(text)):
        assert read_call({"name": "f", "arguments": value}, "call")["function"]["arguments"] == text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("{'n': 6}", "no JSON object (Expecting property name enclosed in double quotes in column 2); Python's own"),
        ('{"n": 6', "no JSON object (Expecting"),
        ('{"n": 6}, {"n": 7}', "no JSON object (Extra data in column 9)"),
        ('{"n": 6, "n": 7}', 'no JSON object (the key "n" twice in one object)'),
        ('{"n": NaN}', "no JSON object (NaN is not a JSON value)"),
        ("n=6", "no JSON object (Expecting value in column 1)"),
        ('"n=6"', "no JSON object (Expecting value in column 1)"),
        ([6], "a list, not an object"),
        ("[6]", "a list, not an object"),
        ([], "a list, not an object"),
        (6, "a number, not an object"),
        ("6", "a number, not an object"),
        (True, "true or false, not an object"),
    ],
)
def test_what_is_no_object_is_an_error_with_its_line_and_message(arguments: Any, reason: str) -> None:
    call = {"type": "function", "function": {"name": "roll", "arguments": arguments}}
    with pytest.raises(UserError) as caught:
        conversation({"role": "user", "content": "Roll."}, {"role": "assistant", "tool_calls": [ROLL, call]})
    assert caught.value.where == "chats.jsonl:3"
    assert caught.value.what.startswith(f"messages[1].tool_calls[1] has arguments that are {reason}")


def test_a_number_beyond_all_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="a number in its arguments that JSON cannot write"):
        read_call({"name": "f", "arguments": {"n": [math.inf]}}, "call")
    with pytest.raises(ValueError, match=r"no JSON object \(1e999 is a number too large to hold\)"):
        read_call({"name": "f", "arguments": '{"n": [1e999]}'}, "call")


@pytest.mark.parametrize(
    "call",
    [
        {"name": "roll", "arguments": {"n": 6}},
        {"name": "roll", "parameters": {"n": 6}},
        {"name": "roll", "input": {"n": 6}, "type": "tool_use"},
        {"function": {"name": "roll"}, "arguments": {"n": 6}},
        {"function": json.dumps({"name": "roll", "arguments": {"n": 6}})},
        {"function": {"name": "roll", "arguments": {"n": 6}}, "type": None, "id": None},
        json.dumps(ROLL),
    ],
)
def test_a_call_is_read_in_every_form(call: Any) -> None:
    assert read_call(call, "call") == ROLL


def test_what_else_a_call_has_stays_beside_it_and_in_its_order() -> None:
    call = {"id": "c1", "type": "function", "function": {"arguments": {"n": 6}, "name": "roll"}, "index": 0}
    assert json.dumps(read_call(call, "call")) == json.dumps(call)
    assert read_call({"id": "c1", "name": "roll", "arguments": {"n": 6}}, "call") == {"id": "c1", **ROLL}
    assert read_calls(json.dumps([{"id": "c1", **ROLL}]), "tool_calls") == [{"id": "c1", **ROLL}]


@settings(deadline=None)
@given(st.text(alphabet="ab<>/{} \n"))
def test_reasoning_before_a_call_is_told_apart(words: str) -> None:
    call = {"name": "roll", "arguments": {"n": 6}}
    content = f"<think>\n{words}\n</think>\n\n{json.dumps(call)}"
    assert calls_in_content(content, "call") == (words.strip("\n"), [ROLL])
    assert calls_in_content(json.dumps([call, call]), "call") == ("", [ROLL, ROLL])


@pytest.mark.parametrize("content", ["<think>A die.</think>", "<think>A die.{}", "[]", "", None, "Well: {}"])
def test_a_turn_that_is_to_be_a_call_and_is_none_is_an_error(content: Any) -> None:
    with pytest.raises(ValueError, match=r"^call"):
        calls_in_content(content, "call")


def conversation(*messages: dict[str, Any], **row: Any) -> Any:
    return RowReader().read(Row("chats.jsonl:3", {"messages": list(messages), **row}))


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [ROLL]},
        {"role": "assistant", "tool_calls": json.dumps([ROLL])},
        {"role": "assistant", "tool_calls": [], "function_call": ROLL["function"]},
        {"role": "assistant", "function_call": json.dumps(ROLL["function"])},
        {"role": "tool_call", "content": json.dumps(ROLL["function"])},
        {"role": "tool_call", "content": json.dumps(json.dumps(ROLL["function"]))},
        {"role": "function_call", "content": ROLL["function"]},
        {"role": "function_call", "content": "", "tool_calls": [ROLL]},
    ],
)
def test_calls_are_found_wherever_a_message_has_them(message: dict[str, Any]) -> None:
    read = conversation({"role": "user", "content": "Roll."}, message).messages[1]
    assert read["role"] == "assistant"
    assert read["tool_calls"] == [ROLL]


def test_a_call_of_somebody_else_is_an_error() -> None:
    with pytest.raises(UserError, match="which only an assistant's message can have"):
        conversation({"role": "user", "content": "a", "function_call": ROLL["function"]})


def test_reasoning_in_a_call_is_the_assistants(qwen3: PreTrainedTokenizerFast) -> None:
    content = '<think>\nA die.\n</think>\n\n{"name": "roll", "arguments": "{\\"n\\": 6}"}'
    question = {"role": "user", "content": "Roll."}
    read = conversation(question, {"role": "function_call", "content": content})
    assert read.messages[1]["reasoning_content"] == "A die."
    same = conversation(question, {"role": "assistant", "reasoning_content": "A die.", "tool_calls": [ROLL]})
    ((one,), (other,)) = (Encoder(qwen3).encode(item) for item in (read, same))
    assert one.token_ids.tolist() == other.token_ids.tolist()
    assert one.loss_weights.tolist() == other.loss_weights.tolist()
    with pytest.raises(UserError, match="two different reasonings"):
        conversation(question, {"role": "function_call", "content": content, "reasoning": "Two dice."})


# Tools

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"name": "roll", "description": "d", "parameters": SCHEMA}}
BARE = TOOL["function"]
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "a", "output": "b"},
    {"prompt": "a", "completion": "b"},
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: next(iter(row)))
@pytest.mark.parametrize("times", range(3))
@pytest.mark.parametrize("tools", [[BARE], [TOOL], [json.dumps(BARE)], [json.dumps(TOOL)]])
def test_tools_are_wrapped_and_parsed_in_every_row_format(row: dict[str, Any], times: int, tools: Any) -> None:
    read = RowReader().read(Row("chats.jsonl:3", {**row, "tools": encoded(tools, times)}))
    assert read.tools == [TOOL]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", **BARE},
        {"type": "custom", **BARE},
        {"name": "roll", "description": "d", "input_schema": SCHEMA},
        {"name": "roll", "description": "d", "inputSchema": SCHEMA},
        {**BARE, "parameters": json.dumps(SCHEMA)},
        {"function": BARE},
        {"type": None, "function": BARE},
        {"type": "function", "function": json.dumps(BARE)},
    ],
)
def test_a_tool_is_read_in_every_form(tool: dict[str, Any]) -> None:
    assert as_tool(tool, "tools[0]") == TOOL


@settings(deadline=None)
@given(st.dictionaries(st.text().filter(lambda key: key != "parameters"), json_values, max_size=3))
def test_a_tool_in_the_standard_form_stays_as_it_is(function: dict[str, Any]) -> None:
    for tool in (
        {"type": "function", "function": function},
        {"function": function, "type": "function", "strict": True},
    ):
        assert json.dumps(as_tool(tool, "tools[0]")) == json.dumps(tool)


@pytest.mark.parametrize("tool", [{"type": "web_search"}, {"type": "bash_20250124", "name": "bash"}])
def test_a_tool_of_a_providers_own_stays_as_it_is(tool: dict[str, Any]) -> None:
    assert as_tool(tool, "tools[0]") == tool


def test_parameters_that_are_no_schema_are_an_error() -> None:
    for parameters in ("n: int", "[1]"):
        with pytest.raises(ValueError, match=r"^tools\[0\]"):
            as_tool({"name": "roll", "parameters": parameters}, "tools[0]")
