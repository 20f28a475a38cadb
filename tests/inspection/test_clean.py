"""Clean data is trained on as the data was, whatever form its rows had; and it is clean: written again, nothing of it changes."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mlx_sft.config import TrainConfig
from mlx_sft.data.conversation import Document
from mlx_sft.data.formats import RowFormat
from mlx_sft.data.prepare import PreparedData, survey
from mlx_sft.data.readers import Row
from mlx_sft.errors import USAGE, UserError
from mlx_sft.inspection import CleanData, write_clean
from mlx_sft.registry import FORMATS
from tests.disks import a_full_disk
from tests.fuzz.promises import ROWS, attempt

pytestmark = pytest.mark.fast

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)

LOOP = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' ' + m.name if m.name }}\n"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "writes objects": LOOP.replace("CALL", "{{ call.function.name }}{{ call.function.arguments | tojson }}"),
    "takes text alone": LOOP.replace("CALL", "{{ call.function.name }}{{ '' + call.function.arguments }}"),
    "writes whole calls": LOOP.replace("CALL", "{{ call | tojson }}"),
    "reads reasoning": LOOP.replace("{% if m.reasoning_content", "{{ m.reasoning }}{% if m.reasoning_content").replace(
        "CALL", "{{ call.function | tojson }}"
    ),
    "writes whole messages": LOOP.replace("CALL", "").replace(
        "m.content or ''", "m | tojson if m.role == 'user' else m.content"
    ),
    "has no calls": LOOP.replace("CALL", ""),
}

Write = Callable[..., CleanData]


@pytest.fixture(scope="session")
def tokenizers(tokenizer_of_bases: PreTrainedTokenizerFast) -> dict[str, PreTrainedTokenizerFast]:
    """One with each of the templates."""
    found = {}
    for name, template in TEMPLATES.items():
        found[name] = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer_of_bases.backend_tokenizer, eos_token="<|im_end|>"
        )
        found[name].chat_template = template
    return found


@pytest.fixture
def write(tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerFast]) -> Write:
    """`write(rows, template=, to=, overwrite=, **settings)` → what was written of rows, or of the data that `data=` names."""

    def written(
        *rows: Any, template: str = "writes objects", to: str = "clean.jsonl", overwrite: bool = False, **given: Any
    ) -> CleanData:
        if rows:
            (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = TrainConfig(**{"data": [str(tmp_path / "data.jsonl")], "data_cache": False} | given)
        return write_clean(config, tmp_path / to, overwrite=overwrite, tokenizer=tokenizers[template])

    return written


def lines(result: CleanData) -> list[Any]:
    return [json.loads(line) for line in result.path.read_text(encoding="utf-8").splitlines()]


def counted(result: CleanData) -> dict[str, int]:
    return {name: count for name, (count, _) in result.changes.items()}


def chat(question: str = "the cat", answer: str = "sat", **of_answer: Any) -> dict[str, Any]:
    answered = {"role": "assistant", "content": answer} | of_answer
    return {"messages": [{"role": "user", "content": question}, answered]}


# Exactly the same examples


MORE_ROWS: list[dict[str, Any]] = [
    {"query": "a", "answers": '[{"name": "f", "arguments": {"b": 1.50}}]', "tools": '[{"name": "f"}]', "id": 7},
    {
        "system": 'SYSTEM: Use them - {"name": "f", "parameters": {}}',
        "chat": "USER: a ASSISTANT: b <|endoftext|>\nUSER: c\nASSISTANT: <functioncall> "
        "{\"name\": \"f\", \"arguments\": '{\"d\":1}'} <|endoftext|>\nFUNCTION RESPONSE: {}\nASSISTANT: e",
    },
    {"instruction": "a", "output": "b", "reasoning": "c", "system": "d", "chat_template_kwargs": '{"e": null}'},
    {
        "prompt": [{"role": "human", "content": "a"}, {"role": "gpt", "content": "b"}, {"role": "user", "content": "c", "name": "e"}],
        "completion": [{"role": "assistant", "content": "d", "mood": "f"}],
    },
    {
        "messages": [
            {"role": "Human", "content": "a", "name": None},
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a":1,"b":"2"}'}},
            {"role": "function", "name": "f", "content": "b"},
            {"role": "bot", "thinking": "c", "content": "d", "loss": False},
            {"role": "assistant", "content": "e", "reasoning": "f", "loss_weight": 0.25},
            {"role": "user", "content": "g", "train": False},
            {"role": "assistant", "content": "h", "tool_calls": '[{"name": "f", "args": "\\"{}\\"", "index": 0}]'},
            {"role": "assistant", "content": "i", "reasoning": "j", "reasoning_content": "k", "weight": 1},
        ],
        "functions": [{"name": "f", "parameters": '{"type": "object"}'}],
        "id": 8,
        "source": None,
    },
]  # fmt: skip
VALUES = st.sampled_from(
    [None, True, 0, 1, 0.5, "", " ", "a", "the cat", "{}", '{"a":1}', "[]", [], {}, [{}], {"a": 1}]
)
KEYS = st.sampled_from(
    (
        *("train", "weight", "masked", "role", "from", "value", "system", "tool_calls", "content", "name", "thinking"),
        *(
            "reasoning",
            "reasoning_content",
            "function_call",
            "arguments",
            "mood",
            "tools",
            "type",
            "chat_template_kwargs",
        ),
    )
)


@st.composite
def rows_of_a_file(draw: st.DrawFn) -> list[Any]:
    """Good rows of one format, in which something is replaced, left out or added, at any depth."""
    good = draw(st.sampled_from([*ROWS, *MORE_ROWS]))
    rows = [good]
    for _ in range(draw(st.integers(0, 3))):
        row = json.loads(json.dumps(good))
        for _ in range(draw(st.integers(1, 3))):
            place: Any = row
            while isinstance(place, dict | list) and place:
                inside = list(place) if isinstance(place, dict) else list(range(len(place)))
                key = draw(st.sampled_from(inside))
                if not isinstance(place[key], dict | list) or not draw(st.integers(0, 3)):
                    if isinstance(place, dict) and draw(st.booleans()):
                        place[draw(KEYS)] = deepcopy(draw(VALUES))
                    elif draw(st.booleans()):
                        place[key] = deepcopy(draw(VALUES))
                    else:
                        del place[key]
                    break
                place = place[key]
        rows.append(row)
    return rows


@fuzz
@given(
    rows_of_a_file(),
    st.sampled_from(sorted(TEMPLATES.keys() - {"writes whole messages"})),
    st.fixed_dictionaries(
        {},
        optional={
            "consecutive_turns": st.just("join"),
            "train_on": st.sampled_from(["last", "every-turn"]),
            "ignore_unknown_keys": st.just(True),
            "special_in_content": st.just("keep"),
            "max_length": st.just(20),
        },
    ),
)
def test_training_on_it_is_training_on_the_rows_that_are_kept(
    write: Write, tokenizers: dict[str, PreTrainedTokenizerFast], rows: list[Any], template: str, given: dict[str, Any]
) -> None:
    assert_the_same(write, tokenizers[template], rows, template, given)


@pytest.mark.parametrize("template", sorted(TEMPLATES.keys() - {"writes whole messages"}))
@pytest.mark.parametrize("row", [*ROWS, *MORE_ROWS], ids=lambda row: next(iter(row)))
def test_every_format_is_trained_on_as_it_was_with_every_template(
    write: Write, tokenizers: dict[str, PreTrainedTokenizerFast], row: Any, template: str
) -> None:
    assert_the_same(write, tokenizers[template], [row], template, {})


def assert_the_same(
    write: Write, tokenizer: PreTrainedTokenizerFast, rows: list[Any], template: str, given: dict[str, Any]
) -> None:
    result = attempt(lambda: write(*rows, template=template, overwrite=True, **given))
    if isinstance(result, UserError):
        assert "none of" in result.what
        return
    of_data = surveyed(tokenizer, result.path.with_name("data.jsonl"), **given)
    of_clean = surveyed(tokenizer, result.path, **given)
    assert of_clean.train.fingerprint() == of_data.train.fingerprint()
    assert result.written <= of_clean.report.rows
    assert result.written == of_clean.report.rows or "instances" in rows[0]
    assert not of_clean.report.bad
    again = write(data=[str(result.path)], to="again.jsonl", template=template, overwrite=True, **given)
    assert again.path.read_bytes() == result.path.read_bytes()
    assert again.changes == {}
    assert again.left_out == []


@pytest.mark.parametrize("given", [{"valid_fraction": 0.3}, {"columns": {"messages": "talk"}}])
def test_what_is_held_out_and_where_the_rows_kept_their_parts_makes_no_difference(
    write: Write, tokenizers: dict[str, PreTrainedTokenizerFast], tmp_path: Path, given: dict[str, Any]
) -> None:
    key = "talk" if "columns" in given else "messages"
    rows = [{key: chat(f"the cat {number}")["messages"]} for number in range(8)]
    result = write(*rows, **given)
    before = surveyed(tokenizers["writes objects"], tmp_path / "data.jsonl", **given)
    after = surveyed(tokenizers["writes objects"], result.path, **given | {"columns": {}})
    assert after.report.fingerprint == before.report.fingerprint
    assert len(after.valid) == (2 if "valid_fraction" in given else 0)
    assert result.written == 8


def surveyed(tokenizer: PreTrainedTokenizerFast, path: Path, **given: Any) -> PreparedData:
    return survey(TrainConfig(**{"data": [str(path)], "data_cache": False} | given), tokenizer)


def test_the_examples_of_a_row_are_rows_and_its_weight_is_theirs(write: Write, tmp_path: Path) -> None:
    instances = [{"input": "the cat", "output": "sat"}, {"input": "", "output": "the mat"}]
    result = write(
        {"instruction": "on", "instances": instances, "weight": 0.5}, {"instruction": "the", "instances": instances[:1]}
    )
    assert lines(result) == [
        chat("on\nthe cat", "sat", weight=0.5),
        chat("on", "the mat", weight=0.5),
        chat("the\nthe cat", "sat"),
    ]
    assert (result.written, counted(result)["an example of several → a row"]) == (2, 2)
    rows = [{"text": "the cat", "weight": 0.5}, {"text": "the mat", "id": 1}]
    assert lines(write(*rows, overwrite=True)) == [{"text": "the cat", "weight": 0.5}, {"text": "the mat"}]
    tokens = (
        {"input_ids": [1, 2], "labels": [1, 2], "loss": False},
        {"input_ids": [1, 2], "labels": [1, 2], "weight": 2},
    )
    assert lines(write(*tokens, overwrite=True)) == [{"input_ids": [1, 2], "labels": [1, 2], "weight": 2}]


def test_roles_by_other_names_are_written_under_their_own(write: Write) -> None:
    row = {"messages": [{"role": "hero", "content": "the cat"}, {"role": "user", "content": "sat"}]}
    result = write(row, roles={"hero": "user", "user": "assistant"})
    assert lines(result) == [chat()]
    assert counted(result) == {"roles as --roles names them": 1}


# What is written


CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def test_arguments_are_objects_where_the_template_is_given_objects(write: Write) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    row = {"messages": [*chat()["messages"][:1], {"role": "assistant", "content": "", "tool_calls": [call]}]}
    (as_objects,) = lines(write(row))
    assert as_objects["messages"][1]["tool_calls"] == [CALL]
    text = write(row, template="takes text alone", to="text.jsonl")  # which writes it as it stands, without a space
    assert lines(text) == [row]
    assert text.changes == {}


def test_what_nothing_reads_is_left_out_and_what_the_template_reads_stays(write: Write) -> None:
    row = chat(mood="good", weight=1) | {"id": 3, "source": None}
    row["messages"][0]["name"] = "cat"
    named = {"messages": [{"role": "user", "content": "the cat", "name": "cat"}, chat()["messages"][1]]}
    result = write(row, chat("the dog"), row)
    assert lines(result) == [named, chat("the dog"), named]
    left_out = {"row: id left out": 2, "message: mood left out": 2, "message: weight left out": 2, "null left out": 2}
    assert counted(result) == left_out
    assert {first for _, first in result.changes.values()} == {f"{result.path.with_name('data.jsonl')}:1"}


def test_rows_are_written_whole_whatever_the_longest_length(write: Write) -> None:
    row = chat(answer="the cat sat on the mat. " * 50)
    for overlong in ("truncate", "drop", "error"):
        assert lines(write(row, chat(), max_length=30, overlong=overlong, overwrite=True)) == [row, chat()]


def test_rows_that_are_lost_are_left_out_with_their_reasons(write: Write, tmp_path: Path) -> None:
    forged, martian = chat("<|im_end|>"), {"messages": [{"role": "martian", "content": ""}]}
    result = write(chat(), martian, forged, forged, chat("the dog"), special_in_content="drop")
    assert lines(result) == [chat(), chat("the dog")]
    assert (result.rows, result.written) == (5, 2)
    told = {(one["fate"], one["count"], one["first"]) for one in result.left_out}
    assert told == {("bad", 1, f"{tmp_path}/data.jsonl:2"), ("dropped", 2, f"{tmp_path}/data.jsonl:3")}


def test_rows_that_repeat_others_are_written_and_counted(write: Write) -> None:
    result = write(chat(), chat("the dog"), chat())
    assert (result.written, result.duplicates) == (3, 1)
    assert "1 example that repeats an earlier one: written all the same" in list(result.describe())


def test_text_and_tokens_stay_what_they_are(write: Write) -> None:
    assert lines(write({"text": "the cat", "id": 1})) == [{"text": "the cat"}]
    tokens = {"input_ids": [1, 5, 6, 1], "labels": [-100, -100, 6, -100], "attention_mask": [0, 1, 1, 0]}
    result = write(tokens, to="tokens.jsonl")
    assert lines(result) == [{"input_ids": [5, 6], "labels": [-100, 6]}]
    assert result.format == "tokenized"


def test_files_follow_each_other_and_validation_rows_are_named_as_left_out(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(json.dumps(chat()).encode()))
    (folder / "valid.jsonl").write_text(json.dumps(chat("the valid")))
    (tmp_path / "qa.csv").write_text("prompt,completion,id\nthe dog,sat,7\n")
    result = write(data=[str(folder), str(tmp_path / "qa.csv")])
    assert lines(result) == [chat(), chat("the dog")]
    assert result.valid == [str(folder / "valid.jsonl")]
    assert any("valid.jsonl are not in it" in line for line in result.describe())


# What was changed


@pytest.mark.parametrize(
    ("row", "made"),
    [
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c"},
         ["format sharegpt → messages", "row: conversations → messages", "row: system → messages",
          "message: from → role", "message: from → role", "message: value → content", "message: value → content",
          "message: role human → user", "message: role gpt → assistant"]),
        ({"instruction": "a", "input": "", "output": "b", "thinking": "c"},
         ["format alpaca → messages", "row: instruction → messages", "row: output → messages",
          "row: empty input left out", "row: thinking → messages"]),
        ({"prompt": chat()["messages"], "completion": "a"},
         ["format prompt-completion → messages", "row: prompt → messages", "row: completion → messages",
          "weight 0 added to an answer in a prompt"]),
        ({"messages": json.dumps(chat()["messages"])}, ["row: messages JSON text → a list"]),
        (chat(content=[{"type": "text", "text": "a"}]), ["message: content a list → a string"]),
        (chat(content=[{"type": "thinking", "thinking": "a"}, {"type": "text", "text": "b"}]),
         ["message: content → reasoning_content", "message: content a list → a string"]),
        (chat(thinking="a"), ["message: thinking → reasoning_content"]),
        ({"messages": [*chat(train=False)["messages"], *chat()["messages"]]}, ["message: train → weight"]),
        (chat(content=None, function_call={"name": "f", "arguments": '{"a": 1}'}),
         ["message: function_call → tool_calls", "call: wrapped in function", "call: arguments a string → an object",
          "null left out"]),
        (chat(tool_calls=[{"function": {"name": "f"}}]), ["call: type added", "call: arguments {} added"]),
        (chat(tool_calls=[{"name": "f", "args": {"a": 1}, "index": 0}]),
         ["call: args → arguments", "call: wrapped in function", "call: index left out"]),
        (chat(tool_calls=[]), ["message: empty tool_calls left out"]),
        (chat() | {"tools": '[{"name": "f", "input_schema": {}}]'},
         ["row: tools JSON text → a list", "tool: input_schema → parameters", "tool: wrapped in function"]),
        (chat() | {"tools": [{"type": "function", "function": {"name": "f"}, "role": True}]}, []),
        (chat() | {"functions": [], "chat_template_kwargs": "{}"},
         ["row: empty functions left out", "row: empty chat_template_kwargs left out"]),
        ({"messages": [*chat()["messages"], {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}]},
         ["message: role tool_call → assistant", "message: content → tool_calls", "assistant messages in a row → one"]),
        ({"messages": [*chat(tool_calls=[CALL])["messages"],
                       {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "b"}]}]},
         ["message: tool_result in content → message of the tool"]),
    ],
)  # fmt: skip
def test_each_change_is_counted_under_its_name(write: Write, row: dict[str, Any], made: list[str]) -> None:
    assert counted(write(row)) == Counter(made)


def test_turns_that_a_setting_joins_are_counted(write: Write) -> None:
    messages = [*chat()["messages"], {"role": "assistant", "content": "on the mat"}]
    row = {"messages": messages, "system": "the cat"}
    assert counted(write(row, consecutive_turns="join")) == {
        "row: system → messages": 1,
        "assistant messages in a row → one": 1,
    }


def test_another_name_of_a_column_is_a_change(write: Write) -> None:
    result = write({"talk": chat()["messages"]}, columns={"messages": "talk"})
    assert counted(result) == {"column 'talk' → messages": 1}


def test_a_new_key_in_every_row_does_not_fill_the_memory(tmp_path: Path) -> None:
    result = CleanData(tmp_path / "clean.jsonl")
    for number in range(3_000):
        result.add(f"a:{number}", [f"row: {number} left out"])
    assert len(result.changes) == 1_001
    assert sum(count for count, _ in result.changes.values()) == 3_000
    assert len(list(result.describe())) < 100
    result.add("a:0", ["row: " + "x" * 100_000 + " left out"])
    assert max(map(len, result.changes)) < 200


# What is refused


def test_rows_of_several_kinds_are_not_one_file(write: Write, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("the cat sat\n")
    (tmp_path / "data.jsonl").write_text(json.dumps(chat()))
    with pytest.raises(UserError, match=r"book.txt:1: this row would be written as text.*\n.*each file by itself"):
        write(data=[str(tmp_path / "data.jsonl"), str(tmp_path / "book.txt")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["book.txt", "data.jsonl"]


def test_shares_of_a_mixture_would_be_lost(write: Write, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(chat()))
    with pytest.raises(UserError, match="shares of a mixture would be lost") as caught:
        write(data=[f"{tmp_path}/data.jsonl:0.5"])
    assert caught.value.exit_code == USAGE


def test_pairs_of_another_packages_format_stay_as_they_are(write: Write) -> None:
    def read_two(row: Row) -> tuple[Document, ...]:
        return tuple(Document(row.origin, row.value[key]) for key in ("a", "b"))

    two, what = RowFormat("two", ("a", "b"), (), "{}", read_two), "a row of 2 texts of the format two, which cannot be"
    with FORMATS.registered("two", two), pytest.raises(UserError, match=what) as caught:
        write({"a": "the cat", "b": "the dog"}, objective="dpo")
    assert caught.value.hint == "leave such rows as they are"


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


PROMPT = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "on"},
]
CHOSEN = {"role": "assistant", "content": "the mat", "reasoning_content": "Hm."}
CALLING = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": '{"a":1}'}]}
PAIRS: list[dict[str, Any]] = [
    {"prompt": "the cat", "chosen": "sat", "rejected": "the dog", "chosen_rating": 5, "rejected_rating": 4.5, "id": 7},
    {"prompt": PROMPT, "chosen": [CHOSEN], "rejected": [{**CHOSEN, "weight": 0}, {"role": "user", "content": "?"}, CHOSEN]},
    {"chosen": [*PROMPT, CHOSEN], "rejected": [*PROMPT, CALLING, {"role": "tool", "content": "6"}, CHOSEN], "system": "Be brief."},
    {"conversations": [{"from": "human", "value": "a"}], "chosen": gpt("b"), "rejected": gpt("c"), "tools": '[{"name": "f"}]'},
    {"instruction": "a", "input": "b", "history": [["c", "d"]], "chosen": "e", "rejected": "f", "weight": 1},
    {"question": "a", "system": "", "chosen": "e", "rejected": "f", "chat_template_kwargs": {"a": 1}},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"messages": [*PROMPT, CHOSEN], "rejected_response": "the dog", "system": "Be brief."},
]  # fmt: skip
LABELLED: list[dict[str, Any]] = [
    {"prompt": "the cat", "completion": "sat", "label": True, "id": 7},
    {"prompt": PROMPT, "completion": [CALLING, {"role": "tool", "content": "6"}, CHOSEN], "label": False},
    {"messages": [*PROMPT, CHOSEN], "kto_tag": "false", "system": "Be brief."},
    {"conversations": [{"from": "human", "value": "a"}, gpt("b")], "label": 1},
    {"instruction": "a", "output": "b", "label": "true", "weight": 1},
]  # fmt: skip


@pytest.mark.parametrize("row", LABELLED, ids=lambda row: next(iter(row)))
def test_an_answer_with_a_label_is_trained_on_as_it_was(
    write: Write, tokenizers: dict[str, PreTrainedTokenizerFast], row: dict[str, Any]
) -> None:
    for template in ("writes objects", "takes text alone"):
        assert_the_same(write, tokenizers[template], [row], template, {"objective": "kto"})
    (written,) = lines(write(row, overwrite=True, objective="kto"))
    assert written["label"] is (row.get("label") in (True, 1, "true"))


@pytest.mark.parametrize("row", PAIRS, ids=lambda row: next(iter(row)))
@pytest.mark.parametrize("given", [{}, {"consecutive_turns": "join", "train_on": "last"}])
def test_a_pair_is_trained_on_as_it_was(
    write: Write, tokenizers: dict[str, PreTrainedTokenizerFast], row: dict[str, Any], given: dict[str, Any]
) -> None:
    for template in ("writes objects", "takes text alone"):
        assert_the_same(write, tokenizers[template], [row], template, given | {"objective": "dpo"})
    assert lines(write(row, overwrite=True, objective="dpo"))[0].keys() >= {"prompt", "chosen", "rejected"}


def test_what_is_different_in_a_clean_pair_is_told(write: Write) -> None:
    result = write(PAIRS[0], PAIRS[3], objective="dpo")
    assert result.format == "pairs"
    assert lines(result)[0] == {
        "prompt": [{"role": "user", "content": "the cat"}],
        "chosen": [{"role": "assistant", "content": "sat"}],
        "rejected": [{"role": "assistant", "content": "the dog"}],
        "score_chosen": 5.0,
        "score_rejected": 4.5,
    }
    found = counted(result)
    assert {name: found[name] for name in ("row: chosen_rating → score_chosen", "row: id left out")} == dict.fromkeys(
        ("row: chosen_rating → score_chosen", "row: id left out"), 1
    )
    assert found["row: conversations → prompt"] == found["row: chosen an object → a list"] == 1
    assert found["message: from → role"] == 3


@pytest.mark.parametrize("link", [None, os.link, os.symlink])
def test_the_data_itself_is_never_replaced(write: Write, tmp_path: Path, link: Callable[..., None] | None) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(chat(mood="good")))
    if link:
        link(data, tmp_path / "other.jsonl")
    with pytest.raises(UserError, match="this file is one of the data") as caught:
        write(to="other.jsonl" if link else "data.jsonl", overwrite=True)
    assert caught.value.exit_code == USAGE
    assert json.loads(data.read_text()) == chat(mood="good")


def test_validation_rows_are_not_replaced_either(write: Write, tmp_path: Path) -> None:
    (tmp_path / "valid.jsonl").write_text(json.dumps(chat()))
    with pytest.raises(UserError, match="this file is one of the data"):
        write(chat(), valid=str(tmp_path / "valid.jsonl"), to="valid.jsonl", overwrite=True)


def test_a_file_that_is_there_is_replaced_where_that_is_asked_for(write: Write, tmp_path: Path) -> None:
    (tmp_path / "clean.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"this file is there already.*\n.*--overwrite"):
        write(chat())
    assert (tmp_path / "clean.jsonl").read_text() == "mine"
    assert lines(write(chat(), overwrite=True)) == [chat()]


@pytest.mark.parametrize(
    ("name", "what"), [("clean.json", "as .jsonl"), ("clean", "as .jsonl"), ("f.jsonl", "a folder")]
)
def test_a_name_that_cannot_be_is_refused(write: Write, tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "f.jsonl").mkdir()
    with pytest.raises(UserError, match=what) as caught:
        write(chat(), to=name)
    assert caught.value.exit_code == USAGE


def test_rows_of_which_none_is_kept_are_no_file(write: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing to write: none of 1 row is kept\n.*data.jsonl:1: .*martian"):
        write({"messages": [{"role": "martian", "content": ""}]})
    assert not (tmp_path / "clean.jsonl").exists()


def test_a_number_that_json_cannot_write_is_named(write: Write, tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "data.parquet"
    parquet.write_table(arrow.Table.from_pylist([chat() | {"chat_template_kwargs": {"a": float("inf")}}]), path)
    with pytest.raises(UserError, match=r"data.parquet\[0\]: it holds what JSON cannot write"):
        write(data=[str(path)])


def test_where_the_examples_would_be_others_nothing_is_written(write: Write, tmp_path: Path) -> None:
    user, answer = chat()["messages"]
    with pytest.raises(UserError, match=r"data.jsonl:2: its clean row would be trained on otherwise"):
        write(chat(), {"messages": [user | {"mood": "good"}, answer]}, template="writes whole messages")
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_row_that_can_no_longer_be_read_is_named_with_its_reason(write: Write, tmp_path: Path) -> None:
    deep = '{"a":' * 198 + "1" + "}" * 198
    row = chat(content="", tool_calls=[{"function": {"name": "f", "arguments": deep}}])
    with pytest.raises(UserError, match=r"data.jsonl:1: its clean row .* otherwise: not JSON: nested too deeply"):
        write(row)


def test_a_full_disk_leaves_nothing(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_full_disk(monkeypatch), pytest.raises(UserError, match="the disk is full"):
        write(chat())
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]
