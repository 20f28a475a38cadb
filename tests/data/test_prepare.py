from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlx_sft.config import TrainConfig
from mlx_sft.data import Examples, PreparedData, encode, lost_rows, prepare, prepare_file, survey
from mlx_sft.data.dataset import pack
from mlx_sft.data.example import IGNORED, Example, Outcome
from mlx_sft.data.pipeline import NoProgress
from mlx_sft.data.prepare import _with_held_out, split
from mlx_sft.errors import USAGE, UserError

pytestmark = pytest.mark.fast

WriteRows = Callable[..., str]


def chat(question: str, answer: str = "yes") -> dict[str, str]:
    return {"prompt": question, "completion": answer}


def run(
    tokenizer: PreTrainedTokenizerFast, data: str | list[str], verb: Any = prepare, **settings: Any
) -> PreparedData:
    prepared: PreparedData = verb(TrainConfig(data=data, **settings), tokenizer)
    report = prepared.report
    assert report.rows == report.kept + report.dropped + report.bad
    assert sum(source.examples for source in report.sources) == len(prepared.train) + len(prepared.valid)
    assert (report.train.rows, report.valid.rows) == (len(prepared.train), len(prepared.valid))
    if settings.get("train_on") != "every-turn" and not report.split:
        assert report.kept == len(prepared.train) + len(prepared.valid)
    assert sum(number for number, _ in prepared.mixture) == len(prepared.train)
    return prepared


MESSAGES = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_rows_are_kept_in_order(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    data = write_rows(chat("a"), chat("b"), chat("c"))
    prepared = run(tokenizer, data)
    assert [example.origin for example in prepared.train] == [f"{data}:{line}" for line in (1, 2, 3)]
    assert len(prepared.valid) == 0
    assert prepared.report.valid.lengths == {}
    assert prepared.report.sources[0].format == "prompt-completion"


def test_bad_rows_are_all_named_in_one_error(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    data = write_rows(chat("a"), "nonsense", {"a": 1}, chat("b"), chat("c", ""))
    with pytest.raises(UserError) as caught:
        run(tokenizer, data)
    assert caught.value.where == data
    assert caught.value.what.splitlines() == [
        "3 rows cannot be used:",
        f"  {data}:2: not JSON: Expecting value in column 1",
        f"  {data}:3: a row without a known format: it has 'a'",
        f"  {data}:5: a conversation with nothing to train on: every assistant turn is empty",
    ]
    assert "--skip-bad-rows" in caught.value.hint


def test_one_bad_row_is_the_error_itself(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    data = write_rows({"text": "a"}, {"text": 3})
    with pytest.raises(UserError) as caught:
        run(tokenizer, data)
    assert caught.value.where == f"{data}:2"
    assert caught.value.what == "text must be a string, not a number"
    assert "--skip-bad-rows" in caught.value.hint


def test_no_more_than_ten_bad_rows_are_sought(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    with pytest.raises(UserError) as caught:
        run(tokenizer, write_rows(*["nonsense"] * 30))
    assert caught.value.what.startswith("at least 10 rows cannot be used:")
    assert "chats.jsonl:1, 2, 3, 4, 5, 6, 7, 8, 9, 10: not JSON: " in caught.value.what


def test_bad_rows_are_skipped_and_reported_where_asked(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    data = write_rows(chat("a"), *["nonsense"] * 12, {"text": "a\ud83d"}.__repr__(), chat("b"))
    prepared = run(tokenizer, data, skip_bad_rows=True, allow_lost_rows=True)
    assert len(prepared.train) == 2
    assert (prepared.report.rows, prepared.report.bad) == (15, 13)
    (source,) = prepared.report.to_json()["sources"]
    assert [note["origin"] for note in source["not_simply_kept"]] == [f"{data}:{line}" for line in range(2, 15)]
    assert {note["fate"] for note in source["not_simply_kept"]} == {"bad"}


def test_a_row_of_which_the_template_writes_no_turn_is_bad(make_tokenizer: Any, write_rows: WriteRows) -> None:
    silent = make_tokenizer("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="a conversation with nothing to train on: no token of it"):
        run(silent, write_rows(chat("a")))


def test_turns_with_text_left_out_are_counted_in_rows_that_are_kept(
    make_tokenizer: Any, write_rows: WriteRows, public_template: Any
) -> None:
    qwen3 = make_tokenizer(public_template("qwen3"))
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "hmm"}]
    data = write_rows({"messages": turn}, {"messages": 3 * turn}, {"messages": [*turn, *turn]}, {"messages": 30 * turn})
    prepared = run(qwen3, data, max_length=400, overlong="drop", allow_lost_rows=True)
    assert [example.facts.turns_with_text_left_out for example in prepared.train] == [0, 2, 1]
    assert prepared.report.facts.turns_with_text_left_out == 3
    cut = run(qwen3, data, max_length=100, allow_lost_rows=True).train[-1]
    assert (len(cut), cut.facts.turns_with_text_left_out) == (100, 29)


def test_a_row_of_which_only_the_end_token_would_be_learnt_is_bad(make_tokenizer: Any, write_rows: WriteRows) -> None:
    answers_only = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    prompt = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    with pytest.raises(UserError, match="a conversation with nothing to train on: no token of it"):
        run(make_tokenizer(answers_only + prompt), write_rows(chat("a", "<think>hmm</think>")))


class Told:
    """A progress that remembers the sources."""

    def __init__(self) -> None:
        self.sources: list[tuple[str, int, bool]] = []

    def reading(self, name: str, rows: int, bytes_done: int, bytes_total: int | None) -> None:
        pass

    def finished(self, name: str, rows: int, *, cached: bool) -> None:
        self.sources.append((name, rows, cached))

    def note(self, message: str) -> None:
        pass


def test_a_second_run_is_told_from_a_first_one_and_is_the_same(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    told, data = Told(), write_rows(chat("told twice"), "nonsense", chat("b"), chat("c" * 50))
    config = TrainConfig(data=data, skip_bad_rows=True, max_length=40, overlong="drop")
    first, second = (prepare(config, tokenizer, told) for _ in range(2))
    assert told.sources == [(data, 4, False), (data, 4, True)]
    assert first.report.to_json() == second.report.to_json()
    with pytest.raises(UserError, match="not JSON"):
        prepare(TrainConfig(data=data), tokenizer, told)
    longer = prepare(TrainConfig(data=data, skip_bad_rows=True), tokenizer, told)
    assert (len(second.train), len(longer.train)) == (2, 3)
    assert [cached for *_, cached in told.sources] == [False, True, True, True]


def test_nothing_left_is_an_error_that_names_the_first_reason(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    data = write_rows("nonsense", chat("x" * 100))
    with pytest.raises(UserError) as caught:
        run(tokenizer, data, skip_bad_rows=True, max_length=30, overlong="drop")
    assert caught.value.what == "nothing to train on: of 2 rows 1 is bad and 1 is dropped"
    assert caught.value.where == data
    assert caught.value.hint == f"the first: {data}:1: not JSON: Expecting value in column 1"


@pytest.fixture
def long_rows(write_rows: WriteRows) -> str:
    # The first row is 25 tokens: 4 special ones, and the bytes of user\\na, \\n, assistant\\nyes and \\n.
    return write_rows(chat("a"), chat("b", "y" * 100), chat("c" * 100, "yes"))


def test_too_long_rows_are_cut_and_dropped_where_nothing_is_left_to_learn(
    tokenizer: PreTrainedTokenizerFast, long_rows: str
) -> None:
    prepared = run(tokenizer, long_rows, max_length=60, allow_lost_rows=True)
    assert [len(example) for example in prepared.train] == [25, 60]
    assert [
        (note["origin"], note["fate"], note["reason"])
        for note in prepared.report.to_json()["sources"][0]["not_simply_kept"]
    ] == [
        (f"{long_rows}:2", "truncated", "122 tokens, cut to 60"),
        (f"{long_rows}:3", "dropped", "none of its first 60 tokens (of 124) is supervised"),
    ]
    assert (prepared.report.kept, prepared.report.truncated, prepared.report.dropped) == (2, 1, 1)


def test_a_row_that_is_cut_is_the_beginning_of_the_whole(tokenizer: PreTrainedTokenizerFast, long_rows: str) -> None:
    whole = run(tokenizer, long_rows).train[1]
    cut = run(tokenizer, long_rows, max_length=60, allow_lost_rows=True).train[1]
    assert cut.token_ids.tolist() == whole.token_ids[:60].tolist()
    assert cut.labels.tolist() == whole.labels[:60].tolist()


def test_too_long_rows_are_dropped_where_asked(tokenizer: PreTrainedTokenizerFast, long_rows: str) -> None:
    prepared = run(tokenizer, long_rows, max_length=60, overlong="drop", allow_lost_rows=True)
    assert (prepared.report.kept, prepared.report.truncated, prepared.report.dropped) == (1, 0, 2)


def test_too_long_rows_are_an_error_where_asked(tokenizer: PreTrainedTokenizerFast, long_rows: str) -> None:
    with pytest.raises(UserError, match="122 tokens, where max_length is 60") as caught:
        run(tokenizer, long_rows, max_length=60, overlong="error", skip_bad_rows=True)
    assert caught.value.where == f"{long_rows}:2"


# Several turns of a row


def every_turn(*answers: str) -> dict[str, Any]:
    turns = [{"role": role, "content": text} for text in answers for role, text in (("user", "?"), ("assistant", text))]
    return {"messages": turns}


def test_a_row_is_kept_as_long_as_one_of_its_turns_is(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    data = write_rows(every_turn("a", "b" * 60, "c"), every_turn("d" * 60, "e"), every_turn("f"))
    settings: dict[str, Any] = {"max_length": 60, "train_on": "every-turn", "allow_lost_rows": True}
    dropped = run(tokenizer, data, overlong="drop", **settings)
    assert [example.origin for example in dropped.train] == [f"{data}:1#1", f"{data}:3#1"]
    (source,) = dropped.report.sources
    assert (source.rows, source.kept, source.truncated, source.dropped, source.examples) == (3, 2, 1, 1, 2)
    assert [(note.origin, note.fate, note.reason) for note in source.notes] == [
        (f"{data}:1", "truncated", "of its 3 examples 2 dropped, longer than 60 tokens"),
        (f"{data}:2", "dropped", "none of its 2 examples can be supervised within 60 tokens"),
    ]
    cut = run(tokenizer, data, **settings)
    assert [example.origin for example in cut.train] == [f"{data}:1#1", f"{data}:1#2", f"{data}:2#1", f"{data}:3#1"]
    assert cut.report.sources[0].notes[0].reason == "of its 3 examples 1 cut and 1 dropped, longer than 60 tokens"


def test_a_file_of_nothing_but_bad_rows_ends_the_reading_though_they_are_to_be_skipped(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lost_rows, "MOST_IN_A_ROW", 3)
    apart = write_rows("x", "x", "x", chat("a"), "x", "x", chat("b"), "x")
    for verb in (prepare, survey):
        assert run(tokenizer, apart, verb, skip_bad_rows=True, allow_lost_rows=True).report.bad == 6
    together = write_rows(chat("a"), "x", "x", "x", "x", chat("b"))
    for verb in (prepare, survey):
        with pytest.raises(UserError, match=r"more than 3 rows one after another cannot be used") as caught:
            run(tokenizer, together, verb, skip_bad_rows=True, allow_lost_rows=True)
        assert caught.value.where == f"{together}:5"
        assert caught.value.hint


def test_a_text_that_is_too_long_to_be_tokenized_at_once_is_bad_by_its_line(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "MOST_TEXT", 100)
    data = write_rows({"text": "a" * 100}, {"text": "\u4e00" * 34}, {"text": "b"})
    with pytest.raises(UserError, match=r"MiB of text, where at most") as caught:
        run(tokenizer, data)
    assert caught.value.where == f"{data}:2"
    assert "split it into several rows" in caught.value.hint
    prepared = run(tokenizer, data, skip_bad_rows=True)
    assert (prepared.report.kept, prepared.report.bad) == (2, 1)
    data = write_rows(chat("a"), chat("a" * 100))
    assert run(tokenizer, data, survey).report.bad == 1


def test_turns_that_are_examples_with_all_that_comes_before_are_bounded_together(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [{"role": role, "content": "x"} for _ in range(50) for role in ("user", "assistant")]
    data = write_rows({"messages": turns})
    settings: dict[str, Any] = {"max_length": 9999, "data_cache": False}
    whole = run(tokenizer, data, train_on="every-turn", **settings).report.train.tokens
    monkeypatch.setattr(encode, "MOST_TEXT_OF_TURNS", whole // 2)
    with pytest.raises(UserError, match=r"its 50 turns, each an example with all that comes before it") as caught:
        run(tokenizer, data, train_on="every-turn", **settings)
    assert caught.value.where == f"{data}:1"
    assert len(run(tokenizer, data, **settings).train) == 1


@pytest.mark.parametrize("seed", range(10))
def test_the_turns_of_a_row_and_equal_rows_never_straddle_the_split(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, seed: int
) -> None:
    rows = [every_turn(*(f"{n % 6} {turn}" for turn in range(1 + n % 3))) for n in range(18)]
    prepared = run(tokenizer, write_rows(*rows), train_on="every-turn", valid_fraction=0.3, seed=seed)
    assert 0 < len(prepared.valid) <= round(0.3 * 36)
    sides = [{example.origin.partition("#")[0] for example in part} for part in (prepared.train, prepared.valid)]
    assert not sides[0] & sides[1]
    assert prepared.report.shared == 0


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_have_a_turn_in_common_stay_on_one_side(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, seed: int
) -> None:
    rows = [every_turn(f"hello {n % 9}", f"{n}") for n in range(18)]
    prepared = run(tokenizer, write_rows(*rows), train_on="every-turn", valid_fraction=0.3, seed=seed)
    assert len(prepared.valid) == 8
    assert prepared.report.shared == 0


def test_a_chain_of_rows_with_turns_in_common_is_one_group() -> None:
    order = np.random.default_rng(0).permutation(3000).tolist()
    rows = [Outcome(f":{n}", [example(1, n), example(1, n + 1)]) for n in [*order, 5000]]
    _, valid = split(Examples([pack(rows)]), 0.5, seed=0)
    assert valid.rows.tolist() == [3000, 3000]


# Text that is too long


def test_text_is_split_where_nothing_is_said_and_conversations_are_cut(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, tmp_path: Path
) -> None:
    text = tmp_path / "book.txt"
    text.write_text("One sentence. " * 40)
    chats = write_rows(chat("a"), chat("b", "y" * 100))
    prepared = run(tokenizer, [str(text), chats], max_length=100)
    book, _ = prepared.report.sources
    assert (book.rows, book.kept, book.split, book.truncated, book.examples) == (1, 1, 1, 0, 6)
    assert (book.tokens.supervised_lost, prepared.report.truncated, prepared.report.split) == (0, 1, 1)
    pieces = [one for one in prepared.train if one.origin.startswith(str(text))]
    assert [one.origin for one in pieces] == [f"{text}:1#{number}" for number in range(1, 7)]
    decoded = [str(tokenizer.decode(one.token_ids)) for one in pieces]
    assert "".join(decoded) == ("One sentence. " * 40).rstrip() + "<|im_end|>"
    assert all(piece.startswith("One") and re.search(r"sentence\.( |<.im_end.>)$", piece) for piece in decoded)
    assert "1 split into pieces" in prepared.report.summary()["rows"]
    cut = run(tokenizer, str(text), max_length=100, overlong="truncate", allow_lost_rows=True)
    assert (len(cut.train), cut.report.truncated, cut.report.split) == (1, 1, 0)


def test_only_text_can_be_told_to_be_split(tokenizer: PreTrainedTokenizerFast, long_rows: str) -> None:
    with pytest.raises(UserError, match="and only text can be split") as caught:
        run(tokenizer, long_rows, max_length=60, overlong="split")
    assert caught.value.where == f"{long_rows}:2"
    report = run(tokenizer, long_rows, survey, max_length=60, overlong="split").report
    assert (report.kept, report.bad) == (1, 2)


@pytest.mark.parametrize("seed", range(3))
def test_the_pieces_of_a_text_stay_together_in_the_split(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, seed: int
) -> None:
    data = write_rows(*({"text": f"Number {number}. " * 20} for number in range(6)))
    prepared = run(tokenizer, data, max_length=50, valid_fraction=0.3, seed=seed)
    rows = [{one.origin.partition("#")[0] for one in part} for part in (prepared.train, prepared.valid)]
    assert all(rows)
    assert not rows[0] & rows[1]
    assert len(rows[0] | rows[1]) == 6


def test_pieces_are_the_same_from_the_cache_and_for_another_length(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    data, told = write_rows({"text": "So it is. " * 30}, {"text": "short"}, {"text": "And so on. " * 30}), Told()
    configs = [TrainConfig(data=data, max_length=length) for length in (50, 50, 80, 2000)]
    prepared = [prepare(config, tokenizer, told) for config in configs]
    assert [cached for *_, cached in told.sources] == [False, True, True, True]
    assert prepared[0].report.to_json() == prepared[1].report.to_json()
    assert len({tuple(token for one in each.train for token in one.token_ids.tolist()) for each in prepared}) == 1
    assert [each.report.split for each in prepared] == [2, 2, 2, 0]


# More is lost than is kept


def test_more_than_half_of_the_rows_lost_is_refused(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    data = write_rows(chat("a"), chat("b" * 98), chat("c" * 101), "nonsense", {"text": 1})
    settings: dict[str, Any] = {"skip_bad_rows": True, "max_length": 40, "overlong": "drop"}
    with pytest.raises(UserError) as caught:
        run(tokenizer, data, **settings)
    first, *reasons = caught.value.what.splitlines()
    assert first == "more than half of the rows are lost, 4 of 5:"
    assert reasons[0] == f"  2 such as {data}:2: 122 tokens, more than 40"
    assert len(reasons) == 3
    assert "--allow-lost-rows" in caught.value.hint
    assert len(run(tokenizer, data, allow_lost_rows=True, **settings).train) == 1


def test_half_of_the_rows_lost_is_let_pass_over_all_sources(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    bad = write_rows(chat("a"), "nonsense", "nonsense", name="bad.jsonl")
    good = write_rows(chat("b"), name="good.jsonl")
    assert len(run(tokenizer, [bad, good], skip_bad_rows=True).train) == 2
    with pytest.raises(UserError, match="more than half of the rows are lost, 2 of 3") as caught:
        run(tokenizer, bad, skip_bad_rows=True)
    assert caught.value.where == bad


def test_more_than_half_of_the_supervised_tokens_lost_is_refused(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    data = write_rows(chat("a"), chat("b"), chat("c", "y" * 999))  # of the last, 1000 tokens are supervised
    with pytest.raises(UserError, match=r"more than half of the supervised tokens are lost, 508 of 1,008") as caught:
        run(tokenizer, data, max_length=512)
    assert (caught.value.where, "--allow-lost-rows" in caught.value.hint) == (data, True)
    assert len(run(tokenizer, data, max_length=512, allow_lost_rows=True).train) == 3
    with pytest.raises(UserError, match="more than half of the supervised tokens are lost, 1,000 of"):
        run(tokenizer, data, max_length=512, overlong="drop")


def test_more_than_a_twentieth_of_the_supervised_tokens_lost_is_warned_of(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    data = write_rows(chat("a"), chat("c", "y" * 999))
    (warning,) = run(tokenizer, data, max_length=900).report.warnings()
    assert warning == (
        "120 of 1,004 supervised tokens (12%) are lost, as their rows are longer than 900 tokens; "
        f"raise --max-length to train on them (first {data}:2)"
    )
    assert run(tokenizer, data, max_length=1000).report.warnings() == []


# A look


def test_a_survey_notes_what_would_stop_a_run(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    data = write_rows(chat("a"), *["nonsense"] * 12, MESSAGES, chat("c" * 100))
    report = run(tokenizer, data, survey, max_length=60, overlong="error", valid_fraction=0.5).report
    (source,) = report.sources
    assert (source.rows, source.kept, source.bad) == (15, 1, 14)
    assert "124 tokens" in source.notes[-1].reason
    assert [note.origin for note in source.notes] == [f"{data}:{line}" for line in range(2, 16)]
    nothing = run(tokenizer, write_rows("nonsense", name="nothing.jsonl"), survey)
    assert (len(nothing.train), nothing.report.bad) == (0, 1)


def test_rows_of_several_shapes_are_one_error_that_names_both_lines(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    data = write_rows("nonsense", chat("a"), chat("b"), MESSAGES, "nonsense")
    for _ in range(2):  # the second time from the cache, which `survey` has filled
        with pytest.raises(UserError) as caught:
            run(tokenizer, data)
        assert caught.value.where == f"{data}:4"
        assert f"{data}:2" in caught.value.what
        survey(TrainConfig(data=data), tokenizer)
    assert run(tokenizer, data, skip_bad_rows=True, allow_lost_rows=True).report.bad == 3


# Several sources


def test_sources_follow_one_another_and_are_counted_with_their_weights(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    a, b = write_rows(chat("a"), chat("b"), name="a.jsonl"), write_rows(MESSAGES, name="b.jsonl")
    prepared = run(tokenizer, [a, b])
    assert prepared.mixture == [(2, None), (1, None)]
    assert [example.origin for example in prepared.train] == [f"{a}:1", f"{a}:2", f"{b}:1"]
    assert [source.format for source in prepared.report.sources] == ["prompt-completion", "messages"]
    weighted = run(tokenizer, [f"{b}:0.75", f"{a}:3"])
    assert weighted.mixture == [(1, 0.75), (2, 3.0)]
    assert prepared.report.fingerprint != weighted.report.fingerprint


def test_all_sources_have_a_weight_or_none(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    a, b = write_rows(chat("a"), name="a.jsonl"), write_rows(chat("b"), name="b.jsonl")
    with pytest.raises(UserError, match="some data has a share of the mixture, and this has none") as caught:
        run(tokenizer, [f"{a}:0.5", b])
    assert (caught.value.where, caught.value.exit_code) == (b, USAGE)


def test_the_split_is_over_all_sources(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    files = [write_rows(*(chat(f"{name}{n}") for n in range(20)), name=f"{name}.jsonl") for name in "ab"]
    prepared = run(tokenizer, files, valid_fraction=0.25)
    assert len(prepared.valid) == 10
    assert all(10 <= number < 20 for number, _ in prepared.mixture)


def test_a_share_of_nothing_is_refused(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    one, many = write_rows(chat("a"), name="one.jsonl"), write_rows(*map(chat, "bcdefgh"), name="many.jsonl")
    seeds = [seed for seed in range(20) if len(run(tokenizer, [one, many], valid_fraction=0.6, seed=seed).train) == 3]
    for seed in seeds:
        mixture = run(tokenizer, [one, many], valid_fraction=0.6, seed=seed).mixture
        if mixture[0] == (0, None):
            with pytest.raises(UserError, match="its rows are all held out"):
                run(tokenizer, [f"{one}:1", f"{many}:1"], valid_fraction=0.6, seed=seed)
            return
    pytest.fail("no seed holds it out")


def test_a_share_of_less_than_one_example_is_refused(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    few, many = write_rows(chat("a"), name="few.jsonl"), write_rows(*map(chat, "bcdefgh"), name="many.jsonl")
    with pytest.raises(UserError, match="its share of 8 examples is less than one") as caught:
        run(tokenizer, [f"{few}:0.01", f"{many}:1"])
    assert caught.value.where == few
    assert run(tokenizer, [f"{few}:0.1", f"{many}:1"]).mixture == [(1, 0.1), (7, 1.0)]


def test_several_folders_give_all_their_parts(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, tmp_path: Path
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        write_rows(chat(name), name=f"{name}/train.jsonl")
        write_rows(chat(f"valid {name}"), name=f"{name}/valid.jsonl")
    file = write_rows(chat("c"), name="c.jsonl")
    folders = [str(tmp_path / name) for name in "ab"]
    prepared = run(tokenizer, [*folders, file])
    assert [Path(example.origin).parent.name for example in prepared.valid] == ["a", "b"]
    assert len(prepared.train) == 3
    assert len(run(tokenizer, [*folders, file], valid=file).valid) == 1
    with pytest.raises(UserError, match="the folder has a valid part, and valid_fraction asks for another"):
        run(tokenizer, [file, *folders], valid_fraction=0.5)


# The split


def example(*token_ids: int) -> Example:
    ids = np.array(token_ids, np.int32)
    return Example(f"a:{token_ids}", ids, (np.arange(len(ids)) > 0).astype(np.float32))


def digests(examples: Examples) -> list[bytes]:
    return [one.digest() for one in examples]


def test_the_split_is_a_seeded_partition_that_keeps_the_order() -> None:
    examples = Examples.of([example(1, i) for i in range(200)])
    train, valid = split(examples, 0.05, seed=0)
    assert len(valid) == 10
    assert sorted([*digests(train), *digests(valid)]) == sorted(digests(examples))
    for part in (train, valid):
        positions = [digests(examples).index(digest) for digest in digests(part)]
        assert positions == sorted(positions)
    assert digests(split(examples, 0.05, seed=0)[1]) == digests(valid)
    assert digests(split(examples, 0.05, seed=1)[1]) != digests(valid)


def test_the_split_of_single_turns_stays_what_it_was() -> None:
    examples = Examples.of([example(1, i % 37) for i in range(100)])
    groups: dict[bytes, list[int]] = {}
    for index, digest in enumerate(digests(examples)):
        groups.setdefault(digest, []).append(index)
    order = np.random.default_rng(5).permutation(len(groups))
    expected: set[int] = set()
    for group in [list(groups.values())[number] for number in order[:-1]]:
        if len(expected) + len(group) <= 20:
            expected.update(group)
    _, valid = split(examples, 0.2, seed=5)
    assert valid.rows.tolist() == sorted(expected)


@pytest.mark.parametrize("seed", range(20))
def test_equal_examples_never_straddle_the_split(seed: int) -> None:
    train, valid = split(Examples.of([example(1, i % 7) for i in range(50)]), 0.3, seed)
    assert len(train)
    assert len(valid)
    assert len(train) + len(valid) == 50
    assert not set(digests(train)) & set(digests(valid))


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("seed", range(5))
def test_both_parts_have_an_example(fraction: float, seed: int) -> None:
    train, valid = split(Examples.of([example(1, 1)] * 5 + [example(1, 2)] * 3), fraction, seed)
    assert len(train) in (3, 5)
    assert len(train) + len(valid) == 8


def test_equal_rows_alone_cannot_be_split(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    with pytest.raises(UserError, match="cannot hold out a part of 1 different conversation"):
        run(tokenizer, write_rows(chat("a"), chat("a")), valid_fraction=0.5)


def test_a_fraction_is_held_out(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    prepared = run(tokenizer, write_rows(*(chat(str(i)) for i in range(20))), valid_fraction=0.2)
    assert (len(prepared.train), len(prepared.valid)) == (16, 4)
    assert prepared.report.shared == 0


@pytest.mark.parametrize(("rows", "held_out"), [(99, 0), (100, 10), (300, 15)])
def test_of_a_hundred_rows_and_more_a_twentieth_is_held_out_by_itself(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, rows: int, held_out: int
) -> None:
    data = write_rows(*(chat(str(i)) for i in range(rows)))
    prepared = run(tokenizer, data)
    assert (len(prepared.train), len(prepared.valid)) == (rows - held_out, held_out)
    again = run(tokenizer, data, valid_fraction=prepared.valid_fraction)
    assert again.report.fingerprint == prepared.report.fingerprint, "the number that a run keeps gives the same parts"
    assert len(run(tokenizer, data, valid_fraction=0).valid) == 0


def test_no_more_than_two_hundred_rows_are_held_out_by_itself() -> None:
    rows = [Outcome(f"{i}", [Example(f"{i}", np.array([i, 1], np.int32), np.ones(2, np.float32))]) for i in range(4100)]
    examples = Examples([pack(rows)])
    assert len(_with_held_out(TrainConfig(data="x"), examples, [None], NoProgress(), strict=True)[2]) == 200


def test_nothing_is_held_out_by_itself_where_it_cannot_or_need_not_be(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    many = write_rows(*(chat(str(i)) for i in range(120)), name="folder/train.jsonl")
    one, valid = write_rows(chat("b"), name="one.jsonl"), write_rows(chat("c"), chat("d"), name="folder/valid.jsonl")
    assert len(run(tokenizer, many, valid=valid).valid) == 2
    assert len(run(tokenizer, str(tmp_path / "folder")).valid) == 2
    assert len(run(tokenizer, write_rows(*[chat("a")] * 120, name="equal.jsonl")).valid) == 0
    parts = [run(tokenizer, [f"{one}:0.5", f"{many}:0.5"], seed=seed) for seed in range(30)]
    assert all(part.mixture[0][0] == 1 for part in parts)
    assert {len(part.valid) for part in parts} == {0, 10}, "it would now and then be the whole of a source"


def test_a_validation_file_is_read_and_rows_that_it_shares_are_counted(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    data = write_rows(chat("a"), chat("b"), chat("b"))
    valid = write_rows(chat("b"), chat("c"), name="held_out.jsonl")
    prepared = run(tokenizer, data, valid=valid)
    assert [one.origin for one in prepared.valid] == [f"{valid}:1", f"{valid}:2"]
    assert prepared.report.shared == 1
    assert prepared.report.train.duplicates == 1
    assert [source["name"] for source in prepared.report.to_json()["sources"]] == [data, valid]


def test_a_folder_gives_its_parts(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, tmp_path: Path) -> None:
    write_rows(chat("a"), name="train.jsonl")
    write_rows(chat("b"), chat("c"), name="dev.jsonl")
    prepared = run(tokenizer, str(tmp_path))
    assert (len(prepared.train), len(prepared.valid)) == (1, 2)
    with pytest.raises(UserError, match="the folder has a valid part, and valid_fraction asks for another"):
        run(tokenizer, str(tmp_path), valid_fraction=0.5)
    examples, source = prepare_file(str(tmp_path), TrainConfig(data="x"), tokenizer)
    assert len(examples) == source.rows == 2
    write_rows(chat("d"), name="test.jsonl")
    assert len(prepare_file(str(tmp_path), TrainConfig(data="x"), tokenizer)[0]) == 1


def test_a_folder_without_a_train_part_is_refused(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows, tmp_path: Path
) -> None:
    write_rows(chat("a"), name="test.jsonl")
    with pytest.raises(UserError, match="the folder has no train part"):
        run(tokenizer, str(tmp_path))


# The report


def test_the_report_adds_up_and_is_json(tokenizer: PreTrainedTokenizerFast, long_rows: str) -> None:
    prepared = run(tokenizer, long_rows, max_length=60, allow_lost_rows=True)
    report = json.loads(json.dumps(prepared.report.to_json()))
    assert report["totals"] == {"rows": 3, "kept": 2, "truncated": 1, "dropped": 1, "bad": 0}
    train = report["train"]
    assert train["rows"] == len(prepared.train)
    assert train["tokens"] == sum(len(one) for one in prepared.train)
    assert train["supervised_tokens"] == sum((one.labels != IGNORED).sum() for one in prepared.train)
    assert train["supervised_share"] == round(train["supervised_tokens"] / train["tokens"], 4)
    assert report["settings"]["max_length"] == 60
    assert len(report["sources"][0]["sha256"]) == 64
    # Of 2, 101 and 4 supervised tokens, 2 and 38 are within the first 60.
    (source,) = report["sources"]
    assert (source["supervised_tokens"], source["supervised_tokens_lost"]) == (109, 65)
    assert report["supervised_tokens_lost"] == 65
    columns = report["tokens"]
    assert columns["all"] == sum(
        sum(columns[name].values()) for name in ("trained_on", "held_out", "cut_off", "dropped")
    )
    assert columns["trained_on"]["supervised"] == 109 - 65
    assert columns["cut_off"]["supervised"] + columns["dropped"]["supervised"] == 65
    assert columns["trained_on"]["supervised"] + columns["trained_on"]["context"] == train["tokens"]


def test_what_would_spoil_a_run_is_named_with_its_first_rows(
    make_tokenizer: Any, public_template: Any, write_rows: WriteRows
) -> None:
    qwen3 = make_tokenizer(public_template("qwen3"))
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    plain = {"messages": [user, answer]}
    asked = {"messages": [user, answer, user], "id": 1}
    tool = {"messages": [user, answer, {"role": "tool", "content": "6"}]}
    in_a_row = {"messages": [user, answer, answer]}
    data = write_rows(plain, asked, tool, in_a_row, plain)
    report = run(qwen3, data, valid=write_rows({"messages": [answer, user, answer]}, plain, name="valid.jsonl")).report
    found = {one.name: (one.count, [origin.rpartition("/")[2] for origin in one.first]) for one in report.findings()}
    assert found == {
        "consecutive-turns": (1, ["chats.jsonl:4"]),
        "unanswered": (2, ["chats.jsonl:2", "chats.jsonl:3"]),
        "also-in-train": (1, ["valid.jsonl:2"]),
        "duplicate": (1, ["chats.jsonl:5"]),
        "unused-keys": (1, ["chats.jsonl:2"]),
    }
    assert len(report.warnings()) == 3  # one duplicate, and a key that nothing reads, are for those who look


def test_tokens_that_are_held_out_are_told_from_those_that_are_trained_on(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    data = [write_rows(*(chat(f"{name}{n}") for n in range(10)), name=f"{name}.jsonl") for name in "ab"]
    for settings in ({"valid_fraction": 0.3}, {"valid": write_rows(chat("c"), name="c.jsonl")}, {}):
        prepared = run(tokenizer, data, **settings)
        tokens = prepared.report.tokens
        assert tokens.trained_on.all == prepared.report.train.tokens
        assert tokens.held_out.all == prepared.report.valid.tokens
        assert tokens.trained_on.supervised == prepared.report.train.supervised_tokens
        sources = [source.tokens for source in prepared.report.sources]
        assert [bool(source.held_out.all) for source in sources][2:] == ([True] if "valid" in settings else [])
        assert all(source.trained_on.all for source in sources[:2])


def test_the_wwdc25_rows_under_the_real_qwen3_tokenizer(neighbour: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(neighbour("tokenizers/qwen3"))
    data = str(neighbour("data/wwdc25-superbowl.jsonl"))
    prepared = run(tokenizer, data, valid_fraction=0)
    whole = prepared.report.train
    assert whole.rows == 1800
    assert (whole.lengths["p50"], whole.lengths["max"]) == (100, 467)
    assert 0.80 < whole.supervised_share < 0.82
    held_out = run(tokenizer, data)
    train, valid = held_out.train, held_out.valid
    assert (len(train), len(valid)) == (1710, 90)
    assert not set(digests(train)) & set(digests(valid))
