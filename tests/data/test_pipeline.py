"""What becomes of one row."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from mlx_sft.config import TrainConfig
from mlx_sft.data.pipeline import SPECIAL_SIGN, Outcome, Pipeline
from mlx_sft.data.readers import Row
from mlx_sft.data.screening import SIGNS
from mlx_sft.errors import UserError
from mlx_sft.objectives import Objective
from mlx_sft.registry import OBJECTIVES
from tests.data.conftest import CHATML, MakeTokenizer

pytestmark = pytest.mark.fast

QUESTION = {"role": "user", "content": "Who?"}
ANSWER = {"role": "assistant", "content": "You."}


@pytest.fixture
def run(tokenizer: PreTrainedTokenizerFast) -> Any:
    """`run(value, **settings)` → the outcome of the row `a.jsonl:1`."""

    def process(value: dict[str, Any] | UserError, **settings: Any) -> Outcome:
        pipeline = Pipeline.from_config(TrainConfig(data="a.jsonl", **settings), tokenizer)
        return pipeline.process(value if isinstance(value, UserError) else Row("a.jsonl:1", value))

    return process


def test_a_good_row_becomes_its_examples(run: Any) -> None:
    outcome = run({"messages": [QUESTION, ANSWER]})
    assert (outcome.origin, outcome.note, outcome.mixed) == ("a.jsonl:1", None, False)
    (example,) = outcome.examples
    assert example.origin == "a.jsonl:1"
    assert example.supervised_tokens == len("You.") + 1


def test_every_turn_becomes_an_example_of_its_own(run: Any) -> None:
    outcome = run({"messages": 2 * [QUESTION, ANSWER]}, train_on="every-turn")
    assert [example.origin for example in outcome.examples] == ["a.jsonl:1#1", "a.jsonl:1#2"]
    assert outcome.origin == "a.jsonl:1"


def test_a_turn_without_anything_to_learn_is_no_example(run: Any) -> None:
    outcome = run({"messages": [QUESTION, ANSWER | {"train": False}, QUESTION, ANSWER]}, train_on="every-turn")
    assert len(outcome.examples) == 1


def test_a_row_that_could_not_be_read_keeps_its_place_and_reason(run: Any) -> None:
    outcome = run(UserError("not JSON", where="a.jsonl:7", hint="write JSON"))
    assert outcome.examples == []
    assert (outcome.origin, outcome.note.origin, outcome.note.fate) == ("a.jsonl:7", "a.jsonl:7", "bad")
    assert (outcome.note.reason, outcome.note.hint) == ("not JSON", "write JSON")


def test_a_row_with_nothing_to_learn_is_bad(run: Any) -> None:
    outcome = run({"messages": [QUESTION, ANSWER | {"content": " "}]})
    assert outcome.note.fate == "bad"
    assert "nothing to train on" in outcome.note.reason


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [QUESTION, ANSWER], "train": False},
        {"messages": [QUESTION, ANSWER | {"weight": 2}], "weight": 0},
        {"messages": [QUESTION, ANSWER | {"train": False}]},
        {"text": "The moon is far.", "loss": False},
        {"input_ids": [1, 2], "labels": [1, 2], "masked": True},
        {"prompt": "Who?", "completion": "You.", "loss_weight": "0.0"},
    ],
)
def test_a_row_that_says_that_it_is_not_to_be_learnt_is_dropped_with_the_reason(run: Any, row: dict[str, Any]) -> None:
    outcome = run(row)
    assert not outcome.examples
    assert outcome.note.fate == "dropped"
    assert re.search(r"not to be trained on: its \w+ is|every assistant turn has the weight 0", outcome.note.reason)
    assert outcome.note.hint


def test_what_a_row_weighs_is_what_its_tokens_weigh(run: Any) -> None:
    turns = [QUESTION, ANSWER, QUESTION, ANSWER | {"weight": 4}]
    for row, weights in (
        ({"messages": turns, "weight": 0.5}, {0.5, 2}),
        ({"text": "The moon is far.", "weight": 0.5}, {0.5}),
        ({"input_ids": [1, 2, 3], "labels": [1, -100, 3], "loss_weight": 3}, {3}),
    ):
        (example,) = run(row).examples
        assert set(example.loss_weights[example.loss_weights != 0].tolist()) == weights


INSTANCES = {"instruction": "Who?", "instances": [{"output": "You."}, {"input": "Else?", "output": "I."}]}


def test_the_instances_of_a_row_are_examples_of_their_own(run: Any) -> None:
    outcome = run({**INSTANCES, "weight": 0.5})
    assert [example.origin for example in outcome.examples] == ["a.jsonl:1#1", "a.jsonl:1#2"]
    assert [example.supervised_tokens for example in outcome.examples] == [len("You.") + 1, len("I.") + 1]
    assert {weight for example in outcome.examples for weight in example.loss_weights.tolist()} == {0, 0.5}
    turns = run(INSTANCES, train_on="every-turn").examples
    assert [example.origin for example in turns] == ["a.jsonl:1#1#1", "a.jsonl:1#2#1"]


def test_an_instance_that_cannot_be_used_is_named_and_its_row_is_bad(run: Any, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer()
    forged = {"instruction": "Who?", "instances": [{"output": "You."}, {"output": "I<|im_end|>"}]}
    for choice, fate in (("error", "bad"), ("drop", "dropped")):
        outcome = run(forged, special_in_content=choice)
        assert (outcome.note.fate, outcome.note.origin, outcome.examples) == (fate, "a.jsonl:1", [])
    tokenizer.chat_template = "{% if messages[1].content == 'I.' %}{{ raise_exception('No.') }}{% endif %}" + CHATML
    outcome = Pipeline.from_config(TrainConfig(data="a.jsonl"), tokenizer).process(Row("a.jsonl:1", INSTANCES))
    assert outcome.note
    assert outcome.note.origin == "a.jsonl:1"
    assert outcome.note.reason.startswith("#2: the chat template rejects")


def test_one_text_is_nothing_to_compare(run: Any) -> None:
    class Compares(Objective):
        name = "compares"
        compares = True

    with OBJECTIVES.registered("compares", Compares):
        for row in (INSTANCES, {"messages": [QUESTION, ANSWER]}):
            assert "a row of one text, and --objective compares" in run(row, objective="compares").note.reason


FORGED = {"messages": [{"role": "user", "content": "Hi<|im_end|>"}, ANSWER]}


def test_a_special_token_in_content_is_bad_dropped_or_kept(run: Any) -> None:
    bad, dropped, kept = (run(FORGED, special_in_content=choice) for choice in ("error", "drop", "keep"))
    assert (bad.note.fate, dropped.note.fate, kept.note) == ("bad", "dropped", None)
    assert bad.note.reason == dropped.note.reason
    assert "<|im_end|>" in bad.note.reason
    assert "--special-in-content" in bad.note.hint
    assert bad.examples == dropped.examples == []
    assert len(kept.examples) == 1
    assert kept.signs == {SPECIAL_SIGN}


def test_a_document_may_hold_special_tokens(run: Any) -> None:
    assert len(run({"text": "one<|im_end|>two"}).examples) == 1


def test_signs_are_bits_in_their_order(run: Any) -> None:
    outcome = run({"messages": [QUESTION, ANSWER | {"content": "N/A"}]})
    assert outcome.signs
    assert [name for bit, name in enumerate(SIGNS) if outcome.sign_mask >> bit & 1] == [
        name for name in SIGNS if name in outcome.signs
    ]


def test_a_row_of_another_shape_is_told_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    pipeline = Pipeline.from_config(TrainConfig(data="a.jsonl"), tokenizer)
    first, other = Row("a.jsonl:1", {"text": "one"}), Row("a.jsonl:2", {"messages": [QUESTION, ANSWER]})
    settled = Pipeline(pipeline.reader.settled_by(first), pipeline.encoder, pipeline.special)
    outcome = settled.process(other)
    assert outcome.mixed
    assert outcome.note is not None
    assert "a.jsonl:1" in outcome.note.reason


def test_a_pipeline_travels_to_another_process(tokenizer: PreTrainedTokenizerFast) -> None:
    pipeline = Pipeline.from_config(TrainConfig(data="a.jsonl"), tokenizer)
    row = Row("a.jsonl:1", {"messages": [QUESTION, ANSWER]})
    there = pickle.loads(pickle.dumps(pipeline)).process(row).examples[0]
    assert there.digest() == pipeline.process(row).examples[0].digest()
