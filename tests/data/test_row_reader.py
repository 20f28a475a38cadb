"""What a row says of itself as a whole: its weight in the loss."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_sft.data.conversation import Conversation, Document, Item, conversation_of
from mlx_sft.data.formats import RowFormat
from mlx_sft.data.messages import read_messages
from mlx_sft.data.readers import Row
from mlx_sft.data.row_reader import LeftOut, RowReader
from mlx_sft.errors import UserError
from mlx_sft.registry import FORMATS

pytestmark = pytest.mark.fast

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def read(row: dict[str, Any], **settings: Any) -> Item:
    item = RowReader(**settings).read(Row("chats.jsonl:3", row))
    assert not isinstance(item, tuple)
    return item


def weights(row: dict[str, Any], **settings: Any) -> tuple[float, ...] | None:
    item = read(row, **settings)
    assert isinstance(item, Conversation)
    return item.weights


@pytest.mark.parametrize(
    ("said", "weight"),
    [
        ({"weight": 0.5}, 0.5),
        ({"loss_weight": 2, "train": True}, 2.0),
        ({"weight": "0.5", "loss": "True", "masked": "false"}, 0.5),
        ({"weight": " 3 ", "train": ""}, 3.0),
    ],
)
def test_a_rows_weight_is_that_of_all_its_turns(said: dict[str, Any], weight: float) -> None:
    turns = [USER, ASSISTANT, USER, {**ASSISTANT, "weight": 4}, USER, {**ASSISTANT, "train": False}]
    found = weights({"messages": turns, **said})
    assert found is not None
    assert found[1::2] == (weight, 4 * weight, 0)
    assert weights({"instruction": "Hi", "output": "Hello", **said}) == (weight, weight)
    assert weights({"system": "SYSTEM: Hm.", "chat": "USER: Hi\nASSISTANT: Hello", **said}) == (weight,) * 3
    assert read({"text": "The moon.", **said}) == Document("chats.jsonl:3", "The moon.", weight)


@pytest.mark.parametrize("said", [{"weight": 1}, {"train": True}, {"weight": None}, {"loss": " "}, {}])
def test_a_row_of_weight_1_is_as_one_that_says_nothing(said: dict[str, Any]) -> None:
    assert weights({"messages": [USER, ASSISTANT], **said}) is None


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"train": False}, "not to be trained on: its train is false"),
        ({"masked": True}, "not to be trained on: its masked is true"),
        ({"weight": 0}, "not to be trained on: its weight is 0"),
        ({"loss": "FALSE", "weight": ""}, "not to be trained on: its loss is false"),
    ],
)
def test_a_row_that_is_not_to_be_trained_on_is_left_out_whatever_its_format(said: dict[str, Any], reason: str) -> None:
    rows = [{"messages": [USER, ASSISTANT]}, {"text": "a"}, {"input_ids": [1, 2], "labels": [1, 2]}]
    for row in (*rows, {"prompt": "a", "completion": "b"}, {"system": "", "chat": "USER: a\nASSISTANT: b"}):
        with pytest.raises(LeftOut) as caught:
            read(row | said)
        assert (caught.value.what, caught.value.where) == (reason, "chats.jsonl:3")
        assert caught.value.hint


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"train": 0}, "train of the row must be true or false, not a number"),
        ({"train": "no"}, "train of the row must be true or false, not a string"),
        ({"loss": 2.31}, "loss of the row must be true or false, not a number"),
        ({"weight": "65 kg"}, "weight of the row must be a number, not a string"),
        ({"weight": "nan"}, "weight of the row must be from 0 to 1,000,000, not nan"),
        ({"weight": -1}, "weight of the row must be from 0 to 1,000,000, not -1"),
        ({"train": True, "weight": 0}, "train and weight of the row contradict each other"),
    ],
)
def test_a_rows_weight_that_cannot_be_says_why_and_a_way_out(said: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        read({"messages": [USER, ASSISTANT], **said})
    assert not isinstance(caught.value, LeftOut)
    assert (caught.value.what, caught.value.where) == (reason, "chats.jsonl:3")
    assert "rename it or take it out" in caught.value.hint


def test_a_column_may_be_the_rows_weight() -> None:
    row = {"q": "Hi", "a": "Hello", "use": False, "score": 0.25}
    columns = {"user": "q", "assistant": "a", "weight": "score"}
    assert weights(row, columns=columns) == (0.25, 0.25)
    with pytest.raises(LeftOut, match="not to be trained on: its use is false"):
        read(row, columns={"user": "q", "assistant": "a", "train": "use"})


def test_a_key_that_a_format_reads_itself_is_no_weight() -> None:
    def read_load(row: Row) -> Conversation:
        question = {"role": "user", "content": f"How heavy is {row.value['thing']}?"}
        answer = {"role": "assistant", "content": f"{row.value['weight']} kg"}
        return conversation_of(row, read_messages([question, answer], "messages"))

    with FORMATS.registered("load", RowFormat("load", ("thing",), (), "{}", read_load)):
        assert weights({"thing": "it", "weight": 0}) is None


@pytest.mark.parametrize("nothing", [[], ()])
def test_a_format_that_finds_nothing_in_a_row_loses_it_with_a_reason(nothing: Any) -> None:
    with (
        FORMATS.registered("none", RowFormat("none", ("thing",), (), "{}", lambda row: nothing)),
        pytest.raises(UserError, match="the format none finds no example in it") as caught,
    ):
        read({"thing": "it"})
    assert caught.value.where == "chats.jsonl:3"
