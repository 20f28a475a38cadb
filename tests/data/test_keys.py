from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mlx_sft.config import TrainConfig
from mlx_sft.data import prepare, survey
from mlx_sft.data.conversation import Conversation, Item, conversation_of
from mlx_sft.data.dataset import Store, pack
from mlx_sft.data.example import Example
from mlx_sft.data.formats import RowFormat
from mlx_sft.data.key_counts import MOST_KEYS, OTHERS, KeyCount, KeyCounts, KeyUse, columns, in_words, unused_keys
from mlx_sft.data.keys import KeyRules, typo_of
from mlx_sft.data.messages import read_messages
from mlx_sft.data.pipeline import Pipeline
from mlx_sft.data.readers import Row
from mlx_sft.data.row_reader import RowReader
from mlx_sft.errors import UserError
from mlx_sft.registry import FORMATS, OBJECTIVES

pytestmark = pytest.mark.fast

WriteRows = Callable[..., str]

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
CHAT = {"messages": [USER, ASSISTANT]}
_METADATA = """
    id idx index uid uuid text_id prompt_id conversation_id conversation_hash row_id question_id source sources dataset dataset_name
    origin url domain category categories subcategory topic topics task task_type task_name type subject subset split tags keywords title
    language lang locale country date timestamp created_at time year author model model_name generator provider temperature seed score
    scores rating quality difficulty level complexity reward confidence toxic turn turns num_turns num_tokens token_count length tokens
    license version hash story context reason reason_code explanation solution steps answer_type metadata meta extra info notes comment
    annotator name names height width mask masks lost trail history_id user_id system_id system_prompt toolset tool_name input_id
    reasoning_effort reasoning_tokens reasoning_time explanations persona intent emotion redacted moderation openai_moderation ground_truth
"""
METADATA = _METADATA.split()
"""As they stand in public data sets."""


class Encoder:
    """One supervised token a row."""

    def encode(self, item: Item) -> list[Example]:
        return [Example(item.origin, np.array([1, 2], np.int32), np.array([0, 1], np.float32))]


class NoTokens:
    user_header = ""

    def found_in(self, conversation: object) -> None:
        return None


def read(*rows: dict[str, Any], columns: dict[str, str] | None = None, **rules: Any) -> Store:
    """What becomes of some rows, without a tokenizer."""
    reader = RowReader(columns=columns or {})
    pipeline = Pipeline(reader, Encoder(), NoTokens(), keys=KeyRules(**rules))  # type: ignore[arg-type]
    return pack(pipeline.process(Row(f"chats.jsonl:{line}", row)) for line, row in enumerate(rows, 1))


THEMSELVES = {"message role", "message content", "call type", "call function", "call name", "call arguments"}


def uses(store: Store) -> dict[str, str]:
    """Of all keys but those that make a message or a call one, which are read."""
    found = {count.key if count.of == "row" else f"{count.of} {count.key}": count.use for count in store.keys}
    assert {found.pop(name) for name in THEMSELVES & found.keys()} <= {"read"}
    return found


def reason(store: Store) -> tuple[str, str]:
    (lost,) = store.lost
    return lost.note.reason, lost.note.hint


def test_a_key_is_read_where_something_asks_for_it_and_unused_else() -> None:
    message = {**ASSISTANT, "mood": "good", "name": "Ada", "weight": 0.5, "id": None}
    store = read({"messages": [USER, message], "system": "Be brief", "source": "web", "functions": [], "title": None})
    assert uses(store) == {
        **dict.fromkeys(("messages", "system", "functions", "message weight"), "read"),
        **dict.fromkeys(("source", "message mood", "message name"), "unused"),
        **dict.fromkeys(("title", "message id"), "null"),
    }
    assert not store.lost


def test_the_keys_of_a_glaive_row_are_counted_as_those_of_others() -> None:
    store = read({"system": "SYSTEM: Hm.", "chat": "USER: Hi\nASSISTANT: Hello", "id": 1, "tool": None})
    assert uses(store) == {"system": "read", "chat": "read", "id": "unused", "tool": "null"}


def test_a_message_key_is_read_by_a_template_that_names_it() -> None:
    rules = KeyRules.of("{% for m in messages %}{{ m.name }}{{ m['mood'] }}{{ 'place' in m }}{% endfor %}")
    assert {"name", "mood", "place"} <= rules.of_template
    assert not rules.whole
    row = {"messages": [USER, {**ASSISTANT, "name": "Ada", "mood": "good", "idea": 1}]}
    found = uses(read(row, of_template=rules.of_template))
    assert found == {"messages": "read", "message name": "read", "message mood": "read", "message idea": "unused"}
    assert KeyRules.of({"default": "{{ messages[0].a }}", "tools": "{{ tools[0].b }}"}).of_template >= {"a", "b"}
    assert KeyRules.of("{% for %}").of_template == KeyRules.of(None).of_template == frozenset()


def test_the_keys_of_calls_are_judged_too() -> None:
    function = {"name": "f", "arguments": {}, "strict": True}
    call = {"id": "1", "type": "function", "index": 0, "function": function}
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}
    counted = {"messages": "read", "message tool_calls": "read", "call id": "read"}
    assert uses(read(row)) == counted | {"call index": "unused", "call strict": "unused"}
    whole = KeyRules.of("{% for call in messages[0].tool_calls %}{{ call | tojson }}{% endfor %}").whole
    assert whole == {"call"}
    assert KeyRules.of("{{ call.function | tojson }}").whole == {"call"}
    assert not KeyRules.of("{{ call.arguments | tojson }}").whole
    assert uses(read(row, whole=whole)) == counted | {"call index": "read", "call strict": "read"}


def test_the_keys_of_content_parts_are_judged_too() -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    call = {"type": "tool_use", "id": "1", "name": "f", "input": {}}
    answer = {
        "type": "tool_result",
        "tool_use_id": "1",
        "content": [{"type": "text", "text": "6", "lang": "en"}],
        "is_error": None,
    }
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Hi", **cached}]},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, {**call, **cached}],
        },
        {"role": "user", "content": [answer]},
        ASSISTANT,
    ]
    store = read({"system": [{"type": "text", "text": "Be brief"}], "messages": messages})
    counts = {(count.key, count.use): count.count for count in store.keys if count.of == "part"}
    assert counts == {
        ("type", "read"): 6,
        ("text", "read"): 3,
        **dict.fromkeys([(key, "read") for key in ("thinking", "id", "name", "input", "tool_use_id", "content")], 1),
        ("cache_control", "unused"): 2,
        **dict.fromkeys((("signature", "unused"), ("lang", "unused"), ("is_error", "null")), 1),
    }
    what, _ = reason(
        read({"messages": [USER, {**ASSISTANT, "content": [{**call, "input": None, "inputs": {"n": 1}}]}]})
    )
    assert what == "messages[1].content[0] has the key 'inputs', which nothing reads; did you mean \"input\"?"


def test_the_keys_of_tools_are_judged_too() -> None:
    tools = [{"name": "f", "strict": True, "parameters": None}, {"type": "function", "function": {"name": "g"}}]
    found = uses(read({**CHAT, "tools": json.dumps(tools)}))
    assert found == {
        "messages": "read",
        "tools": "read",
        **dict.fromkeys(("tool name", "tool type", "tool function"), "read"),
        "tool strict": "unused",
        "tool parameters": "null",
    }
    for template in ("{% for t in tools %}{{ t | tojson }}{% endfor %}", "{{ tools }}", "{{ tools[0].strict }}"):
        rules = KeyRules.of(template)
        assert (
            uses(read({**CHAT, "tools": tools}, of_template=rules.of_template, whole=rules.whole))["tool strict"]
            == "read"
        )
    assert KeyRules.of("{{ messages | tojson }}").whole == frozenset()


def test_the_keys_of_a_row_that_cannot_be_read_are_bad() -> None:
    rows = [
        {**CHAT, "source": None},
        {"messages": [{**USER, "id": 1}], "id": 1},
        {"words": 1, "n": None},
        {"text": "a"},
    ]
    store = read(*rows)
    assert [lost.number for lost in store.lost] == [1, 2]
    counts = [(count.of, count.key, count.count) for count in store.keys if count.use == "bad"]
    assert counts == [("row", key, 1) for key in ("messages", "id", "words", "n")]


def test_a_key_of_the_rows_own_that_another_column_is_read_for_is_unused() -> None:
    row = {"messages": None, "prompt": "p", "question": "Hi", "answer": "Yes"}
    store = read(row, columns={"user": "question", "assistant": "answer"})
    assert uses(store) == {"messages": "null", "prompt": "unused", "question": "read", "answer": "read"}


def test_rows_that_hold_their_conversation_as_text_or_apart_have_no_messages_of_their_own() -> None:
    call = {"name": "f", "arguments": {}, "id": "1", "mood": 1}
    glaive = {
        "system": 'SYSTEM: Use {"name": "f", "mood": 1}',
        "chat": 'USER: Hi\n\nASSISTANT: <functioncall> {"name": "f", "mood": 1} <|endoftext|>',
        "mood": 1,
    }
    rows: list[dict[str, Any]] = [
        {"instruction": "Hi", "output": "Yes", "history": [["a", "b"]]},
        {"prompt": "Hi", "completion": "Yes", "reasoning": "Hm."},
        {"query": "Hi", "answers": [call], "tools": []},
        glaive,
    ]
    stores = [read(row) for row in rows]
    assert [{(count.of, count.key) for count in store.keys if count.of != "row"} for store in stores] == [
        set(),
        set(),
        {("call", key) for key in call},
        {("tool", "name"), ("tool", "mood"), ("call", "name"), ("call", "mood")},
    ]
    assert uses(stores[3])["mood"] == "unused"


def test_messages_that_are_read_twice_keep_their_places_and_are_counted_once() -> None:
    def read_with_greeting(row: Row) -> Conversation:
        turns = read_messages(row.value["turns"], "turns")
        return conversation_of(row, read_messages([{"role": "system", "content": "Hi"}, *turns], "all", ["turns"] * 3))

    with FORMATS.registered("turns", RowFormat("turns", ("turns",), (), "{}", read_with_greeting)):
        assert columns(read({"turns": [USER, ASSISTANT]}).keys)["message"]["all"] == 4
        assert reason(read({"turns": [USER, {**ASSISTANT, "wieght": 1}]}))[0].startswith("turns[1] has the key")


def test_a_key_is_named_by_its_place_in_the_row_as_it_is_written() -> None:
    flat = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Let me see."},
        {"from": "function_call", "value": '{"name": "f"}'},
        {"from": "function_call", "value": '{"name": "f"}'},
        {"from": "observation", "value": "6"},
        {"from": "gpt", "value": "Six.", "wieght": 1},
    ]
    assert reason(read({"conversations": flat, "system": "Be brief"}))[0].startswith("conversations[5] has the key")
    flat[3] |= {"wieght": 1}  # type: ignore[dict-item]
    assert reason(read({"conversations": flat}))[0].startswith("conversations[3] has the key 'wieght'")
    result = {"type": "tool_result", "tool_use_id": "1", "content": "6"}
    messages = [USER, ASSISTANT, {"role": "user", "content": [result, result, {"type": "text", "text": "So?"}]}]
    answer = {**ASSISTANT, "wieght": 1}
    assert reason(read({"messages": [*messages, answer]}))[0].startswith("messages[3] has the key 'wieght'")
    messages[2]["content"][2] = {"type": "image"}  # type: ignore[index]
    assert reason(read({"messages": [*messages, ASSISTANT]}))[0].startswith("messages[2].content[2] is not a text part")
    row = {"system": "Be brief", "messages": [USER, {**ASSISTANT, "weight": -1}]}
    assert reason(read(row))[0].startswith("weight of messages[1] must be")


@pytest.mark.parametrize("call", [{"name": "f"}, {"name": "f", "arguments": {}}, {"function": {"name": "f"}}])
def test_a_calls_misspelt_arguments_are_an_error(call: dict[str, Any]) -> None:
    holder = call.get("function", call)
    calls = [
        call | {"function": holder | {"argument": {"n": 1}}} if "function" in call else call | {"argument": {"n": 1}}
    ]
    what, _ = reason(read({"messages": [USER, {"role": "assistant", "tool_calls": calls}]}))
    place = "messages[1].tool_calls[0]" + (".function" if "function" in call else "")
    assert what == f"{place} has the key 'argument', which nothing reads; did you mean \"arguments\"?"


@pytest.mark.parametrize(
    ("row", "place", "key", "meant"),
    [
        ({"messages": [USER, {**ASSISTANT, "wieght": 0}]}, "messages[1]", "wieght", "weight"),
        ({"messages": [USER, {**ASSISTANT, "trian": False}]}, "messages[1]", "trian", "train"),
        ({"messages": [USER, {**ASSISTANT, "tool_call": []}]}, "messages[1]", "tool_call", "tool_calls"),
        (
            {"messages": [USER, {**ASSISTANT, "reasoning_contents": ""}]},
            "messages[1]",
            "reasoning_contents",
            "reasoning_content",
        ),
        ({"messages": [USER, {**ASSISTANT, "Loss": False}]}, "messages[1]", "Loss", "loss"),
        ({**CHAT, "tool": []}, "the row", "tool", "tools"),
        ({**CHAT, "Tools": []}, "the row", "Tools", "tools"),
        ({**CHAT, "chat_template_kwarg": {}}, "the row", "chat_template_kwarg", "chat_template_kwargs"),
        ({**CHAT, "sytem": "Be brief"}, "the row", "sytem", "system"),
        ({"instruction": "a", "output": "b", "inputs": "c"}, "the row", "inputs", "input"),
        ({"prompt": "a", "completion": "b", "reasonning": "c"}, "the row", "reasonning", "reasoning"),
        (
            {"input_ids": [1, 2], "labels": [1, 2], "attention-mask": [1, 1]},
            "the row",
            "attention-mask",
            "attention_mask",
        ),
    ],
)
def test_a_key_that_looks_misspelt_is_an_error_unless_it_is_let_pass(
    row: dict[str, Any], place: str, key: str, meant: str
) -> None:
    store = read(row)
    what, hint = reason(store)
    assert what == f'{place} has the key {key!r}, which nothing reads; did you mean "{meant}"?'
    assert "--ignore-unknown-keys" in hint
    assert [(count.key, count.suggestion) for count in store.keys if count.use == "refused"] == [(key, meant)]
    store = read(row, ignore_unknown=True)
    assert not store.lost
    assert [(count.key, count.suggestion) for count in store.keys if count.use == "unused"] == [(key, meant)]


def test_no_key_of_public_metadata_is_taken_for_a_misspelling() -> None:
    assert len(set(METADATA)) > 100
    store = read(
        *({**CHAT, key: "x"} for key in METADATA),
        *({"messages": [USER, {**ASSISTANT, key: "x"}]} for key in METADATA if key != "mask"),
    )
    assert [lost.note.reason for lost in store.lost] == []
    for row_format in (row_format for _, row_format in FORMATS.items()):
        assert [key for key in METADATA if typo_of(key, row_format.optional)] == []


@pytest.mark.parametrize(
    ("key", "meant"),
    [("mask", "masked"), ("ignore", "masked"), ("trainable", "train"), ("train_detail", "train")],
)
def test_a_name_of_another_program_for_what_is_not_trained_on_is_an_error(key: str, meant: str) -> None:
    row = {"messages": [USER, {**ASSISTANT, key: True}]}
    assert reason(read(row))[0] == f'messages[1] has the key {key!r}, which nothing reads; did you mean "{meant}"?'
    assert not read(row, ignore_unknown=True).lost


@pytest.mark.parametrize(
    ("row", "meant"),
    [
        ({**CHAT, "system_prompt": "Be brief"}, "system"),
        ({**CHAT, "available_tools": []}, "tools"),
        ({**CHAT, "enable_thinking": False}, "chat_template_kwargs"),
        ({"messages": [USER, {**ASSISTANT, "thought": "hm"}]}, "reasoning_content"),
        ({"prompt": "a", "completion": "b", "cot": "c"}, "reasoning_content"),
    ],
)
def test_a_name_of_another_program_is_listed_with_the_one_that_is_read_here(row: dict[str, Any], meant: str) -> None:
    store = read(row)
    assert not store.lost
    assert [count.suggestion for count in store.keys if count.use == "unused"] == [meant]


def test_a_name_of_another_program_means_nothing_beside_the_one_that_is_read() -> None:
    store = read({**CHAT, "system_prompt": "Be brief", "system": "Be kind"})
    assert [count.suggestion for count in store.keys if count.use == "unused"] == [""]


@pytest.mark.parametrize("answer", ["No.", [USER, ASSISTANT]])
@pytest.mark.parametrize("key", ["rejected_response", "rejected_messages", "chosen_messages"])
def test_the_answers_of_a_preference_are_known_by_the_beginning_of_their_names(key: str, answer: object) -> None:
    what, hint = reason(read({**CHAT, key: answer}))
    assert what.startswith(f"a row of preferences, by its `{key}`")
    assert "--columns messages=chosen" in hint


def test_figures_about_preferences_are_no_answers() -> None:
    assert not read({**CHAT, "rejected_score": 3.5, "chosen-rating": 4, "chosen_response": None}).lost


def test_the_keys_of_a_rows_instances_are_judged_as_its_own() -> None:
    row = {"instruction": "Hi", "instances": [{"input": "", "output": "a", "rank": 1}, {"output": "b", "rank": 2}]}
    store = read(row)
    assert uses(store) == {
        **dict.fromkeys(("instruction", "instances", "instances.input", "instances.output"), "read"),
        "instances.rank": "unused",
    }
    assert {count.key: count.count for count in store.keys}["instances.rank"] == 2
    what, hint = reason(read({**row, "instances": [{"inputs": "x", "output": "a"}]}))
    assert (
        what == "an object under instances has the key 'instances.inputs', which nothing reads; did you mean \"input\"?"
    )
    assert "--ignore-unknown-keys" in hint


def test_a_key_is_no_misspelling_of_one_that_is_there() -> None:
    store = read({"prompt": "a", "completion": "b", "tools": [], "tool": "x", "system": "s", "sytem": 1})
    assert not store.lost
    assert uses(store)["tool"] == "unused"
    assert typo_of("input_ids" * 100, ("input_ids",)) == typo_of("", ("id",)) == ""


@pytest.mark.parametrize("label", [False, True, 0, "good", [1]])
@pytest.mark.parametrize("row", [CHAT, {"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}])
def test_a_label_beside_an_answer_is_refused(row: dict[str, Any], label: Any) -> None:
    store = read({**row, "label": label})
    what, hint = reason(store)
    assert what.startswith("a row with a `label`, which nothing reads")
    assert "--objective sft trains on all rows" in hint
    assert uses(store)["label"] == "refused"
    assert not read({**row, "label": None}, {**row, "label": ""}).lost


def test_a_label_beside_a_text_is_only_counted_and_one_that_is_read_is_read() -> None:
    assert uses(read({"text": "A film.", "label": 1})) == {"text": "read", "label": "unused"}
    store = read({"review": "A film.", "label": "good"}, columns={"user": "review", "assistant": "label"})
    assert uses(store) == {"review": "read", "label": "read"}


@pytest.mark.parametrize("messages", [[USER, ASSISTANT], [USER]])
@pytest.mark.parametrize("rejected", ["No", [ASSISTANT], {"role": "assistant", "content": "No"}])
def test_a_row_of_preferences_is_refused_with_a_way_out(messages: list[Any], rejected: Any) -> None:
    row = {"messages": messages, "rejected": rejected, "label": True}
    store = read(row)
    what, hint = reason(store)
    assert what.startswith("a row of preferences, by its `rejected`")
    assert "--columns messages=chosen" in hint
    could_be_read = "read" if ASSISTANT in messages else "bad"
    assert uses(store) == {"messages": could_be_read, "rejected": "refused", "label": "refused"}
    compares = type("Compares", (), {"compares": True})
    with OBJECTIVES.registered("pairs", compares):
        _, hint = reason(read(row))
    assert "--objective pairs compares the answers of rows that have a chosen and a rejected one" in hint


def test_who_names_the_preferred_answer_has_chosen() -> None:
    row = {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT], "messages": [USER], "prompt": "Hi"}
    store = read(row, columns={"messages": "chosen"})
    assert not store.lost
    assert uses(store) == {"chosen": "read", "rejected": "unused", "messages": "unused", "prompt": "unused"}


def test_another_packages_format_declares_nothing_and_what_it_asks_for_is_read() -> None:
    def read_pair(row: Row) -> Conversation:
        assert "label" in row.value
        return Conversation(row.origin, [{"role": "user", "content": row.value["q"]}, dict(ASSISTANT)])

    def read_all(row: Row) -> Conversation:
        values = {**row.value}
        return Conversation(row.origin, [{"role": "user", "content": values["all"]}, dict(ASSISTANT)])

    with FORMATS.registered("pair", RowFormat("pair", ("q",), (), "{}", read_pair)):
        assert uses(read({"q": "Hi", "label": 1, "tool": "x"})) == {"q": "read", "label": "read", "tool": "unused"}
    with FORMATS.registered("all", RowFormat("all", ("all",), (), "{}", read_all)):
        assert uses(read({"all": "Hi", "label": 1, "rejected": 2})) == dict.fromkeys(
            ("all", "label", "rejected"), "read"
        )


def test_the_messages_that_the_texts_of_a_row_have_in_common_are_counted_once() -> None:
    def read_pair(row: Row) -> tuple[Conversation, ...]:
        prompt, *answers = (read_messages(row.value[key], key) for key in ("asked", "good", "poor"))
        return tuple(conversation_of(row, prompt + answer) for answer in answers)

    row = {
        "asked": [{**USER, "mood": 1}],
        "good": [{**ASSISTANT, "rank": 1}],
        "poor": [{**ASSISTANT, "content": "No", "rank": 2}],
    }
    with FORMATS.registered("pair", RowFormat("pair", ("good", "poor"), (), "{}", read_pair)):
        counts = {(count.of, count.key): count.count for count in read(row).keys}
    assert counts == {
        **dict.fromkeys((("row", "asked"), ("row", "good"), ("row", "poor"), ("message", "mood")), 1),
        **dict.fromkeys((("message", "role"), ("message", "content")), 3),
        ("message", "rank"): 2,
    }


def test_counts_are_sums_with_the_first_row_and_bounded() -> None:
    counts = KeyCounts()
    counts.add_row(
        "a:1", [KeyUse("row", "id", "unused"), KeyUse("message", "id", "unused"), KeyUse("message", "id", "unused")]
    )
    counts.add_row("a:2", [KeyUse("row", "id", "unused", "ids"), KeyUse("row", "id", "read")])
    assert counts.counts == [
        KeyCount("row", "id", "unused", 2, "a:1", "ids"),
        KeyCount("message", "id", "unused", 2, "a:1"),
        KeyCount("row", "id", "read", 1, "a:2"),
    ]
    for number in range(2 * MOST_KEYS):
        counts.add_row(f"b:{number}", [KeyUse("row", f"key {number}", "unused")])
    assert len(counts.counts) == MOST_KEYS + 1
    others = counts.counts[-1]
    assert (others.key, others.count, others.first) == (OTHERS, MOST_KEYS + 3, f"b:{MOST_KEYS - 3}")


def test_unused_keys_are_told_in_words() -> None:
    counts = [
        KeyCount("row", "id", "unused", 1200, "a:1"),
        KeyCount("row", "messages", "read", 1200, "a:1"),
        KeyCount("row", "tool", "unused", 3, "a:2", "tools"),
        KeyCount("message", "mood", "unused", 2, "a:7"),
    ]
    assert in_words(unused_keys(counts)) == (
        'tool (3, first a:2; did you mean "tools"?), id (1,200, first a:1); of messages: mood (2, first a:7)'
    )
    many = [KeyCount("row", f"k{number}", "unused", 1, "a:1") for number in range(25)]
    assert in_words(many).endswith("k19 (1, first a:1); and 5 more")


NAMES = st.one_of(
    st.sampled_from(METADATA),
    st.sampled_from(["label", "chosen", "rejected", "tool", "sytem", "wieght", "tool_call", "Tools", "losss"]),
    st.text(min_size=1, max_size=8).filter(
        lambda key: key.lower() not in {"image", "images", "video", "videos", "audio"}
    ),
)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.just("x"))
NOT_UNKNOWN = {
    "system",
    "tools",
    "role",
    "from",
    "content",
    "value",
    "thinking",
    "train",
    "weight",
    "loss",
    "masked",
    "audios",
}
UNKNOWN = st.dictionaries(NAMES.filter(lambda key: key not in NOT_UNKNOWN), VALUES, max_size=4)
SAID = st.sampled_from([{}, {"train": True}, {"weight": 0.5}, {"reasoning": "Hm."}, {"tool_calls": []}, {"loss": None}])


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({**draw(UNKNOWN), **USER})
        messages.append({**draw(UNKNOWN), **draw(SAID), **ASSISTANT})
    row = {**draw(UNKNOWN), "messages": messages}
    return row | draw(st.sampled_from([{}, {"system": "Be brief"}, {"tools": [{"name": "f"}]}, {"functions": None}]))


@given(st.lists(conversations(), min_size=1, max_size=5), st.booleans())
def test_every_key_is_read_refused_or_unused_and_the_counts_are_those_of_the_input(
    rows: list[dict[str, Any]], ignore: bool
) -> None:
    given_keys: Counter[tuple[str, str]] = Counter()
    for row in rows:
        given_keys.update(("row", key) for key in row)
        for message in row["messages"]:
            given_keys.update(("message", key) for key in message)
        for tool in row.get("tools", []):
            given_keys.update(("tool", key) for key in tool)
    store = read(*rows, ignore_unknown=ignore)
    counted: Counter[tuple[str, str]] = Counter()
    for count in store.keys:
        counted[count.of, count.key] += count.count
    assert counted == given_keys
    assert len({(count.of, count.key, count.use) for count in store.keys}) == len(store.keys)
    refused = any(count.use == "refused" for count in store.keys)
    assert refused == bool(store.lost)


def test_counts_are_equal_for_several_workers_and_from_the_cache(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, folder: Path
) -> None:
    row = {"prompt": "a", "completion": "b"}
    odd = [{"id": n} if n % 3 else {"mood": n, "tool": []} for n in range(400)]
    data = write_rows({**row, "prompt": 3}, *({**row, **one} for one in odd))
    told = []
    for workers, cached in ((1, False), (1, True), (1, True), (2, False)):
        config = TrainConfig(data=data, data_workers=workers, data_cache=cached, skip_bad_rows=True)
        told.append(survey(config, tokenizer).report.to_json())
    assert all(one == told[0] for one in told)
    unused = {(one["key"], one["count"], one["first"]) for one in told[0]["unused_keys"]}
    assert unused == {("id", 266, f"{data}:3"), ("mood", 134, f"{data}:2")}
    assert {(one["key"], one["use"], one["count"]) for one in told[0]["sources"][0]["keys"]} >= {
        ("prompt", "read", 400),
        ("tool", "refused", 134),
    }


def test_the_report_and_its_summary_list_the_keys_that_nothing_reads(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    row = {"prompt": "a", "completion": "b"}
    data = [write_rows({**row, "id": 1}, row, name="a.jsonl"), write_rows({**row, "id": 2, "tool": 1}, name="b.jsonl")]
    with pytest.raises(UserError, match='did you mean "tools"') as caught:
        prepare(TrainConfig(data=data), tokenizer)
    assert "--ignore-unknown-keys" in caught.value.hint
    report = prepare(TrainConfig(data=data, ignore_unknown_keys=True), tokenizer).report
    assert report.summary()["unused keys"] == (
        f'tool (1, first {data[1]}:1; did you mean "tools"?), id (2, first {data[0]}:1)'
    )
    unused = json.loads(json.dumps(report.to_json()))["unused_keys"]
    assert unused[1] == {
        "of": "row",
        "key": "id",
        "use": "unused",
        "count": 2,
        "first": f"{data[0]}:1",
        "suggestion": None,
    }
    plain = prepare(TrainConfig(data=write_rows(row)), tokenizer).report
    assert "unused keys" not in plain.summary()


def test_the_summary_tells_which_rows_say_what_they_weigh(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    row = {"prompt": "a", "completion": "b"}
    data = write_rows({**row, "weight": 0.5}, {**row, "weight": 2}, {**row, "train": False}, row)
    report = prepare(TrainConfig(data=data), tokenizer).report
    assert report.summary()["row weights"] == "weight (2 rows), train (1 row)"
    assert report.summary()["rows"] == "3 to train on, 0 held out, 1 dropped"
    assert "row weights" not in prepare(TrainConfig(data=write_rows(row)), tokenizer).report.summary()
