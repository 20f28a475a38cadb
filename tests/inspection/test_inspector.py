from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_sft.config import TrainConfig
from mlx_sft.errors import USAGE, UserError
from mlx_sft.inspection import ONLY, Inspection, inspect

pytestmark = pytest.mark.fast

Look = Callable[..., Inspection]


def lines(inspection: Inspection) -> list[int]:
    return [int(row.origin.rpartition(":")[2]) for row in inspection.rows]


def test_every_row_is_there_in_order_with_what_became_of_it(look: Look) -> None:
    inspection = look()
    fates = ["kept", "kept", "kept", "bad", "bad", "truncated", "kept", "kept", "kept"]
    assert [row.fate for row in inspection.rows] == fates
    assert lines(inspection) == list(range(1, 10))
    assert inspection.table["rows"] == {"rows": 9, "kept": 7, "truncated": 1, "dropped": 0, "bad": 2}


def test_an_example_is_shown_by_its_tokens_with_what_is_supervised_of_them(look: Look) -> None:
    (example,) = look().rows[1].examples
    assert "".join(example.pieces) == "<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\nsat<|im_end|>\n"
    supervised = [piece for piece, weight in zip(example.pieces, example.weights, strict=True) if weight]
    assert "".join(supervised) == "sat<|im_end|>"
    assert {piece for piece, special in zip(example.pieces, example.special, strict=True) if special} == {
        "<|im_start|>",
        "<|im_end|>",
    }


def test_each_turn_has_its_role_and_its_tokens(look: Look) -> None:
    (example,) = look().rows[1].examples
    told = [(turn.role, turn.message, turn.end - turn.start, turn.supervised_tokens) for turn in example.turns]
    assert [turn[:2] for turn in told] == [("user", 0), ("assistant", 1)]
    assert sum(turn[2] for turn in told) == len(example.token_ids)
    assert [turn[3] for turn in told] == [0, example.supervised_tokens]


def test_a_truncated_row_is_shown_whole_with_its_cut(look: Look) -> None:
    row = look(only="truncated").rows[0]
    (example,) = row.examples
    assert example.cut_at == 200 < len(example.token_ids)
    assert row.reason == f"{len(example.token_ids)} tokens, cut to 200"
    assert example.supervised_tokens < sum(weight != 0 for weight in example.weights)


def test_a_bad_row_shows_its_reason_and_itself(look: Look) -> None:
    forged, unreadable = look(only="bad").rows
    assert "special token <|im_end|>" in forged.reason
    assert "--special-in-content" in forged.hint
    assert json.loads(forged.raw)["messages"][0]["content"] == "forge <|im_end|>"
    assert "not JSON" in unreadable.reason
    assert (unreadable.raw, unreadable.examples) == ("", [])


def test_a_long_raw_row_is_shortened_and_still_json(look: Look, data: Path) -> None:
    data.write_text(json.dumps({"messages": [{"role": "martian", "content": "x" * 5000}] * 50}))
    raw = look(only="bad").rows[0].raw
    assert len(raw) <= 4001
    assert "(and 4,600 characters more)" in raw


@pytest.mark.parametrize(
    ("only", "found"),
    [
        ("kept", [1, 2, 3, 7, 8, 9]),
        ("truncated", [6]),
        ("dropped", []),
        ("bad", [4, 5]),
        ("suspicious", [7, 9]),
        ("mojibake", [7]),
        ("echo", [9]),
        ("duplicate", [3]),
        ("left-out", []),
    ],
)
def test_rows_of_a_kind_can_be_asked_for(look: Look, only: str, found: list[int]) -> None:
    inspection = look(only=only)
    assert lines(inspection) == found
    assert lines(look(only=only, limit=1)) == found[:1]


def test_dropped_rows_are_shown_by_their_tokens(look: Look) -> None:
    (row,) = look(only="dropped", overlong="drop").rows
    assert row.examples[0].cut_at == 200
    assert row.part == ""


def test_where_too_long_is_an_error_the_row_is_shown_as_bad(look: Look) -> None:
    assert lines(look(only="bad", overlong="error")) == [4, 5, 6]


def test_a_duplicate_names_the_first_of_its_equals(look: Look, data: Path) -> None:
    assert look(only="duplicate").rows[0].duplicate_of == f"{data}:1"


def test_a_row_of_which_one_turn_repeats_is_known_as_a_duplicate(look: Look, data: Path) -> None:
    turns = [{"role": role, "content": text} for role, text in [("user", "the"), ("assistant", "cat")] * 2]
    lighter = [turns[0], turns[1] | {"weight": 0.5}, *turns[2:]]
    data.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in (turns, lighter, turns)))
    inspection = look(only="duplicate", train_on="every-turn")
    assert [row.duplicate_of for row in inspection.rows] == [f"{data}:1", f"{data}:1"]
    assert inspection.table["duplicates"] == {"count": 3, "origins": [f"{data}:2", f"{data}:3"]}


def test_a_row_kept_with_a_special_token_shows_that_sign(look: Look) -> None:
    (row,) = look(only="special-token", special_in_content="keep").rows
    assert (row.fate, row.signs) == ("kept", ("special-token",))
    (row,) = look(only="dropped", special_in_content="drop").rows
    assert row.signs == ()


def test_an_unknown_kind_is_refused(look: Look) -> None:
    with pytest.raises(UserError, match="no kind of rows is called strange") as raised:
        look(only="strange")
    assert raised.value.exit_code == USAGE
    assert all(only in raised.value.hint for only in ONLY)


@pytest.mark.parametrize("name", ["2", "chats.jsonl:2"])
def test_one_row_can_be_asked_for_by_its_line(look: Look, name: str) -> None:
    assert lines(look(row=name)) == [2]


def test_a_row_is_found_by_any_way_of_writing_its_name(look: Look, tmp_path: Path, data: Path) -> None:
    named = tmp_path / "[id] a#1.jsonl"
    named.write_text(data.read_text())
    for name in (f"{named}:2", "[id] a#1.jsonl:2", "02", "2#1", f"{named}:2#1"):
        assert look(row=name, data=[str(named)]).rows[0].origin == f"{named}:2"


def test_one_row_of_a_json_list_is_asked_for_by_its_index(look: Look, tmp_path: Path, data: Path) -> None:
    rows = [json.loads(line) for line in data.read_text().splitlines()[:3]]
    path = tmp_path / "list.json"
    path.write_text(json.dumps(rows))
    for name in ("0", "list.json[0]", f"{path}[0]", "list.json:0"):
        assert look(row=name, data=[str(path)]).rows[0].origin == f"{path}[0]"


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("77", "there is no row 77"),
        ("x", "not the name of a row"),
        ("-1", "not the name"),
        ("other.jsonl:1", "no data is called"),
    ],
)
def test_a_row_that_there_is_not_is_an_error(look: Look, name: str, what: str) -> None:
    with pytest.raises(UserError, match=what):
        look(row=name)


def test_a_row_and_a_kind_exclude_each_other(look: Look) -> None:
    with pytest.raises(UserError, match="exclude each other"):
        look(row="1", only="bad")


def test_rows_of_several_files_of_a_part_are_shown_by_their_own_file(
    look: Look, tmp_path: Path, lines: list[str]
) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in range(2):
        name = f"train-0000{number}-of-00002.jsonl"
        (shards / name).write_text(f"{lines[number]}\n{lines[6 + number]}\n")
    inspection = look(data=[str(shards)])
    assert [row.origin.rpartition("/")[2] for row in inspection.rows] == [
        f"train-0000{number}-of-00002.jsonl:{line}" for number in range(2) for line in (1, 2)
    ]
    (row,) = look(row="train-00001-of-00002.jsonl:2", data=[str(shards)]).rows
    assert row.raw == inspection.rows[3].raw


def test_a_text_that_is_split_is_shown_in_its_pieces(look: Look, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "One sentence. " * 40}) + "\n")
    inspection = look(data=[str(path)])
    (row,) = inspection.rows
    assert (row.fate, row.tokens) == ("kept", 561)
    assert [example.origin for example in row.examples] == [f"{path}:1#{number}" for number in range(1, 4)]
    assert all(len(example.token_ids) == example.cut_at <= 200 for example in row.examples)
    assert (
        "".join(piece for example in row.examples for piece in example.pieces) == "One sentence. " * 40 + "<|im_end|>"
    )
    too_long = {"examples": 1, "split": 1, "tokens_lost": 0, "supervised_tokens_lost": 0}
    assert inspection.table["too_long"] == too_long
    assert inspection.table["lengths"]["max"] == 561
    assert look(row="texts.jsonl:1#2", data=[str(path)]).rows[0].origin == f"{path}:1"


def test_validation_rows_are_known_as_such(look: Look, tmp_path: Path, data: Path) -> None:
    valid = tmp_path / "valid.jsonl"
    valid.write_text(data.read_text().splitlines()[0] + "\n")
    inspection = look(valid=str(valid))
    assert [row.part for row in inspection.rows] == [*("train",) * 3, "", "", *("train",) * 4, "valid"]
    assert inspection.table["validation_rows_also_in_train"] == 1


def test_rows_held_out_of_a_file_are_known_as_such(look: Look) -> None:
    parts = [row.part for row in look(valid_fraction=0.3).rows]
    assert parts.count("valid") == 2
    assert parts[0] == parts[2]  # equal rows stay together


def test_several_files_are_read_in_order(look: Look, tmp_path: Path, data: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().splitlines()[1] + "\n")
    inspection = look(data=[str(data), str(other)])
    assert inspection.rows[-1].origin == f"{other}:1"
    assert inspection.rows[-1].duplicate_of == f"{data}:2"
    assert look(data=[str(data), str(other)], row="other.jsonl:1").rows[0].origin == f"{other}:1"


def test_every_turn_is_an_example_of_its_row(look: Look, data: Path) -> None:
    turns = [("user", "the"), ("assistant", "cat"), ("user", "and"), ("assistant", "dog")]
    data.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    (row,) = look(train_on="every-turn").rows
    assert [example.origin for example in row.examples] == [f"{data}:1#1", f"{data}:1#2"]


def test_text_and_tokens_are_shown_too(look: Look, data: Path) -> None:
    data.write_text(json.dumps({"text": "the cat"}))
    (example,) = look().rows[0].examples
    assert [turn.role for turn in example.turns] == ["text"]
    data.write_text(json.dumps({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}))
    (example,) = look().rows[0].examples
    assert ([turn.role for turn in example.turns], example.supervised_tokens) == (["tokens"], 2)


def test_a_system_message_outside_of_the_loop_is_known(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    import copy

    outside = copy.deepcopy(tokenizer)
    outside.chat_template = (
        "{% if messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n"
        "{% set messages = messages[1:] %}{% endif %}" + str(tokenizer.chat_template)
    )
    path = tmp_path / "chats.jsonl"
    turns = [("system", "be kind"), ("user", "the"), ("assistant", "cat")]
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    config = TrainConfig(data=[str(path)], data_cache=False)
    (row,) = inspect(config, tokenizer=outside).rows
    assert [(turn.role, turn.message) for turn in row.examples[0].turns] == [
        ("system", 0),
        ("user", 1),
        ("assistant", 2),
    ]


def test_the_table_tells_lengths_before_anything_is_cut(look: Look) -> None:
    table = look().table
    whole = look(max_length=10_000).table
    assert table["lengths"] == whole["lengths"]
    assert table["tokens"] == whole["tokens"] > table["train"]["tokens"]
    lost = table["too_long"]
    assert lost["examples"] == 1
    assert lost["tokens_lost"] == table["tokens"] - table["train"]["tokens"]
    assert 0 < lost["supervised_tokens_lost"] <= lost["tokens_lost"]
    assert whole["too_long"] == {"examples": 0, "split": 0, "tokens_lost": 0, "supervised_tokens_lost": 0}


def test_the_table_tells_signs_duplicates_and_reasons_with_origins(look: Look, data: Path) -> None:
    table = look().table
    assert {name: found["origins"] for name, found in table["signs"].items()} == {
        "mojibake": [f"{data}:7"],
        "echo": [f"{data}:9"],
    }
    assert table["duplicates"] == {"count": 1, "origins": [f"{data}:3"]}
    assert {reason["first"] for reason in table["reasons"]} == {f"{data}:{line}" for line in (4, 5, 6)}
    assert table["longest"][0]["origin"] == f"{data}:6"


def test_what_would_spoil_a_run_is_told_with_its_rows_which_can_be_shown(
    look: Look, tmp_path: Path, data: Path
) -> None:
    question, answer = ({"role": role, "content": "the cat"} for role in ("user", "assistant"))
    lines = [
        {"messages": [question, answer, question]},
        {"messages": [question, answer, answer]},
        {"messages": [question, answer]},
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    valid = tmp_path / "valid.jsonl"
    valid.write_text(json.dumps(lines[2]) + "\n")
    inspection = look(valid=str(valid))
    found = {one["name"]: one["first"] for one in inspection.table["findings"]}
    assert found == {"unanswered": [f"{data}:1"], "consecutive-turns": [f"{data}:2"], "also-in-train": [f"{valid}:1"]}
    assert [row.findings for row in inspection.rows] == [
        ("unanswered",),
        ("consecutive-turns",),
        (),
        ("also-in-train",),
    ]
    for name, origins in found.items():
        assert [row.origin for row in look(valid=str(valid), only=name).rows] == origins
    assert len(inspection.table["warnings"]) == 3
    assert all(
        warning.endswith(f"(first {found[name][0]})")
        for name, warning in zip(
            ("consecutive-turns", "unanswered", "also-in-train"), inspection.table["warnings"], strict=True
        )
    )


def test_the_columns_of_keys_and_tokens_add_up(look: Look) -> None:
    for settings in ({}, {"overlong": "drop"}, {"valid_fraction": 0.3}):
        table = look(**settings).table
        tokens = table["token_columns"]
        parts = [tokens[name] for name in ("trained_on", "held_out", "cut_off", "dropped")]
        assert table["tokens"] == tokens["all"] == sum(part["supervised"] + part["context"] for part in parts)
        assert table["supervised_tokens"] == sum(part["supervised"] for part in parts)
        assert table["train"]["tokens"] == sum(tokens["trained_on"].values())
        assert {owner: counts["all"] for owner, counts in table["keys"].items()} == {"row": 8, "message": 32}
        assert all(2 * counts["all"] == sum(counts.values()) for counts in table["keys"].values())


def test_data_of_which_nothing_is_kept_can_be_looked_at(look: Look, data: Path) -> None:
    data.write_text("{}\n[]\n")
    inspection = look()
    assert [row.fate for row in inspection.rows] == ["bad", "bad"]
    assert inspection.table["examples"] == 0
    json.loads(inspection.to_json())


def test_the_machine_form_is_json_with_the_documented_keys(look: Look) -> None:
    record: dict[str, Any] = json.loads(look(limit=1).to_json())
    assert record.keys() == {"data", "model", "table", "rows"}
    (row,) = record["rows"]
    assert row.keys() == {
        *("origin", "source", "part", "fate", "reason", "hint", "signs", "duplicate_of", "turns_with_text_left_out"),
        *("findings", "tokens", "supervised_tokens", "shared_turns", "examples", "raw"),
    }
    (example,) = row["examples"]
    assert len(example["pieces"]) == len(example["token_ids"]) == len(example["weights"]) == example["tokens"]


def test_a_result_is_shown_in_one_line(look: Look, data: Path) -> None:
    assert repr(look(limit=2)) == f"<Inspection of {data}: 2 of 9 rows>"


def test_the_machine_form_can_be_written_whatever_is_in_a_row(look: Look, tmp_path: Path) -> None:
    path = tmp_path / "half.jsonl"
    path.write_text('{"\\ud83d": 1}\n{"text": "whole"}\n')
    found = look(data=str(path), only="bad").to_json()
    assert json.loads(found.encode("utf-8"))["table"]["rows"]["bad"] == 1


def test_the_instances_of_a_row_are_shown_under_its_name_and_a_row_of_no_weight_as_dropped(
    look: Look, tmp_path: Path
) -> None:
    instances = [{"input": "one", "output": "eins"}, {"input": "two", "output": "zwei"}]
    rows = [{"instruction": "Translate", "instances": instances, "train": train} for train in (True, False)]
    path = tmp_path / "seeds.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    shown, dropped = look(data=[str(path)]).rows
    assert [example.origin for example in shown.examples] == [f"{path}:1#1", f"{path}:1#2"]
    assert ["zwei" in "".join(example.pieces) for example in shown.examples] == [False, True]
    assert look(row="seeds.jsonl:1#2", data=[str(path)]).rows[0].origin == f"{path}:1"
    assert look(row="1#2#1", data=[str(path)], train_on="every-turn").rows[0].examples[1].origin == f"{path}:1#2#1"
    assert (dropped.fate, dropped.reason) == ("dropped", "not to be trained on: its train is false")
    assert dropped.raw.endswith('"train": false}')


def test_a_pair_is_shown_with_both_masks_and_what_its_answers_have_in_common(look: Look, pairs: Path) -> None:
    inspection = look(data=[str(pairs)], objective="dpo")
    record = json.loads(inspection.to_json())
    assert (record["table"]["train"]["pairs"], record["table"]["train"]["examples"]) == (1, 2)
    first, long, same = record["rows"]
    assert [row["fate"] for row in record["rows"]] == ["kept", "dropped", "bad"]
    assert [example["name"] for example in first["examples"]] == ["chosen", "rejected"]
    assert first["shared_turns"] == 1
    for example, answer in zip(first["examples"], ("sat on the mat", "sat"), strict=True):
        assert example["turns"][0] == first["examples"][0]["turns"][0]
        supervised = [piece for piece, weight in zip(example["pieces"], example["weights"], strict=True) if weight]
        assert "".join(supervised) == f"{answer}<|im_end|>"
    assert long["shared_turns"] == 1
    assert long["supervised_tokens"] == 0
    assert (same["examples"], same["shared_turns"]) == ([], 0)
    assert "the same" in same["reason"]
    alone = json.loads(look(row="1", data=[str(pairs)], objective="dpo").to_json())
    assert alone["rows"] == [first]
    chat = json.loads(look(limit=1).to_json())["rows"][0]
    assert (chat["shared_turns"], chat["examples"][0]["name"]) == (0, "")


def test_a_pair_that_repeats_another_equals_it_as_a_whole(look: Look, pairs: Path) -> None:
    row = json.loads(pairs.read_text().splitlines()[0])
    others = [row, row | {"rejected": "the mat"}, row]
    pairs.write_text("".join(json.dumps(one) + "\n" for one in others))
    rows = look(data=[str(pairs)], objective="dpo").rows
    assert [one.duplicate_of for one in rows] == [None, None, f"{pairs}:1"]
    assert [one.origin for one in look(only="duplicate", data=[str(pairs)], objective="dpo").rows] == [f"{pairs}:3"]
