from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mlx_sft.config import TrainConfig
from mlx_sft.data import PreparedData, prepare, prepare_file
from mlx_sft.data.encode import IGNORED, Example
from mlx_sft.data.prepare import fingerprint, split
from mlx_sft.data.report import length_summary
from mlx_sft.errors import UserError

WriteRows = Callable[..., str]
SHARED = Path(__file__).parents[2] / ".." / "shared"


def chat(question: str, answer: str = "yes") -> dict[str, str]:
    return {"prompt": question, "completion": answer}


def run(tokenizer: PreTrainedTokenizerFast, data: str, **settings: Any) -> PreparedData:
    prepared = prepare(TrainConfig(data=data, **settings), tokenizer)
    report = prepared.report
    assert report.rows == report.kept + report.dropped + report.bad
    assert report.kept == len(prepared.train) + len(prepared.valid) == report.train.rows + report.valid.rows
    return prepared


def test_rows_of_every_shape_are_kept_in_order(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    data = write_rows({"messages": messages}, chat("a"), {"text": "plain"})
    prepared = run(tokenizer, data)
    assert [example.origin for example in prepared.train] == [f"{data}:{line}" for line in (1, 2, 3)]
    assert prepared.valid == []
    assert prepared.report.valid.lengths == {}


def test_bad_rows_are_all_named_in_one_error(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    data = write_rows(chat("a"), "nonsense", {"a": 1}, chat("b"), {"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(UserError) as caught:
        run(tokenizer, data)
    assert caught.value.where == data
    assert caught.value.what.splitlines() == [
        "3 rows cannot be used:",
        f"  {data}:2: not JSON: Expecting value in column 1",
        f"  {data}:3: a row without a known shape: it has 'a'",
        f"  {data}:5: a conversation with nothing to learn: it has no assistant turn",
    ]
    assert "--skip-bad-rows" in caught.value.hint


def test_one_bad_row_is_the_error_itself(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    data = write_rows(chat("a"), {"text": 3})
    with pytest.raises(UserError) as caught:
        run(tokenizer, data)
    assert caught.value.where == f"{data}:2"
    assert caught.value.what == "text must be a string, not a number"
    assert "--skip-bad-rows" in caught.value.hint


def test_no_more_than_ten_bad_rows_are_sought(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    with pytest.raises(UserError) as caught:
        run(tokenizer, write_rows(*["nonsense"] * 30))
    assert caught.value.what.startswith("at least 10 rows cannot be used:")
    assert len(caught.value.what.splitlines()) == 11


def test_bad_rows_are_skipped_and_reported_where_asked(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    data = write_rows(chat("a"), *["nonsense"] * 12, {"text": "a\ud83d"}.__repr__(), chat("b"))
    prepared = run(tokenizer, data, skip_bad_rows=True)
    assert len(prepared.train) == 2
    assert (prepared.report.rows, prepared.report.bad) == (15, 13)
    (source,) = prepared.report.to_json()["sources"]
    assert [note["origin"] for note in source["not_simply_kept"]] == [f"{data}:{line}" for line in range(2, 15)]
    assert {note["fate"] for note in source["not_simply_kept"]} == {"bad"}


def test_a_row_of_which_the_template_writes_no_turn_is_bad(make_tokenizer: Any, write_rows: WriteRows) -> None:
    silent = make_tokenizer("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="a conversation with nothing to learn: no token of it"):
        run(silent, write_rows(chat("a")))


def test_turns_with_text_left_out_are_counted_in_rows_that_are_kept(
    make_tokenizer: Any, write_rows: WriteRows, public_template: Any
) -> None:
    qwen3 = make_tokenizer(public_template("qwen3"))
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "hmm"}]
    data = write_rows({"messages": turn}, {"messages": 3 * turn}, {"messages": [*turn, *turn]}, {"messages": 30 * turn})
    prepared = run(qwen3, data, max_length=400, overlong="drop")
    assert [example.facts.turns_with_text_left_out for example in prepared.train] == [0, 2, 1]
    report = prepared.report.to_json()
    assert prepared.report.turns_with_text_left_out == report["turns_with_text_left_out"] == 3
    assert report["sources"][0]["turns_with_text_left_out"] == 3
    cut = run(qwen3, data, max_length=100).train[-1]
    assert (len(cut), cut.turns_with_text_left_out) == (100, 29)


def test_a_row_of_which_only_the_end_token_would_be_learnt_is_bad(make_tokenizer: Any, write_rows: WriteRows) -> None:
    answers_only = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n"
    prompt = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    with pytest.raises(UserError, match="a conversation with nothing to learn: no token of it"):
        run(make_tokenizer(answers_only + prompt), write_rows(chat("a", "<think>hmm</think>")))


def test_the_number_of_rows_read_is_told_now_and_then(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    told: list[int] = []
    config = TrainConfig(data=write_rows(*[{"text": "a"}] * 2001, "nonsense"), skip_bad_rows=True)
    prepare(config, tokenizer, told.append)
    assert told == [1000, 2000]
    prepare_file(str(config.data), config, tokenizer, told.append)
    assert told == [1000, 2000, 1000, 2000]


def test_nothing_left_is_an_error_that_names_the_first_reason(
    tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows
) -> None:
    data = write_rows("nonsense", chat("x" * 100))
    with pytest.raises(UserError) as caught:
        run(tokenizer, data, skip_bad_rows=True, max_length=30, overlong="drop")
    assert caught.value.what == "nothing to learn: of 2 rows 1 are bad and 1 are dropped"
    assert caught.value.hint == f"the first: {data}:1: not JSON: Expecting value in column 1"


@pytest.fixture
def long_rows(write_rows: WriteRows) -> str:
    # The first row is 25 tokens: 4 special ones, and the bytes of user\\na, \\n, assistant\\nyes and \\n.
    return write_rows(chat("a"), chat("b", "y" * 100), chat("c" * 100, "yes"))


def test_too_long_rows_are_cut_and_dropped_where_nothing_is_left_to_learn(
    tokenizer: PreTrainedTokenizerFast, long_rows: str
) -> None:
    prepared = run(tokenizer, long_rows, max_length=60)
    assert [len(example) for example in prepared.train] == [25, 60]
    assert [
        (note["origin"], note["fate"], note["reason"])
        for note in prepared.report.to_json()["sources"][0]["not_simply_kept"]
    ] == [
        (f"{long_rows}:2", "truncated", "122 tokens, cut to 60"),
        (f"{long_rows}:3", "dropped", "none of its first 60 tokens (of 124) is learnt"),
    ]
    assert (prepared.report.kept, prepared.report.truncated, prepared.report.dropped) == (2, 1, 1)


def test_a_row_that_is_cut_is_the_beginning_of_the_whole(tokenizer: PreTrainedTokenizerFast, long_rows: str) -> None:
    whole, cut = run(tokenizer, long_rows).train[1], run(tokenizer, long_rows, max_length=60).train[1]
    assert cut.token_ids.tolist() == whole.token_ids[:60].tolist()
    assert cut.labels.tolist() == whole.labels[:60].tolist()


def test_too_long_rows_are_dropped_where_asked(tokenizer: PreTrainedTokenizerFast, long_rows: str) -> None:
    prepared = run(tokenizer, long_rows, max_length=60, overlong="drop")
    assert (prepared.report.kept, prepared.report.truncated, prepared.report.dropped) == (1, 0, 2)


def test_too_long_rows_are_an_error_where_asked(tokenizer: PreTrainedTokenizerFast, long_rows: str) -> None:
    with pytest.raises(UserError, match="122 tokens, where max_length is 60") as caught:
        run(tokenizer, long_rows, max_length=60, overlong="error", skip_bad_rows=True)
    assert caught.value.where == f"{long_rows}:2"


# The split


def example(*token_ids: int) -> Example:
    ids = np.array(token_ids, np.int32)
    return Example(f"a:{token_ids}", ids, (np.arange(len(ids)) > 0).astype(np.float32))


def digests(examples: list[Example]) -> list[bytes]:
    return [one.digest() for one in examples]


def test_the_split_is_a_seeded_partition_that_keeps_the_order() -> None:
    examples = [example(1, i) for i in range(200)]
    train, valid = split(examples, 0.05, seed=0)
    assert len(valid) == 10
    assert sorted([*digests(train), *digests(valid)]) == sorted(digests(examples))
    for part in (train, valid):
        positions = [digests(examples).index(digest) for digest in digests(part)]
        assert positions == sorted(positions)
    assert digests(split(examples, 0.05, seed=0)[1]) == digests(valid)
    assert digests(split(examples, 0.05, seed=1)[1]) != digests(valid)


@pytest.mark.parametrize("seed", range(20))
def test_equal_examples_never_straddle_the_split(seed: int) -> None:
    examples = [example(1, i % 7) for i in range(50)]
    train, valid = split(examples, 0.3, seed)
    assert train
    assert valid
    assert len(train) + len(valid) == 50
    assert not set(digests(train)) & set(digests(valid))


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
@pytest.mark.parametrize("seed", range(5))
def test_both_parts_have_an_example(fraction: float, seed: int) -> None:
    examples = [example(1, 1)] * 5 + [example(1, 2)] * 3
    train, valid = split(examples, fraction, seed)
    assert len(train) in (3, 5)
    assert len(train) + len(valid) == 8


def test_equal_rows_alone_cannot_be_split(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    with pytest.raises(UserError, match="cannot hold out a part of 1 different conversation"):
        run(tokenizer, write_rows(chat("a"), chat("a")), valid_fraction=0.5)


def test_a_fraction_is_held_out(tokenizer: PreTrainedTokenizerFast, write_rows: WriteRows) -> None:
    prepared = run(tokenizer, write_rows(*(chat(str(i)) for i in range(20))), valid_fraction=0.2)
    assert (len(prepared.train), len(prepared.valid)) == (16, 4)
    assert prepared.report.shared == 0


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
    prepared = run(tokenizer, long_rows, max_length=60)
    report = json.loads(json.dumps(prepared.report.to_json()))
    assert report["totals"] == {"rows": 3, "kept": 2, "truncated": 1, "dropped": 1, "bad": 0}
    train = report["train"]
    assert train["rows"] == len(prepared.train)
    assert train["tokens"] == sum(len(one) for one in prepared.train)
    assert train["supervised_tokens"] == sum((one.labels != IGNORED).sum() for one in prepared.train)
    assert train["supervised_share"] == round(train["supervised_tokens"] / train["tokens"], 4)
    assert report["settings"]["max_length"] == 60
    assert len(report["sources"][0]["sha256"]) == 64


def test_length_percentiles_are_lengths_that_occur() -> None:
    assert length_summary([example(*range(n)) for n in range(1, 101)]) == {
        "min": 1, "mean": 50.5, "p10": 10, "p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100,
    }  # fmt: skip


def test_the_fingerprint_tells_any_change() -> None:
    a, b, c = example(1, 2), example(1, 3), example(1, 2, 3)
    unlearnt = Example(a.origin, a.token_ids, np.zeros(2, np.float32))
    renamed = Example("elsewhere", a.token_ids, a.loss_weights)
    assert fingerprint([a, b]) == fingerprint([renamed, b])
    others = [[a, b], [b, a], [a], [a, c], [unlearnt, b], []]
    assert len({fingerprint(examples) for examples in others}) == len(others)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real rows and the real Qwen 3 tokenizer are not here")
def test_the_wwdc25_rows_under_the_real_qwen3_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen3")
    data = str(SHARED / "data" / "wwdc25-superbowl.jsonl")
    prepared = run(tokenizer, data)
    whole = prepared.report.train
    assert whole.rows == 1800
    assert (whole.lengths["p50"], whole.lengths["max"]) == (100, 467)
    assert 0.80 < whole.supervised_share < 0.82
    train, valid = split(prepared.train, 0.05, seed=0)
    assert (len(train), len(valid)) == (1710, 90)
    assert not set(digests(train)) & set(digests(valid))
