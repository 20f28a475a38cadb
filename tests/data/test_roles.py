"""Other names for roles, whatever the format of a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_sft.config import TrainConfig
from mlx_sft.data.conversation import Conversation
from mlx_sft.data.prepare import prepare
from mlx_sft.data.readers import Row
from mlx_sft.data.row_reader import RowReader
from mlx_sft.errors import USAGE, UserError

pytestmark = pytest.mark.fast

ROLES = {"narrator": "system", "hero": "assistant", "Side-Kick": "user"}
PLAY = [("narrator", "It is night."), ("side_kick", "Who?"), ("HERO", "I.")]
WRITTEN = {"messages": ("role", "content"), "conversations": ("from", "value")}


def play(*turns: tuple[str, str], key: str = "messages") -> dict[str, Any]:
    role, content = WRITTEN[key]
    return {key: [{role: name, content: text} for name, text in turns]}


def read(row: dict[str, Any], **settings: Any) -> Conversation:
    item = RowReader(**settings).read(Row("play.jsonl:2", row))
    assert isinstance(item, Conversation)
    return item


def roles(conversation: Conversation) -> list[str]:
    return [message["role"] for message in conversation.messages]


@pytest.mark.parametrize("key", WRITTEN)
@pytest.mark.parametrize("encode", [list, json.dumps, lambda value: json.dumps(json.dumps(value))])
def test_other_names_are_read_wherever_messages_stand(key: str, encode: Any) -> None:
    row = play(*PLAY, key=key)
    found = read({key: encode(row[key])}, roles=ROLES)
    assert found.messages == [
        {"role": "system", "content": "It is night."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "I."},
    ]


def test_other_names_are_read_in_lists_of_prompts_and_in_renamed_columns() -> None:
    turns = play(*PLAY)["messages"]
    found = read({"prompt": turns[:2], "completion": turns[2:]}, roles=ROLES)
    assert (roles(found), found.first_supervised) == (["system", "user", "assistant"], 2)
    assert roles(read({"scene": turns}, roles=ROLES, columns={"messages": "scene"})) == roles(found)


def test_a_name_that_is_known_is_read_as_it_is_said_and_only_where_the_row_writes_it() -> None:
    swapped = {"user": "assistant", "assistant": "user"}
    assert roles(read(play(("assistant", "a"), ("user", "b")), roles=swapped)) == ["user", "assistant"]
    assert roles(read({"instruction": "a", "output": "b"}, roles=swapped)) == ["user", "assistant"]
    assert roles(read({"prompt": "a", "completion": "b"}, roles=swapped)) == ["user", "assistant"]


def test_a_name_may_stand_for_a_call() -> None:
    call = json.dumps({"name": "roll", "arguments": {}})
    found = read(
        play(("user", "a"), ("act", call), ("world", "3"), ("hero", "b")),
        roles={**ROLES, "act": "function_call", "world": "tool"},
    )
    assert roles(found) == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1]["tool_calls"][0]["function"]["name"] == "roll"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("hero", "--roles hero=system (or"), ("a hero", "--roles narrator=system"), ("x" * 99, "--roles narrator=")],
)
def test_an_unknown_role_is_told_how_to_name_it(name: str, hint: str) -> None:
    with pytest.raises(UserError, match=r"messages\[1\] has the unknown role") as caught:
        read(play(("user", "a"), (name, "b")))
    assert hint in caught.value.hint
    assert caught.value.where == "play.jsonl:2"


@pytest.mark.parametrize(
    ("wrong", "what", "hint"),
    [
        ({"hero": "asistant"}, "'hero' cannot be 'asistant', which is no role", 'did you mean "assistant"?'),
        ({"hero": "actor"}, "'hero' cannot be 'actor', which is no role", "roles are system, developer, user,"),
        ({"hero": "user", "Hero": "user"}, "a role is named twice", "upper and lower case are one name"),
    ],
)
def test_roles_that_cannot_be_are_wrong_usage(wrong: dict[str, str], what: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        RowReader(roles=wrong)
    assert (caught.value.what, caught.value.exit_code) == (what, USAGE)
    assert hint in caught.value.hint


def test_a_configuration_has_roles_and_the_report_says_which_known_names_it_changes(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "play.jsonl"
    path.write_text(json.dumps(play(("hero", "a"), ("model", "b"), ("user", "c"), ("hero", "d"))))
    config = TrainConfig(data=str(path), roles="hero=assistant,model=user", consecutive_turns="keep")
    assert config.roles == {"hero": "assistant", "model": "user"}
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert TrainConfig.resolve(tmp_path / "config.yaml") == config
    report = prepare(config, tokenizer).report
    assert report.facts.turns == 2
    assert report.warnings() == ["messages of 'model' are read as user, by --roles; otherwise they would be assistant"]
    assert report.settings["roles"] == config.roles
    with pytest.raises(UserError, match="write narrator=system,hero=assistant"):
        TrainConfig(data=str(path), roles="hero")
