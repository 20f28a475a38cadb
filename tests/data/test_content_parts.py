from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mlx_sft.data.conversation import ConsecutiveTurns, Conversation
from mlx_sft.data.encode import Encoder
from mlx_sft.data.readers import Row
from mlx_sft.data.row_reader import RowReader
from mlx_sft.errors import UserError

pytestmark = pytest.mark.fast

USER = {"role": "user", "content": "Roll a die."}
CALL = {"id": "c1", "type": "function", "function": {"name": "roll", "arguments": {"n": 6}}}
WITHOUT_ID = {key: item for key, item in CALL.items() if key != "id"}
USE = {"type": "tool_use", "id": "c1", "name": "roll", "input": {"n": 6}}
RESULT = {"type": "tool_result", "tool_use_id": "c1", "content": "4"}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def read(*messages: dict[str, Any], choice: ConsecutiveTurns = "keep", **row: Any) -> Conversation:
    item = RowReader(consecutive_turns=choice).read(Row("chats.jsonl:5", {"messages": list(messages), **row}))
    assert isinstance(item, Conversation)
    return item


def assistant(*parts: Any, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": list(parts), **others}


def test_an_anthropic_conversation_is_the_same_as_openais(qwen3: PreTrainedTokenizerFast) -> None:
    anthropic = read(
        USER,
        assistant({"type": "thinking", "thinking": "A die.", "signature": "x"}, text("I roll."), USE),
        {"role": "user", "content": [RESULT, text("Well?")]},
        assistant(text("Four.")),
        system=[text("Be brief.")],
        tools=[{"name": "roll", "description": "d", "input_schema": {"type": "object"}}],
    )
    openai = read(
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "reasoning_content": "A die.", "content": "I roll.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "4"},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "Four."},
        tools=[
            {"type": "function", "function": {"name": "roll", "description": "d", "parameters": {"type": "object"}}}
        ],
    )
    assert anthropic == openai
    (example,) = Encoder(qwen3).encode(anthropic)
    supervised = qwen3.decode(example.token_ids[example.loss_weights > 0])
    assert "I roll." in supervised
    assert "Four." in supervised
    assert "Well?" not in supervised


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"type": "text", "value": "a"}, {"text": "b"}], {"content": "ab"}),
        ([{"type": "text", "text": "a", "input": None}, {"type": "output_text", "text": "b"}], {"content": "ab"}),
        ([{"type": "thinking", "thinking": [text("a")]}, text("b")], {"content": "b", "reasoning_content": "a"}),
        ([{"type": "reasoning", "text": "a"}, text("b")], {"content": "b", "reasoning_content": "a"}),
        (
            [{"type": "thinking", "thinking": word} for word in ("a", "b")],
            {"content": "", "reasoning_content": "a\n\nb"},
        ),
        ([USE, USE], {"tool_calls": [CALL, CALL]}),
        (
            [{"type": "reasoning", "value": "a"}, {"type": "tool_call", "value": json.dumps(CALL["function"])}],
            {"reasoning_content": "a", "tool_calls": [WITHOUT_ID]},
        ),
        ([{"type": "tool_call", "value": CALL["function"]}], {"tool_calls": [WITHOUT_ID]}),
        ([{"type": "tool_call", "tool_call": CALL}], {"tool_calls": [CALL]}),
        ([{"type": "function_call", "id": "c1", "name": "roll", "arguments": {"n": 6}}], {"tool_calls": [CALL]}),
        ([USE, text(" ")], {"content": " ", "tool_calls": [CALL]}),
        (
            [{**USE, "input": '{"n": 6}'}],
            {"tool_calls": [CALL | {"function": {"name": "roll", "arguments": '{"n": 6}'}}]},
        ),
    ],
)
def test_an_assistants_parts_stand_where_templates_look(parts: list[Any], message: dict[str, Any]) -> None:
    last = {"role": "assistant", "content": "End."}
    assert read(USER, assistant(*parts), USER, last).messages[1] == {"role": "assistant", **message}


def test_calls_that_are_told_twice_are_one() -> None:
    message = assistant(text("a"), USE, tool_calls=[CALL])
    assert read(USER, message).messages[1] == {"role": "assistant", "content": "a", "tool_calls": [CALL]}
    as_text = CALL | {"function": {"name": "roll", "arguments": '{"n":6}'}}
    assert read(USER, assistant(USE, tool_calls=[as_text])).messages[1]["tool_calls"] == [as_text]


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (assistant(USE, text("a")), "messages[1].content[1] is text behind a call: a turn is reasoning, then text"),
        (
            assistant(text("a"), {"type": "thinking", "thinking": "b"}),
            "messages[1].content[1] is reasoning behind text",
        ),
        (assistant(text("a"), RESULT), "messages[1] has a tool's answer, which only a user's message can bring"),
        (assistant({"type": "redacted_thinking", "data": "x"}), "messages[1].content[0] is not a text part"),
        (assistant({**USE, "input": "n=6"}), "messages[1].content[0] has arguments that are no JSON object"),
        (assistant({**USE, "name": None}), "messages[1].content[0] names no function"),
        (assistant(USE, tool_calls=[CALL, CALL]), "messages[1] has different calls in two places"),
        (
            assistant({"type": "thinking", "thinking": "a"}, text("b"), reasoning="c"),
            "messages[1] has two different reasonings",
        ),
        ({"role": "user", "content": [USE]}, "messages[1].content[0] is not a text part"),
        (
            {"role": "user", "content": [{"type": "thinking", "thinking": "a"}]},
            "messages[1].content[0] is not a text part",
        ),
        (
            {"role": "user", "content": [{**RESULT, "content": [{"type": "image"}]}]},
            "messages[1].content[0].content[0] is not a text part",
        ),
    ],
)
def test_parts_that_no_template_writes_so_are_an_error(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        read(USER, message, {"role": "assistant", "content": "End."})
    assert caught.value.where == "chats.jsonl:5"
    assert caught.value.what.startswith(reason)


def test_answers_of_tools_are_messages_in_their_order() -> None:
    failed = {"type": "tool_result", "tool_use_id": "c2", "content": [text("no"), text("!")], "is_error": True}
    content = [RESULT, failed, text("Well?"), {**RESULT, "content": None}]
    for user in ({"role": "user", "content": content}, {"from": "human", "value": content}):
        messages = read(USER, assistant(USE), {**user, "train": False}, assistant(text("Four."))).messages
        assert messages[2:-1] == [
            {"role": "tool", "tool_call_id": "c1", "content": "4"},
            {"role": "tool", "tool_call_id": "c2", "content": "no!", "is_error": True},
            {"role": "user", "content": "Well?"},
            {"role": "tool", "tool_call_id": "c1", "content": ""},
        ]
    with pytest.raises(UserError, match="only an assistant's messages are supervised"):
        read(USER, assistant(USE), {"role": "user", "content": [RESULT], "train": True}, assistant(text("Four.")))


theirs = st.text(alphabet="ЖЩЮ", min_size=1, max_size=5)
own = st.text(alphabet="abc", min_size=1, max_size=5)
uses = st.builds(lambda word: {"type": "tool_use", "id": word, "name": "f", "input": {"n": word}}, own)
assistants = st.one_of(
    st.builds(lambda words: {"role": "assistant", "content": words}, own),
    st.builds(
        lambda words, some: assistant(*map(text, words), *some), st.lists(own, max_size=2), st.lists(uses, max_size=2)
    ),
    st.builds(lambda word: {"role": "tool_call", "content": json.dumps({"name": "f", "arguments": {"n": word}})}, own),
    st.builds(lambda word: assistant({"type": "thinking", "thinking": word}, text(word)), own),
)
others = st.one_of(
    st.builds(lambda words: {"role": "user", "content": words}, theirs),
    st.builds(lambda words: {"role": "tool", "content": words}, theirs),
    st.builds(lambda words: {"role": "user", "content": [RESULT | {"content": words}, text(words)]}, theirs),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(assistants | others, min_size=1, max_size=6), st.sampled_from(["keep", "join"]))
def test_no_word_of_somebody_else_is_supervised_in_whatever_parts_it_comes(
    qwen3: PreTrainedTokenizerFast, messages: list[dict[str, Any]], choice: ConsecutiveTurns
) -> None:
    try:
        (example,) = Encoder(qwen3).encode(
            read(USER, *messages, {"role": "assistant", "content": "abc"}, choice=choice)
        )
    except UserError:
        return
    supervised = qwen3.decode(example.token_ids[example.loss_weights > 0])
    assert not set("ЖЩЮ") & set(supervised)
    assert supervised.count("<|im_end|>") == example.facts.turns
