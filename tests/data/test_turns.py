from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mlx_sft.data.conversation import ConsecutiveTurns, Conversation, with_turns
from mlx_sft.data.encode import Encoder
from mlx_sft.data.messages import joined
from mlx_sft.data.readers import Row
from mlx_sft.data.row_reader import RowReader
from mlx_sft.errors import UserError
from tests.data.conftest import MakeTokenizer

pytestmark = pytest.mark.fast

USER = {"role": "user", "content": "A table?"}
TOOL = {"role": "tool", "content": "free"}


def call(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": {"n": 2}}}


def says(content: str, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **others}


def calls(*names: str, role: str = "tool_call", **others: Any) -> dict[str, Any]:
    return {"role": role, "content": json.dumps([call(name)["function"] for name in names]), **others}


def read(*messages: dict[str, Any], choice: ConsecutiveTurns = "keep", **row: Any) -> Conversation:
    item = RowReader(consecutive_turns=choice).read(Row("chats.jsonl:4", {"messages": list(messages), **row}))
    assert isinstance(item, Conversation)
    return item


@pytest.mark.parametrize("role", ["tool_call", "function_call"])
def test_calls_that_follow_a_turn_are_part_of_it(role: str) -> None:
    messages = [USER, says("Let me see."), calls("f", role=role), calls("g", "h", role=role), TOOL, says("Yes.")]
    for choice in ("keep", "join", "error"):
        assert read(*messages, choice=choice).messages == [
            USER,
            says("Let me see.", tool_calls=[call("f"), call("g"), call("h")]),
            TOOL,
            says("Yes."),
        ]


def test_calls_apart_are_turns_apart() -> None:
    roles = [message["role"] for message in read(USER, calls("f"), TOOL, calls("g"), TOOL, says("Yes.")).messages]
    assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]


def test_a_flattened_turn_has_one_end_token(qwen3: PreTrainedTokenizerFast) -> None:
    flat = read(USER, says("Let me see."), calls("f"), calls("g"))
    nested = read(USER, says("Let me see.", tool_calls=[call("f"), call("g")]))
    ((one,), (other,)) = (Encoder(qwen3).encode(item) for item in (flat, nested))
    assert one.token_ids.tolist() == other.token_ids.tolist()
    assert one.loss_weights.tolist() == other.loss_weights.tolist()
    text = qwen3.decode(one.token_ids[one.loss_weights > 0])
    assert text.count("<|im_end|>") == 1
    assert text.count("<tool_call>") == 2
    assert "A table?" not in text


def test_reasoning_of_a_later_call_does_not_move_before_the_text() -> None:
    thought = {"role": "function_call", "content": f"<think>Hm.</think>{json.dumps(call('f')['function'])}"}
    kept = read(USER, says("Let me see."), thought).messages
    assert kept[1:] == [
        says("Let me see."),
        {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [call("f")]},
    ]


def test_a_turn_in_parts_of_different_weight_is_an_error() -> None:
    with pytest.raises(
        UserError, match=r"messages\[2\] goes on with the turn before it, and has another train or weight"
    ):
        read(USER, says("Let me see.", train=False), calls("f"))
    assert read(USER, says("A", weight=0.5), calls("f", weight=0.5)).weights == (1.0, 0.5)
    assert len(read(USER, says("A"), calls("f", train=True)).messages) == 2
    assert len(read(USER, says("A", train=True), calls("f", weight=1)).messages) == 2


IN_A_ROW = [USER, says("One."), says("Two."), {**USER, "content": "And?"}, says("Three.")]


def test_turns_in_a_row_are_kept_and_counted_joined_or_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    kept, whole = read(*IN_A_ROW), read(*IN_A_ROW, choice="join")
    assert kept.messages == IN_A_ROW
    assert whole.messages == [USER, says("One.\n\nTwo."), *IN_A_ROW[3:]]
    facts = [Encoder(tokenizer).encode(item)[0].facts for item in (kept, whole)]
    assert [(fact.turns, fact.consecutive_turns) for fact in facts] == [(3, 1), (2, 0)]
    with pytest.raises(UserError, match=r"messages\[1\] and messages\[2\] are assistant turns in a row") as caught:
        read(*IN_A_ROW, choice="error")
    assert caught.value.where == "chats.jsonl:4"
    assert "--consecutive-turns join" in caught.value.hint


def test_a_template_that_wants_turns_to_alternate_is_told_the_way_out(make_tokenizer: MakeTokenizer) -> None:
    alternating = make_tokenizer(
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
        "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    with pytest.raises(UserError) as caught:
        Encoder(alternating).encode(read(*IN_A_ROW))
    assert "--consecutive-turns join" in caught.value.hint
    Encoder(alternating).encode(read(*IN_A_ROW, choice="join"))


def test_turns_are_named_by_their_place_in_the_row_as_it_is_written() -> None:
    messages = [USER, says("Let me see."), calls("f"), TOOL, says("One."), says("Two.")]
    with pytest.raises(UserError, match=r"messages\[4\] and messages\[5\] are assistant turns in a row"):
        read(*messages, choice="error", system="Be brief")
    whole = read(*messages, choice="join", system="Be brief")
    assert whole.places == ("system", "messages[0]", "messages[1]", "messages[3]", "messages[4]")
    with pytest.raises(UserError, match=r"messages\[3\] goes on with the turn before it"):
        read(USER, says("A"), calls("f"), calls("g", weight=0.5))
    with pytest.raises(UserError, match=r"train of messages\[1\] must be true or false"):
        read(USER, says("A", train="no"), calls("f"))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([calls("f"), says("Text.")], "cannot be joined: a turn is reasoning, then text, then calls"),
        ([says("Text."), says("Text.", reasoning_content="Hm.")], "cannot be joined: a turn is reasoning"),
        ([says("A", name="Ann"), says("B", name="Bob")], "cannot be joined: a turn is reasoning"),
        ([says("A", train=False), says("B")], "cannot be joined: they weigh differently in the loss"),
    ],
)
def test_what_one_turn_cannot_say_is_not_joined(messages: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(UserError, match=rf"messages\[1\] and messages\[2\] {reason}"):
        read(USER, *messages, choice="join")
    assert len(read(USER, *messages).messages) == 3


def test_context_is_not_joined_with_what_is_trained_on() -> None:
    row = Row("chats.jsonl:4", {"prompt": [USER, says("A"), says("B"), USER], "completion": [says("C"), says("D")]})
    item = RowReader(consecutive_turns="join").read(row)
    assert isinstance(item, Conversation)
    assert item.messages == [USER, says("A\n\nB"), USER, says("C\n\nD")]
    assert item.first_supervised == 3
    prefix = Row("chats.jsonl:4", {"prompt": [USER, says("A")], "completion": "B"})
    with pytest.raises(UserError, match="they weigh differently in the loss"):
        RowReader(consecutive_turns="join").read(prefix)


words = st.text(alphabet="abc", min_size=1, max_size=4)
turns = st.fixed_dictionaries(
    {"role": st.just("assistant")},
    optional={
        "reasoning_content": words,
        "content": words,
        "tool_calls": st.lists(st.builds(call, words), min_size=1, max_size=2),
    },
)


def spoken(message: dict[str, Any]) -> str:
    """A message's words in the order in which templates write them."""
    names = [one["function"]["name"] for one in message.get("tool_calls", [])]
    return " ".join([message.get("reasoning_content", ""), message.get("content", ""), *names])


@settings(deadline=None)
@given(st.lists(turns, min_size=2, max_size=5))
def test_a_joined_turn_says_the_same_words_in_the_same_order(messages: list[dict[str, Any]]) -> None:
    conversation = Conversation("", [USER, *messages, USER])
    try:
        whole = with_turns(conversation, "join").messages
    except UserError:
        assert any(joined(*pair) is None for pair in pairwise(messages)) or len(messages) > 2
    else:
        assert whole[::2] == [USER, USER]
        assert spoken(whole[1]).split() == re.findall(r"\w+", " ".join(map(spoken, messages)))
