from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from typing import Any

import pytest

from mlx_sft.data.conversation import Conversation, Document, Item, Tokens
from mlx_sft.data.messages import take_weights
from mlx_sft.data.readers import Row
from mlx_sft.data.row_reader import MixedFormats, RowReader
from mlx_sft.errors import USAGE, UserError
from mlx_sft.registry import FORMATS

pytestmark = pytest.mark.fast

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}


def item(**row: Any) -> Item:
    return RowReader().read(Row("chats.jsonl:17", row))


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
    assert read.messages[1]["tool_calls"] == [{"type": "function", "function": bare}]


def test_prompt_and_completion_become_two_messages() -> None:
    read = conversation(prompt="Hi", completion="Hello")
    assert read.messages == [USER, ASSISTANT]
    assert read.first_supervised == 1


def test_only_the_completion_of_message_lists_is_learnt() -> None:
    read = conversation(prompt=[USER, ASSISTANT, USER], completion=[ASSISTANT])
    assert read.messages == [USER, ASSISTANT, USER, ASSISTANT]
    assert read.first_supervised == 3


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
        ({}, "a row without a known format: it is empty"),
        ({"a": 1, "messages": None}, "a row without a known format: it has 'a', 'messages' (null)"),
        ({"prompt": "a"}, "a row without a known format: it has 'prompt'"),
        (USER, "a message where a row should be"),
        ({"from": "human", "value": "a"}, "a message where a row should be"),
        ({"train": [{"text": "a"}]}, "an object with rows inside of it, under 'train', where a row should be"),
        ({"a": {"messages": [USER, ASSISTANT]}}, "an object with rows inside of it, under 'a', where a row should be"),
        ({"version": "1", "a": [{"text": "a"}]}, "an object with rows inside of it, under 'a', where a row should be"),
        ({"question": "a", "answers": [{"text": "a"}]}, "a row without a known format: it has 'question', 'answers'"),
        ({"messages": str([USER, ASSISTANT])}, "messages is written as Python prints a list or dict"),
        ({"messages": f"array([{USER}\n {ASSISTANT}])"}, "messages is written as Python prints a list or dict"),
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
            "messages[0].content[0] is not a text part, but of the type image_url",
        ),
        (
            {"messages": [USER, {**ASSISTANT, "reasoning_content": 3}]},
            "messages[1].reasoning_content must be a string, not a number",
        ),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, "messages[0] has tool_calls, which only"),
        ({"messages": [{**ASSISTANT, "tool_calls": "x"}]}, "messages[0].tool_calls is neither a list or object"),
        ({"messages": [{**ASSISTANT, "tool_calls": {"a": 1}}]}, "messages[0].tool_calls must be a list, not an object"),
        ({"messages": [{**ASSISTANT, "tool_calls": [{}]}]}, "messages[0].tool_calls[0] names no function"),
        (
            {"messages": [{**ASSISTANT, "tool_calls": [{"name": "f", "arguments": 3}]}]},
            "messages[0].tool_calls[0] has arguments that are a number, not an object",
        ),
        ({"messages": [USER]}, "a conversation with nothing to train on: it has no assistant turn"),
        (
            {"messages": [USER, {"role": "assistant", "content": " "}]},
            "a conversation with nothing to train on: every assistant turn is empty",
        ),
        ({"prompt": [USER, ASSISTANT], "completion": [USER]}, "a conversation with nothing to train on"),
        ({"prompt": 3, "completion": "a"}, "prompt must be a string or a list of messages, not a number"),
        ({"prompt": "a", "completion": [3]}, "completion[0] must be an object with role and content, not a number"),
        ({"messages": [USER, ASSISTANT], "tools": "{"}, "tools is neither a list or object nor JSON text of one"),
        ({"messages": [USER, ASSISTANT], "tools": {"a": 1}}, "tools must be a list of objects, not an object"),
        (
            {"messages": [USER, ASSISTANT], "chat_template_kwargs": [1]},
            "chat_template_kwargs must be an object, not a list",
        ),
        (
            {"messages": [USER, {"role": "assistant", "content": "a\ud83d"}]},
            "messages[1].content holds half of a surrogate pair (\\ud83d)",
        ),
        ({"messages": [USER, ASSISTANT], "tools": [{"\udc00": 1}]}, "tools holds half of a surrogate pair"),
        ({"text": "\udc00"}, "text holds half of a surrogate pair"),
        (
            {"messages": [USER, {**ASSISTANT, "train": False}]},
            "a conversation with nothing to train on: every assistant",
        ),
        ({"messages": [USER, ASSISTANT], "system": 3}, "system must be a string, not a number"),
        (
            {"messages": [{"role": "system", "content": "a"}, USER, ASSISTANT], "system": "b"},
            "the row's system and its first message are two different system prompts",
        ),
        ({"conversations": []}, "conversations is empty"),
        ({"conversations": [{"from": "human"}]}, "conversations[0] has no content"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "conversations[0] has the unknown role 'alien'"),
        (
            {"conversations": [{"from": "function_call", "value": "f(x)"}]},
            "conversations[0], a function call, is neither a list or object nor JSON text of one (Expecting value in column 1)",
        ),
        (
            {"conversations": [{"from": "function_call", "value": '{"a": 1}'}]},
            "conversations[0] names no function: a call is",
        ),
        ({"instruction": " ", "output": "a"}, "instruction and input are both empty"),
        ({"instruction": 3, "output": "a"}, "instruction must be a string, not a number"),
        ({"instruction": "a", "output": ""}, "a conversation with nothing to train on: every assistant turn is empty"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "history[0] is not a pair"),
        ({"instruction": "a", "output": "b", "history": 3}, "history must be a list of [question, answer] pairs"),
        ({"input_ids": [1, 2], "labels": [1]}, "the lists differ in length: 2 input_ids and 1 labels"),
        ({"input_ids": [1, 2.0], "labels": [1, 2]}, "input_ids[1] must be a whole number, not 2.0"),
        ({"input_ids": [1, True], "labels": [1, 1]}, "input_ids[1] must be a whole number, not True"),
        ({"input_ids": [1, -1], "labels": [1, -1]}, "input_ids holds a number that is no token's"),
        ({"input_ids": [1, 2**31], "labels": [1, 2]}, "input_ids holds a number that is no token's"),
        ({"input_ids": [1, 2, 3], "labels": [1, 9, 3]}, "labels[1] is 9, where input_ids[1] is 2: it must be -100 or"),
        (
            {"input_ids": [1, 2, 3], "labels": [2, 3, -100]},
            "labels[0] is 2, where input_ids[0] is 1: labels are not to",
        ),
        ({"input_ids": [1, 2], "labels": [1, -100]}, "tokens with nothing to train on"),
        ({"input_ids": [], "labels": []}, "a row without a token that is not padding"),
        ({"input_ids": 3, "labels": []}, "input_ids must be a list, not a number"),
        (
            {"input_ids": [1, 2, 3], "labels": [1, 2, 3], "attention_mask": [1, 0, 1]},
            "attention_mask has a 0 inside of the text, at 1",
        ),
        ({"input_ids": [1], "labels": [1], "attention_mask": [2]}, "attention_mask must hold only 0 and 1"),
        ({"text": 3}, "text must be a string, not a number"),
        ({"text": " \n"}, "text is empty: there is nothing to train on"),
        ({"conversations": [USER, ASSISTANT], "images": ["a.jpg"]}, "only text is read, and the row has `images`"),
        (
            {
                "conversations": [USER],
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            "a row of preferences",
        ),
        ({"messages": [USER, ASSISTANT], "tools": [{}, 3]}, "tools[1] must be an object, not a number"),
    ],
)
def test_a_row_that_is_wrong_says_where_and_how(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        item(**row)
    assert caught.value.where == "chats.jsonl:17"
    assert caught.value.what.startswith(reason)


def test_the_worse_answer_of_a_preference_is_never_the_one_to_train_on() -> None:
    with pytest.raises(UserError, match="a row of preferences") as caught:
        item(rejected_messages=[USER, ASSISTANT], chosen_messages=[USER, ASSISTANT])
    assert caught.value.hint.endswith("--columns messages=chosen_messages")
    with pytest.raises(UserError, match="a row of preferences") as caught:
        item(rejected_messages=[USER, ASSISTANT], question="a")
    assert "--columns" not in caught.value.hint


def test_a_row_without_a_known_shape_is_told_all_shapes() -> None:
    with pytest.raises(UserError) as caught:
        item(a=1)
    assert [s.name for _, s in FORMATS.items() if s.example not in caught.value.hint] == ["pairs", "swift-pairs"]
    with pytest.raises(UserError) as caught:
        RowReader(compares=True).read(Row("chats.jsonl:17", {"a": 1}))
    assert caught.value.hint == f"a row is one of {FORMATS['pairs'].example}, {FORMATS['swift-pairs'].example}"


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"Customer": "a", "Our reply": "b"}, "'user=Customer,assistant=Our reply'"),
        ({"q": "a", "a": "b", "number": 3}, "user=q,assistant=a"),
        ({"Answer": "a", "Topic": "b"}, "user=Topic,assistant=Answer"),
        ({"Topic": "a", "Question": "b"}, "user=Question,assistant=Topic"),
    ],
)
def test_of_two_texts_one_is_taken_to_be_the_question_and_one_the_answer(row: dict[str, Any], columns: str) -> None:
    with pytest.raises(UserError, match="a row without a known format") as caught:
        item(**row)
    assert caught.value.hint == f"say where its parts are: --columns {columns}"


@pytest.mark.parametrize(
    "row",
    [{"a,b": "a", "c": "b"}, {"a": "a", "b": "b", "c": "c"}, {"a": "a", "rejected": "b"}, {"\x1b[2J": "a", "c": "b"}],
)
def test_columns_that_nothing_tells_are_not_guessed(row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="a row ") as caught:
        item(**row)
    assert "--columns" not in caught.value.hint


def test_a_table_without_names_of_columns_is_told_to_have_some() -> None:
    with pytest.raises(UserError, match=r"it has 'Where is it\?', 'Here'") as caught:
        item(**{"Where is it?": "Who?", "Here": "Me."})
    assert caught.value.hint.endswith("put the names of its columns before it: question,answer")


def test_every_shape_reads_its_own_example() -> None:
    for _, shape in FORMATS.items():
        row = Row("chats.jsonl:1", json.loads(shape.example.replace(", ...]", ', {"role": "gpt", "content": "a"}]')))
        assert RowReader(compares=bool(shape.compares)).settled_by(row).format_name == shape.name
        read = RowReader(shape.name).read(row)
        made = {"text": Document, "tokenized": Tokens, "self-instruct": list}
        assert isinstance(read, tuple if shape.compares else made.get(shape.name, Conversation))


@pytest.mark.parametrize(
    ("name", "role"),
    [
        *[(name, "user") for name in ("user", "human", "Human", " USER ")],
        *[(name, "assistant") for name in ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "GPT")],
        *[(name, "tool") for name in ("tool", "observation", "function", "function_response", "function-response")],
        *[(name, name) for name in ("system", "developer")],
    ],
)
def test_the_names_of_roles_in_public_data_are_known(name: str, role: str) -> None:
    for key, said in (("from", "value"), ("role", "content")):
        for list_name in ("conversations", "messages"):
            messages = [{key: name, said: "a"}, {key: "gpt", said: "b", "weight": None, "id": 3}]
            read = conversation(**{list_name: messages})
            assert read.messages == [{"role": role, "content": "a"}, {"role": "assistant", "content": "b", "id": 3}]


def test_a_sharegpt_row_may_have_calls_tools_and_a_system_prompt() -> None:
    function = {"name": "weather", "description": "", "parameters": {}}
    call = json.dumps({"name": "weather", "arguments": {"city": "Köln"}})
    read = conversation(
        conversations=[
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "no"},
            {"from": "function_call", "value": f"[{call}, {call}]"},
            {"from": "gpt", "value": "No"},
        ],
        system="Be brief",
        tools=json.dumps([function]),
    )
    assert read.messages == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "no"},
        {"role": "assistant", "tool_calls": [CALL, CALL]},
        {"role": "assistant", "content": "No"},
    ]
    assert read.tools == [{"type": "function", "function": function}]


def test_a_call_may_be_written_in_the_first_form_that_there_was() -> None:
    message = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    called = conversation(messages=[USER, message, {"role": "function", "name": "f", "content": "3"}]).messages
    assert called[1:] == [
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "name": "f", "content": "3"},
    ]


@pytest.mark.parametrize("given", ["", " ", None, "Translate"])
def test_alpaca_joins_instruction_and_input_where_there_is_one(given: str | None) -> None:
    read = conversation(instruction="Hi", input=given, output="Hello", text="whole")
    content = "Hi\nTranslate" if given == "Translate" else "Hi"
    assert read.messages == [{"role": "user", "content": content}, ASSISTANT]


def test_alpaca_refuses_a_context_that_nothing_would_read() -> None:
    asked = row(instruction="How far?", context="The moon is far.", output="Far.")
    with pytest.raises(UserError, match="--columns input=context"):
        RowReader().read(asked)
    named = RowReader(columns={"input": "context"}).read(asked)
    assert isinstance(named, Conversation)
    assert named.messages[0]["content"] == "How far?\nThe moon is far."
    for others in ({"input": "it", "context": "x"}, {"context": " "}, {"context": None}):
        assert conversation(instruction="a", output="b", **others).messages[1]["content"] == "b"


@pytest.mark.parametrize("encode", [list, json.dumps])
def test_alpaca_learns_its_history_too(encode: Any) -> None:
    read = conversation(instruction="Hi", output="Hello", system="Be brief", history=encode([["a", "b"], ["c", "d"]]))
    assert [message["content"] for message in read.messages] == ["Be brief", "a", "b", "c", "d", "Hi", "Hello"]
    assert read.first_supervised == 0


def test_a_system_prompt_beside_a_prompt_is_context() -> None:
    read = conversation(prompt="Hi", completion="Hello", system="Be brief")
    assert read.messages == [{"role": "system", "content": "Be brief"}, USER, ASSISTANT]
    assert read.first_supervised == 2
    same = conversation(messages=read.messages, system="Be brief")
    assert same.messages == read.messages


def test_tokens_lose_their_padding() -> None:
    row = {
        "input_ids": [0, 0, 5, 6, 7, 0],
        "labels": [-100, -100, -100, 6, 7, -100],
        "attention_mask": [0, 0, 1, 1, 1, 0],
    }
    assert item(**row) == Tokens("chats.jsonl:17", [5, 6, 7], [-100, 6, 7])
    assert item(**{key: json.dumps(value) for key, value in row.items()}) == item(**row)


def test_weights_are_taken_out_of_the_messages() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a", "train": False},
        {"role": "assistant", "content": "b", "weight": 0.5},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "train": False},
        {"role": "assistant", "content": "e", "train": True, "weight": 2},
    ]
    bare = [{"role": message["role"], "content": message["content"]} for message in messages]
    assert take_weights(messages) == (bare, (0.0, 0.5, 1.0, 0.0, 2.0))
    read = conversation(messages=messages, system="x")
    assert read.weights == (1.0, 0.0, 0.5, 1.0, 0.0, 2.0)
    assert read.messages[1:] == bare
    assert take_weights([USER, {**ASSISTANT, "train": True, "weight": 1}]) == ([USER, ASSISTANT], None)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({**ASSISTANT, "train": 1}, "train of messages[0] must be true or false, not a number"),
        ({**ASSISTANT, "weight": "0.5"}, "weight of messages[0] must be a number, not a string"),
        ({**ASSISTANT, "weight": True}, "weight of messages[0] must be a number, not true or false"),
        ({**ASSISTANT, "weight": -1}, "weight of messages[0] must be from 0 to 1,000,000, not -1"),
        ({**ASSISTANT, "weight": float("nan")}, "weight of messages[0] must be from 0 to 1,000,000, not nan"),
        ({**ASSISTANT, "weight": 10**400}, "weight of messages[0] must be from 0 to 1,000,000"),
        ({**ASSISTANT, "train": False, "weight": 1}, "train and weight of messages[0] contradict each other"),
        ({**ASSISTANT, "train": True, "weight": 0}, "train and weight of messages[0] contradict each other"),
        ({**ASSISTANT, "loss": 0}, "loss of messages[0] must be true or false, not a number"),
        ({**ASSISTANT, "masked": "yes"}, "masked of messages[0] must be true or false, not a string"),
        ({**ASSISTANT, "loss_weight": False}, "loss_weight of messages[0] must be a number, not true or false"),
        ({**ASSISTANT, "loss": True, "masked": True}, "loss and masked of messages[0] contradict each other"),
        ({**ASSISTANT, "weight": 1, "loss_weight": 2}, "weight and loss_weight of messages[0] contradict each other"),
        ({**USER, "masked": False}, "messages[0] has a weight, and only an assistant's messages are supervised"),
        ({**USER, "train": True}, "messages[0] has a weight, and only an assistant's messages are supervised"),
        ({**USER, "weight": 0.5}, "messages[0] has a weight, and only an assistant's messages are supervised"),
    ],
)
def test_a_weight_that_cannot_be_says_why(message: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError) as caught:
        take_weights([message])
    assert str(caught.value).startswith(reason)
    with pytest.raises(UserError) as named:
        item(messages=[message, ASSISTANT])
    assert named.value.what.startswith(reason)


@pytest.mark.parametrize(
    ("said", "weight"),
    [
        ({"loss": False}, 0.0),
        ({"loss": True}, 1.0),
        ({"loss_weight": 0}, 0.0),
        ({"loss_weight": 0.5, "loss": True, "masked": False}, 0.5),
        ({"masked": True}, 0.0),
        ({"masked": True, "train": False, "weight": 0}, 0.0),
        ({"masked": False}, 1.0),
    ],
)
def test_the_names_that_others_give_to_weights_are_read(said: dict[str, Any], weight: float) -> None:
    read = conversation(messages=[USER, {**ASSISTANT, **said}, {**USER, "loss": False}, ASSISTANT])
    assert read.messages == [USER, ASSISTANT, USER, ASSISTANT]
    assert read.weights == (1.0, weight, 0.0, 1.0)


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_beside_an_answer_is_the_assistants(name: str) -> None:
    answer = {**ASSISTANT, "reasoning_content": "A greeting."}
    reasoning = {name: "A greeting."}
    assert conversation(instruction="Hi", output="Hello", **reasoning).messages == [USER, answer]
    assert conversation(prompt="Hi", completion="Hello", **reasoning).messages == [USER, answer]
    assert conversation(prompt=[USER], completion="Hello", **reasoning).messages == [USER, answer]
    assert conversation(prompt="Hi", completion="Hello", **{name: " "}).messages == [USER, ASSISTANT]
    columns = {"user": "question", "assistant": "answer", "reasoning": "steps"}
    asked = Row("a.csv:2", {"question": "Hi", "answer": "Hello", "steps": "A greeting."})
    named = RowReader(columns=columns).read(asked)
    assert isinstance(named, Conversation)
    assert named.messages == [USER, answer]


def test_two_reasonings_of_one_answer_are_an_error() -> None:
    same = conversation(prompt="Hi", completion="Hello", reasoning="a", thinking="a")
    assert same.messages[1] == {**ASSISTANT, "reasoning_content": "a"}
    with pytest.raises(UserError, match="thinking and reasoning are two different reasonings of one answer"):
        item(prompt="Hi", completion="Hello", reasoning="a", thinking="b")
    with pytest.raises(UserError, match="reasoning must be a string, not a list"):
        item(instruction="Hi", output="Hello", reasoning=["a"])


def row(line: int = 1, /, **value: Any) -> Row:
    return Row(f"chats.jsonl:{line}", value)


def test_the_first_row_settles_the_shape_and_a_row_of_another_is_named_with_it() -> None:
    reader = pickle.loads(pickle.dumps(RowReader().settled_by(row(prompt="a", completion="b"))))
    assert reader.format_name == "prompt-completion"
    assert isinstance(reader.read(row(2, prompt="a", completion="b", messages=3)), Conversation)
    with pytest.raises(MixedFormats) as caught:
        reader.read(row(3, instruction="a", output="b"))
    error = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(error, MixedFormats)
    assert error.where == "chats.jsonl:3"
    assert error.what == "this row is alpaca, where chats.jsonl:1 is prompt-completion"
    assert "--data" in error.hint
    with pytest.raises(UserError, match="a row without a known format") as other:
        reader.read(row(4, prompt="a"))
    assert not isinstance(other.value, MixedFormats)


def test_a_row_of_no_known_shape_settles_nothing() -> None:
    with pytest.raises(UserError, match="a row without a known format") as caught:
        RowReader().settled_by(row(a=1))
    assert caught.value.exit_code != USAGE
    assert RowReader().format_name is None


def test_a_format_may_be_forced() -> None:
    reader = RowReader("text").settled_by(row(messages=[USER, ASSISTANT], text="a"))
    assert reader.format_name == RowReader("text").format_name == "text"
    assert reader.read(row(2, messages=[USER, ASSISTANT], text="a")) == Document("chats.jsonl:2", "a")
    with pytest.raises(UserError, match="not a row of the format text: it has no 'text'"):
        reader.read(row(3, messages=[USER, ASSISTANT]))
    with pytest.raises(UserError, match="no format is named 'sharegtp'") as caught:
        RowReader("sharegtp")
    assert caught.value.hint == 'did you mean "sharegpt"?'
    assert caught.value.exit_code == USAGE


QUESTION = {"question": "Hi", "answer": "Hello", "context": "Be brief", "text": "x"}


@pytest.mark.parametrize(
    ("columns", "value", "messages"),
    [
        ({"user": "question", "assistant": "answer"}, QUESTION, [USER, ASSISTANT]),
        (
            {"user": "question", "assistant": "answer", "system": "context"},
            QUESTION,
            [{"role": "system", "content": "Be brief"}, USER, ASSISTANT],
        ),
        ({"assistant": "chosen"}, {"prompt": "Hi", "chosen": "Hello", "rejected": "No"}, [USER, ASSISTANT]),
        ({"messages": "dialogue"}, {"dialogue": [USER, ASSISTANT], "text": "x"}, [USER, ASSISTANT]),
        ({"conversations": "dialogue"}, {"dialogue": [USER, ASSISTANT], "messages": "x"}, [USER, ASSISTANT]),
        (
            {"output": "response", "input": "context"},
            {"instruction": "Hi", "context": "", "response": "Hello"},
            [USER, ASSISTANT],
        ),
        ({"user": "completion", "assistant": "prompt"}, {"prompt": "Hello", "completion": "Hi"}, [USER, ASSISTANT]),
    ],
)
def test_columns_say_where_a_row_keeps_its_parts(
    columns: Mapping[str, str], value: dict[str, Any], messages: list[dict[str, str]]
) -> None:
    reader = RowReader(columns=columns).settled_by(row(**value))
    read = reader.read(row(2, **value))
    assert isinstance(read, Conversation)
    assert read.messages == messages


def test_a_column_that_is_not_there_names_its_like() -> None:
    with pytest.raises(UserError, match="the first row has no column 'qestion'") as caught:
        RowReader(columns={"user": "qestion", "assistant": "answer"}).settled_by(row(**QUESTION))
    assert 'did you mean "question"?' in caught.value.hint
    assert caught.value.exit_code == USAGE
    with pytest.raises(UserError, match="no part of a row is named 'asistant'") as caught:
        RowReader(columns={"asistant": "answer"})
    assert caught.value.hint == 'did you mean "assistant"?'
    with pytest.raises(UserError, match="a part of a row is named twice"):
        RowReader(columns={"user": "question", "prompt": "question"})


def test_an_error_in_a_column_names_it() -> None:
    reader = RowReader(columns={"user": "question", "assistant": "answer"}).settled_by(row(**QUESTION))
    with pytest.raises(UserError, match="prompt must be a string") as caught:
        reader.read(row(2, question=3, answer="a"))
    assert "prompt is its column 'question'" in caught.value.hint
    with pytest.raises(UserError, match="a row without a known format"):
        reader.read(row(3, question="a"))


@pytest.mark.parametrize(
    ("value", "columns"),
    [
        ({"Question": "a", "Answer": "b"}, "user=Question,assistant=Answer"),
        ({"dialog": [{"role": "user", "content": "a"}]}, "messages=dialog"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "user=prompt,assistant=chosen"),
        ({"id": "1", "Content": "a"}, "text=Content"),
        ({"instruction": "a", "context": "b", "response": "c"}, "output=response,input=context"),
        (
            {"system_prompt": "a", "question": "b", "response": "c"},
            "user=question,assistant=response,system=system_prompt",
        ),
    ],
)
def test_a_row_of_no_known_shape_is_told_the_columns_that_it_may_mean(value: dict[str, Any], columns: str) -> None:
    with pytest.raises(UserError) as caught:
        item(**value)
    assert f"--columns {columns}" in caught.value.hint


def test_a_huge_name_is_not_compared_for_minutes() -> None:
    huge = "user" * 5_000_000
    with pytest.raises(UserError) as caught:
        item(messages=[{"role": huge, "content": "a"}])
    assert len(str(caught.value)) < 400
    with pytest.raises(UserError) as caught:
        RowReader(columns={"user": "question"}).settled_by(row(**{huge: "a"}))
    assert len(str(caught.value)) < 400


def test_functions_of_the_time_before_tools_are_tools() -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    read = conversation(messages=[USER, ASSISTANT], tools=[], functions=[function])
    assert read.tools == [{"type": "function", "function": function}]


@pytest.mark.parametrize(
    ("prompt", "chosen"),
    [("Hi", "Hello"), ([USER], [ASSISTANT]), ("Hi", [USER, ASSISTANT])],
)
def test_a_row_of_preferences_is_named_and_its_answer_can_be_learnt(prompt: Any, chosen: Any) -> None:
    row = Row("a.jsonl:1", {"prompt": prompt, "rejected": chosen, "chosen": chosen})
    with pytest.raises(UserError, match="a row of preferences") as caught:
        RowReader().read(row)
    columns = caught.value.hint.partition("--columns ")[2].partition(";")[0]
    reader = RowReader(columns=dict(part.split("=") for part in columns.split(",")))
    read = reader.settled_by(row).read(row)
    assert isinstance(read, Conversation)
    assert read.messages == [USER, ASSISTANT]


# Self-Instruct

SEED = {
    "id": "seed_task_1",
    "instruction": "What do they have in common?",
    "instances": [{"input": "Nigeria, Togo", "output": "The sea."}, {"input": "", "output": "Nothing."}],
}


@pytest.mark.parametrize("written", [list, json.dumps])
def test_each_instance_of_an_instruction_is_an_example_with_a_name_of_its_own(written: Any) -> None:
    row = {**SEED, "instances": written(SEED["instances"]), "system": "Be brief", "tools": [{"name": "f"}]}
    read = RowReader().read(Row("seeds.jsonl:3", row))
    assert isinstance(read, list)
    assert all(isinstance(one, Conversation) and one.tools is not None for one in read)
    assert [(one.origin, [message["content"] for message in one.messages]) for one in read] == [
        ("seeds.jsonl:3#1", ["Be brief", "What do they have in common?\nNigeria, Togo", "The sea."]),
        ("seeds.jsonl:3#2", ["Be brief", "What do they have in common?", "Nothing."]),
    ]


def test_an_instances_reasoning_and_its_rows_weight_are_read() -> None:
    instances = [{"output": "Hello", "thinking": "A greeting."}, {"output": "Hi"}]
    read = RowReader().read(row(instruction="Hi", instances=instances, weight=0.5))
    assert isinstance(read, list)
    assert [one.weights for one in read] == [(0.5, 0.5), (0.5, 0.5)]
    assert read[0].messages == [USER, {**ASSISTANT, "reasoning_content": "A greeting."}]


@pytest.mark.parametrize(
    ("instances", "reason"),
    [
        ([], "instances is empty"),
        ({"output": "a"}, "instances must be a list, not an object"),
        (["a"], "instances[0] must be an object with input and output, not a string"),
        ([{"output": "a"}, {"input": "b"}], "instances[1]: a conversation with nothing to train on: every assistant"),
        ([{"output": "a"}, {"output": 3}], "instances[1]: output must be a string, not a number"),
        ("{", "instances is neither a list or object nor JSON text of one"),
    ],
)
def test_an_instance_that_is_wrong_is_named(instances: Any, reason: str) -> None:
    with pytest.raises(UserError) as caught:
        item(instruction="Hi", instances=instances)
    assert caught.value.where == "chats.jsonl:17"
    assert caught.value.what.startswith(reason)


# Questions and answers


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking", None])
def test_a_question_and_its_answer_are_two_messages(name: str | None) -> None:
    said = {name: "A greeting."} if name else {}
    answer = {**ASSISTANT, **({"reasoning_content": "A greeting."} if name else {})}
    assert conversation(question="Hi", answer="Hello", **said, id=3, context="").messages == [USER, answer]


def test_a_row_that_has_been_tokenized_or_is_a_conversation_is_no_question_and_answer() -> None:
    both = {"question": "a", "answer": "b"}
    assert conversation(**both, messages=[USER, ASSISTANT]).messages == [USER, ASSISTANT]
    assert isinstance(item(**both, input_ids=[1, 2], labels=[1, 2]), Tokens)
    assert conversation(**both, text="a b").messages[0]["content"] == "a"


@pytest.mark.parametrize("name", ["context", "passage", "document", "input"])
def test_a_question_about_another_column_is_refused_with_ways_out(name: str) -> None:
    asked = row(question="How far?", answer="384,400 km", **{name: "The moon is far."})
    with pytest.raises(UserError, match=f"may be about the row's `{name}`, and nothing says where that goes") as caught:
        RowReader().read(asked)
    found = re.findall(r"(?:\w+=\w+,)+\w+=\w+", caught.value.what)
    contents = []
    for columns in found:
        read = RowReader(columns=dict(part.split("=") for part in columns.split(","))).read(asked)
        assert isinstance(read, Conversation)
        contents.append(read.messages[0]["content"])
    assert contents == ["The moon is far.\nHow far?", "How far?"]


@pytest.mark.parametrize("name", ["choices", "options", "context"])
def test_a_question_with_a_list_beside_it_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="write it into the question"):
        item(question="Which?", answer="B", **{name: ["a", "b"]})
    for blank in ([], None, " "):
        assert conversation(question="Which?", answer="B", **{name: blank}).messages[1]["content"] == "B"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"question": " ", "answer": "a"}, "question is empty"),
        ({"question": "a", "answer": ""}, "a conversation with nothing to train on: every assistant turn is empty"),
        ({"question": "a", "answer": 3}, "answer must be a string, not a number"),
        ({"question": ["a"], "answer": "b"}, "question must be a string, not a list"),
    ],
)
def test_a_question_or_an_answer_that_is_wrong_says_why(value: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        item(**value)
    assert caught.value.what.startswith(reason)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Hi", "output": "Hello"},
        {"prompt": "Hi", "completion": "Hello"},
        {"question": "Hi", "answer": "Hello"},
    ],
)
def test_rows_of_texts_take_all_that_a_conversation_may_have(row: dict[str, Any]) -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    extras = {"system": "Be brief", "tools": [function], "chat_template_kwargs": {"enable_thinking": False}}
    read = conversation(**row, **extras, thinking="A greeting.")
    assert read.messages == [
        {"role": "system", "content": "Be brief"},
        USER,
        {**ASSISTANT, "reasoning_content": "A greeting."},
    ]
    assert read.tools == [{"type": "function", "function": function}]
    assert read.template_kwargs == {"enable_thinking": False}


# xLAM

ROLL = {"name": "roll", "description": "Rolls a die.", "parameters": {"type": "object", "properties": {}}}
ROLLS = [{"name": "roll", "arguments": {"n": n}} for n in (6, 8)]


@pytest.mark.parametrize("as_text", [False, True])
def test_an_xlam_row_is_a_question_and_its_calls(as_text: bool) -> None:
    written: Any = json.dumps if as_text else lambda value: value
    read = conversation(id=0, query="Roll a d6 and a d8", answers=written(ROLLS), tools=written([ROLL]))
    assert read.messages == [
        {"role": "user", "content": "Roll a d6 and a d8"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call} for call in ROLLS]},
    ]
    assert read.tools == [{"type": "function", "function": ROLL}]
    assert read.first_supervised == 0


@pytest.mark.parametrize("answers", ["[]", [], "", "roll(6)", [{"arguments": {}}], 3])
def test_an_xlam_row_without_a_call_is_refused(answers: Any) -> None:
    with pytest.raises(UserError):
        item(query="Roll a d6", answers=answers, tools=[ROLL])


# Glaive

GLAIVE_SYSTEM = (
    "SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
    + json.dumps(ROLL, indent=4)
    + "\n\n"
    + json.dumps({"name": "flip", "description": "Flips a {coin}."}, indent=4)
    + "\n"
)
GLAIVE_CHAT = """USER: Roll a d6, it's late.


ASSISTANT: <functioncall> {"name": "roll", "arguments": '{"n": 6, "why": "it\\'s late"}'} <|endoftext|>


FUNCTION RESPONSE: {"eyes": 3}


ASSISTANT: It is a 3.

USERS often roll one: rarely. <|endoftext|>


"""


def test_a_glaive_row_is_the_conversation_that_its_text_holds() -> None:
    read = conversation(system=GLAIVE_SYSTEM, chat=GLAIVE_CHAT)
    call = {"type": "function", "function": {"name": "roll", "arguments": '{"n": 6, "why": "it\'s late"}'}}
    assert read.messages == [
        {
            "role": "system",
            "content": "You are a helpful assistant with access to the following functions. Use them if required -",
        },
        {"role": "user", "content": "Roll a d6, it's late."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": '{"eyes": 3}'},
        {"role": "assistant", "content": "It is a 3.\n\nUSERS often roll one: rarely."},
    ]
    assert read.tools is not None
    assert [tool["function"]["name"] for tool in read.tools] == ["roll", "flip"]


def test_a_glaive_row_without_functions_has_no_tools() -> None:
    system = "SYSTEM: You are a helpful assistant, with no access to external functions {at all."
    read = conversation(system=system, chat="USER: Hi\n\n\nASSISTANT: Hello <|endoftext|>\n\n\n")
    assert read.tools is None
    assert read.messages[0]["content"] == system.removeprefix("SYSTEM: ")
    assert read.messages[1:] == [USER, ASSISTANT]


@pytest.mark.parametrize(
    "chat",
    [
        "Hi there",
        "Once, USER: Hi",
        "USER: Hi",
        "USER: Hi\nASSISTANT: <functioncall> roll(6)",
        "USER: Hi\nASSISTANT: <functioncall> 3",
        "USER: Hi\nASSISTANT: <functioncall>",
        'USER: Hi\nASSISTANT: <functioncall> {"name": "roll", "arguments": \'{n: 6}\'}',
    ],
)
def test_a_text_that_is_no_glaive_conversation_is_refused(chat: str) -> None:
    with pytest.raises(UserError):
        item(system="SYSTEM: Be brief.", chat=chat)


def test_messages_under_the_key_chat_are_no_glaive_text() -> None:
    with pytest.raises(UserError, match="--columns messages=chat"):
        item(system="Be brief.", chat=[USER, ASSISTANT])
    read = RowReader(columns={"messages": "chat"}).read(Row("a:1", {"system": "Be brief.", "chat": [USER, ASSISTANT]}))
    assert isinstance(read, Conversation)
    assert len(read.messages) == 3
