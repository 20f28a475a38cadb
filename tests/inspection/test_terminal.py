from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_sft.console import Console
from mlx_sft.inspection import Inspection

pytestmark = pytest.mark.fast

Look = Callable[..., Inspection]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(inspection: Inspection, capsys: pytest.CaptureFixture[str]) -> str:
    inspection.show(Console())
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_rows_and_table_are_data_and_go_to_stdout(look: Look, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(look(limit=2), capsys)
    assert (
        f"{data}:2  kept  28 tokens, 3 supervised\n"
        "  user  13 tokens\n<|im_start|>user\nthe dog<|im_end|>\n"
        "  assistant  15 tokens, 3 supervised\n<|im_start|>assistant\n⟦sat<|im_end|>⟧\n"
    ) in out
    assert f"{data}  messages     9     7          1        0    2\n" in out


def test_a_row_that_is_asked_for_is_shown_alone(look: Look, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(look(row="2"), capsys)
    assert out.endswith("⟦sat<|im_end|>⟧\n\n")


def test_what_is_supervised_is_coloured_in_a_terminal(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    look(row="2").show(Console())
    out = terminal.getvalue()
    assert "\x1b[32ms\x1b[0m" in out
    assert "⟦" not in out


def test_colour_can_be_refused(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    look(row="2").show(Console())
    assert "\x1b" not in terminal.getvalue()
    assert "⟦sat<|im_end|>⟧" in terminal.getvalue()


def test_what_is_supervised_is_marked_in_a_terminal_without_colours(
    look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    look(row="2").show(Console())
    assert "⟦sat<|im_end|>⟧" in terminal.getvalue()


def test_examples_are_told_from_rows_where_a_row_gives_several(
    look: Look, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": role, "content": text} for role, text in [("user", "the"), ("assistant", "cat")] * 2]
    data.write_text(json.dumps({"messages": turns}) + "\n")
    assert "to train on  2 examples, " in shown(look(train_on="every-turn"), capsys)
    assert "to train on  1 row, " in shown(look(), capsys)


def test_nothing_in_a_row_steers_the_terminal(look: Look, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(look(row="8"), capsys)
    assert not set(out) & {"\x00", "\x1b", "\u202e", "\u2028", "\u200b"}
    assert "\\x1b[31m" in out


def test_a_bad_row_is_shown_with_reason_and_hint(look: Look, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(look(only="bad"), capsys)
    assert "  messages[0].content contains the special token <|im_end|> as text\n  hint: " in out
    assert '"forge <|im_end|>"' in out


def test_a_cut_is_marked_and_what_lies_beyond_is_not_shown_as_supervised(
    look: Look, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(look(row="6"), capsys)
    before, _, beyond = out.partition("✂ max_length: ")
    assert before.count("⟦") == before.count("⟧") == 1
    assert "⟦" not in beyond
    assert "more tokens\n" in beyond


def test_a_long_row_among_others_is_shortened_and_alone_is_whole(
    look: Look, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"role": "user", "content": "the cat " * 500}, {"role": "assistant", "content": "the end"}]
    data.write_text(json.dumps({"messages": turns}))
    assert "the end" not in shown(look(max_length=9000), capsys)
    assert "the end" in shown(look(row="1", max_length=9000), capsys)


def test_signs_duplicates_and_lost_words_stand_beside_the_row(
    look: Look, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(look(), capsys)
    assert f"equals {data}:1\n" in out
    assert "supervised  mojibake\n" in out
    assert "mojibake: text that was decoded wrongly" in out


def test_data_of_which_nothing_is_kept_has_a_table_too(
    look: Look, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data.write_text("{}\n")
    assert "bad\n       1  " in shown(look(), capsys)


def test_keys_that_nothing_reads_are_listed_with_what_was_probably_meant(
    look: Look, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "wieght": 0}]
    data.write_text("".join(json.dumps({"messages": messages, "id": number}) + "\n" for number in range(2)))
    bad = look().rows[0]
    assert bad.fate == "bad"
    assert bad.reason == "messages[1] has the key 'wieght', which nothing reads; did you mean \"weight\"?"
    inspection = look(ignore_unknown_keys=True)
    assert [row.fate for row in inspection.rows] == ["kept", "kept"]
    inspection.show(Console())
    shown = capsys.readouterr().out.partition("keys that nothing reads\n")[2].splitlines()
    assert shown[:2] == [
        f'       2  wieght of a message: did you mean "weight"? (first {data}:1)',
        f"       2  id (first {data}:1)",
    ]
    found = [(one["of"], one["key"], one["count"], one["suggestion"]) for one in inspection.table["unused_keys"]]
    assert found == [("message", "wieght", 2, "weight"), ("row", "id", 2, None)]


def test_the_answers_of_a_pair_stand_side_by_side_behind_their_prompt(
    look: Look, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "110")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    look(row="1", data=[str(pairs)], objective="dpo").show(Console())
    lines = [line.rstrip() for line in terminal.getvalue().splitlines()]
    assert lines[0].startswith(f"{pairs}:1  kept")
    assert lines[2:4] == ["<|im_start|>user", "the cat<|im_end|>"]
    left, right = (lines[4].index(name) for name in ("chosen", "rejected"))
    assert (left, right > 50) == (0, True)
    answers = next(line for line in lines if line.startswith("⟦"))
    assert answers[:right].rstrip() == "⟦sat on the mat<|im_end|>⟧"
    assert answers[right:] == "⟦sat<|im_end|>⟧"


def test_they_stand_one_under_the_other_where_there_is_no_room(
    look: Look, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(look(data=[str(pairs)], objective="dpo"), capsys)
    first, second, _ = out.split(f"{pairs}:")[1:4]
    assert first.count("the cat<|im_end|>") == 1
    chosen, _, rejected = first.partition("chosen  ")[2].partition("rejected  ")
    assert "⟦sat on the mat<|im_end|>⟧\n" in chosen
    assert "⟦sat<|im_end|>⟧\n" in rejected
    assert second.startswith("2  dropped")
    assert second.count("✂ max_length") == 1
    assert "hint: raise --max-length" in second
    assert "to train on  1 pair, " in out
