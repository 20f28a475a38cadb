"""Rows of a chosen and a rejected answer: every form in which they are published, what is wrong with them, and what is counted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mlx_sft.config import TrainConfig
from mlx_sft.data.conversation import Conversation
from mlx_sft.data.prepare import PreparedData, prepare, survey
from mlx_sft.data.readers import Row
from mlx_sft.data.row_reader import RowReader
from mlx_sft.errors import UserError
from mlx_sft.registry import FORMATS
from tests.data.conftest import MakeTokenizer
from tests.data.mask.pictures import assistant, system, user

pytestmark = pytest.mark.fast

HH = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Bye\n\nAssistant: "
LONGER = [assistant("No"), user("Why?"), assistant("So")]
TALK = [user("Hi"), assistant("Yes?"), user("Bye")]
FORMS: dict[str, dict[str, Any]] = {
    "texts": {"prompt": "Bye", "chosen": "So long", "rejected": "No"},
    "messages": {"prompt": [user("Bye")], "chosen": [assistant("So long")], "rejected": [assistant("No")]},
    "one message": {"prompt": "Bye", "chosen": assistant("So long"), "rejected": {"from": "gpt", "value": "No"}},
    "implicit": {"chosen": [user("Bye"), assistant("So long")], "rejected": [user("Bye"), assistant("No")]},
    "ultrafeedback": {
        "prompt": "Bye",
        "prompt_id": "7",
        "chosen": [user("Bye"), assistant("So long")],
        "rejected": [user("Bye"), assistant("No")],
        "messages": [user("Bye"), assistant("So long")],
        "score_chosen": 8.0,
        "score_rejected": 7,
    },
    "prompt and whole": {
        "prompt": [user("Bye")],
        "chosen": [user("Bye"), assistant("So long")],
        "rejected": [user("Bye"), assistant("No")],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Bye"}],
        "chosen": {"from": "gpt", "value": "So long"},
        "rejected": {"from": "gpt", "value": "No"},
    },
    "with the answer in it": {
        "messages": [user("Bye"), assistant("So long")],
        "chosen": [assistant("So long")],
        "rejected": [assistant("No")],
    },
    "alpaca": {"instruction": "Bye", "input": "", "chosen": "So long", "rejected": "No"},
    "orca": {"system": "", "question": "Bye", "chosen": "So long", "rejected": "No"},
    "swift": {"messages": [user("Bye"), assistant("So long")], "rejected_response": "No"},
}


WAYS = {
    "texts": "user=prompt,assistant=chosen",
    "implicit": "messages=chosen",
    "ultrafeedback": "messages=chosen",
    "sharegpt": "user=conversations,assistant=chosen",
    "orca": "user=question,assistant=chosen",
}
"""How SFT is told to train on the chosen answer alone."""


def pair(**row: Any) -> tuple[Conversation, ...]:
    read = RowReader(compares=True).read(Row("pairs.jsonl:17", row))
    assert isinstance(read, tuple)
    assert all(isinstance(one, Conversation) for one in read)
    return read  # type: ignore[return-value]


@pytest.mark.parametrize("form", FORMS)
def test_every_published_form_is_the_same_pair(form: str) -> None:
    chosen, rejected = pair(**FORMS[form])
    assert chosen.messages == [user("Bye"), assistant("So long")]
    assert rejected.messages == [user("Bye"), assistant("No")]
    assert chosen.first_supervised == rejected.first_supervised == 1
    assert [one.score for one in (chosen, rejected)] == ([8, 7] if "prompt_id" in FORMS[form] else [None, None])


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [*TALK, assistant("So long")], "rejected": [*TALK, *LONGER]},
        {"chosen": f"{HH}So long", "rejected": f"{HH}No\n\nHuman: Why?\n\nAssistant: So"},
        {"prompt": TALK, "chosen": [assistant("So long")], "rejected": LONGER},
        {"instruction": "Bye", "history": [["Hi", "Yes?"]], "chosen": [assistant("So long")], "rejected": LONGER},
    ],
    ids=["implicit", "hh", "prompt", "history"],
)  # fmt: skip
def test_the_prompt_may_have_answers_and_an_answer_questions(row: dict[str, Any]) -> None:
    chosen, rejected = pair(**row)
    assert chosen.messages == [*TALK, assistant("So long")]
    assert rejected.messages == [*TALK, *LONGER]
    assert chosen.first_supervised == rejected.first_supervised == 3


def test_the_prompt_of_two_conversations_is_what_trl_takes_for_it() -> None:
    """The longest beginning in common, which leaves each an answer where one goes on from the other."""
    shorter, longer = [user("Hi"), assistant("Yes?")], [*TALK, assistant("No")]
    assert [one.first_supervised for one in pair(chosen=shorter, rejected=longer)] == [1, 1]
    chosen = [*TALK, assistant("a"), user("b"), assistant("c")]
    rejected = [*TALK, assistant("a"), user("b"), assistant("d")]
    assert [one.first_supervised for one in pair(chosen=chosen, rejected=rejected)] == [5, 5]
    assert [one.first_supervised for one in pair(prompt=TALK[:1], chosen=chosen, rejected=rejected)] == [1, 1]


def test_what_stands_beside_the_answers_is_of_both() -> None:
    tools = [{"type": "function", "function": {"name": "look"}}]
    row = FORMS["texts"] | {"system": "Be brief.", "tools": json.dumps(tools), "chat_template_kwargs": {"a": 1}}
    for one in pair(**row):
        assert one.messages[:2] == [system("Be brief."), user("Bye")]
        assert (one.tools, one.template_kwargs, one.first_supervised) == (tools, {"a": 1}, 2)
    assert [one.weights for one in pair(**FORMS["texts"], weight=0.5)] == [(0.5, 0.5)] * 2


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected: a conversation with nothing to train on: every as"),
        ({"prompt": "a", "chosen": [], "rejected": [assistant("b")]}, "chosen is empty"),
        ({"prompt": "a", "chosen": 3, "rejected": [assistant("b")]}, "chosen must be a string or a list of messages"),
        ({"prompt": "a", "chosen": "b", "rejected": [assistant("c")]}, "chosen is a string and rejected is a list: write"),
        ({"prompt": "a", "chosen": ["b", "c", "d"], "rejected": ["e"]}, "chosen is a list of 3 texts, and a pair has one"),
        (
            {"prompt": "a", "chosen": [assistant("b"), user("c")], "rejected": [assistant("d")]},
            "chosen ends with a message of the user, and an answer is the assistant's",
        ),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
            "chosen and rejected answer two prompts: chosen[0] and rejected[0] differ",
        ),
        (
            {"chosen": [system("a"), user("b"), assistant("c")], "rejected": [system("a"), user("d"), assistant("c")]},
            "chosen and rejected answer two prompts: they part at chosen[1] and rejected[1]",
        ),
        ({"chosen": "a", "rejected": "b"}, "a pair without its prompt: give the row a `prompt`, or begin the text of cho"),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "a pair without its prompt"),
        ({"chosen": f"{HH}a", "rejected": "\n\nHuman: b\n\nAssistant: c"}, "chosen and rejected answer two prompts"),
        (
            {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [assistant("c")]},
            "of chosen and rejected, one is a whole conversation and one an answer",
        ),
        (
            {"prompt": "a", "chosen": [user("b"), assistant("c")], "rejected": [user("b"), assistant("d")]},
            "prompt is none of the user's messages that chosen and rejected have in common",
        ),
        (
            {"prompt": [user("a")], "chosen": [user("b"), assistant("c")], "rejected": [user("b"), assistant("d")]},
            "chosen and rejected are whole conversations, and do not both begin with prompt",
        ),
        (
            {"messages": [user("a"), assistant("b")], "chosen": [assistant("c")], "rejected": [assistant("d")]},
            "messages[1] is the assistant's and not chosen",
        ),
        ({"question": "a", "passage": "b", "chosen": "c", "rejected": "d"}, "the question may be about the row's `pass"),
        ({"prompt": "a", "chosen": {"role": "narrator", "content": "b"}, "rejected": assistant("c")}, "chosen has the un"),
        ({"messages": [user("a")], "rejected_response": "b"}, "messages end with a message of the user, and an answer is"),
        ({"messages": [assistant("a")], "rejected_response": "b"}, "messages are one answer alone: a pair has a prompt"),
        ({"messages": [user("a"), assistant("b")], "rejected_response": ""}, "rejected: a conversation with nothing to t"),
    ],
)  # fmt: skip
def test_a_pair_that_is_wrong_says_where_and_how(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        pair(**row)
    assert caught.value.where == "pairs.jsonl:17"
    assert caught.value.what.startswith(reason)
    assert FORMATS["swift-pairs" if "rejected_response" in row else "pairs"].example in caught.value.hint


def test_columns_name_the_answers() -> None:
    columns = {"chosen": "good", "rejected": "poor", "prompt": "asked"}
    row = Row("a:1", {"asked": "Bye", "good": "So long", "poor": "No", "messages": [user("x"), assistant("y")]})
    reader = RowReader(columns=columns, compares=True).settled_by(row)
    assert [one.messages[-1]["content"] for one in reader.read(row)] == ["So long", "No"]  # type: ignore[union-attr]
    row = Row(
        "a:1", {"instruction": "Bye", "chosen_response": "So long", "rejected_response": "No", "chosen_model": "x"}
    )
    with pytest.raises(UserError) as caught:
        RowReader(compares=True).read(row)
    assert caught.value.hint.endswith("--columns chosen=chosen_response,rejected=rejected_response")


# From rows to examples

Survey = Callable[..., PreparedData]


@pytest.fixture
def look(tokenizer: PreTrainedTokenizerFast, write_rows: Callable[..., str]) -> Survey:
    """`look(rows, **settings)` → what a run with `--objective dpo` would be given."""

    def surveyed(*rows: Any, strict: bool = False, using: Any = tokenizer, **settings: Any) -> PreparedData:
        given = {"objective": "dpo", "data_cache": False, "data": [write_rows(*rows, name="pairs.jsonl")]}
        return (prepare if strict else survey)(TrainConfig(**given | settings), using)

    return surveyed


def pictures(prepared: PreparedData, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each example, with what is supervised between ⟦ and ⟧."""
    found = []
    for example in prepared.train:
        text, inside = "", False
        for token, weight in zip(example.token_ids.tolist(), example.loss_weights.tolist(), strict=True):
            text += ("⟦" if weight else "⟧") * (bool(weight) != inside) + tokenizer.decode([token])
            inside = bool(weight)
        found.append(text + "⟧" * inside)
    return found


def test_both_answers_are_masked_as_answers_of_a_chat_are(look: Survey, tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": TALK, "chosen": [assistant("So"), user("?"), assistant("long")], "rejected": assistant("No")}
    beginning = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    )
    more = "\n<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    rejected = f"{beginning}<|im_start|>assistant\n⟦No<|im_end|>⟧\n"
    row["rejected"] = [row["rejected"]]
    assert pictures(look(row), tokenizer) == [
        f"{beginning}<|im_start|>assistant\n⟦So<|im_end|>⟧{more}⟦long<|im_end|>⟧\n",
        rejected,
    ]
    assert pictures(look(row, train_on="last"), tokenizer) == [
        f"{beginning}<|im_start|>assistant\nSo<|im_end|>{more}⟦long<|im_end|>⟧\n",
        rejected,
    ]
    (note,) = look(row, train_on="every-turn").report.notes
    assert "choose another --train-on than every-turn" in note.hint


def test_a_training_on_chats_refuses_them_and_says_what_compares_them(look: Survey) -> None:
    for form, way in WAYS.items():
        with pytest.raises(UserError, match="a row of preferences") as caught:
            look(FORMS[form], objective="sft", strict=True)
        assert caught.value.where.endswith("pairs.jsonl:1")
        assert "--objective dpo" in caught.value.hint
        assert f"--columns {way}" in caught.value.hint
        columns = dict(part.split("=") for part in way.split(","))
        alone = look(FORMS[form], objective="sft", strict=True, columns=columns).train
        assert alone.content_ids().tolist() == look(FORMS[form]).train.content_ids()[:1].tolist(), (
            "as the chosen answer"
        )
    with pytest.raises(UserError, match="a row of 2 texts to compare, and --objective sft takes one"):
        look(FORMS["texts"], objective="sft", format="pairs", strict=True)
    with pytest.raises(UserError, match="a row of one text, and --objective dpo compares") as caught:
        look({"messages": FORMS["with the answer in it"]["messages"]}, strict=True)
    assert '"rejected": "..."' in caught.value.hint


def test_answers_that_are_the_same_are_refused_also_where_only_the_template_makes_them_so(look: Survey) -> None:
    said = [assistant("a", reasoning_content="b"), user("c"), assistant("d")]
    other = [assistant("a", reasoning_content="e"), user("c"), assistant("d")]
    rows = [
        {"prompt": "Bye", "chosen": "No", "rejected": "No"},
        FORMS["texts"],
        {"prompt": "Hi", "chosen": said, "rejected": other},
    ]
    report = look(*rows).report
    assert [(note.fate, note.origin[-2:]) for note in report.notes] == [("bad", ":1"), ("bad", ":3")]
    assert all("its 2 texts are the same" in note.reason and "take the row out" in note.hint for note in report.notes)
    assert (report.kept, report.examples) == (1, 2)


def test_pairs_are_cut_and_lost_as_pairs_and_every_token_is_in_one_column(look: Survey) -> None:
    rows = [
        FORMS["texts"],
        {"prompt": "a" * 100, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b" * 100, "rejected": "c"},
        {"prompt": "a", "chosen": "b" * 100 + "c", "rejected": "b" * 100 + "d"},
    ]
    whole = look(*rows, max_length=1000)
    report = look(*rows, max_length=64).report
    assert (report.rows, report.kept, report.truncated, report.dropped, report.examples) == (4, 2, 1, 2, 4)
    reasons = [note.reason for note in report.notes]
    assert reasons[0].startswith("its prompt leaves nothing of one of its answers in the first 64 tokens")
    assert reasons[1].startswith("its longest text of ")
    assert reasons[2] == "its texts are the same in their first 64 tokens, which leaves nothing to compare"
    way = "raise --max-length to train on it"
    assert [note.hint for note in report.notes] == [way, "", way]
    lengths, supervised = whole.train.lengths.tolist(), whole.train.supervised_tokens.tolist()
    tokens = report.tokens
    assert (tokens.all, tokens.supervised) == (sum(lengths), sum(supervised))
    assert tokens.dropped.all == sum(lengths[2:4] + lengths[6:])
    assert tokens.cut_off.all == lengths[4] - 64
    assert report.summary()["pairs"] == "2 to train on, 0 held out, 1 truncated, 2 dropped"


def test_a_pair_repeats_another_where_both_answers_do_and_is_held_out_whole(
    look: Survey, write_rows: Callable[..., str]
) -> None:
    """One answer that is preferred to several, as many sets have, repeats nothing."""
    texts = FORMS["texts"]
    rows = [texts, texts | {"rejected": "Never"}, texts, {"prompt": "Bye", "chosen": "No", "rejected": "So long"}]
    prepared = look(*rows)
    assert (prepared.report.train.pairs, prepared.report.train.rows, prepared.report.train.duplicates) == (4, 8, 1)
    assert [origin[-2:] for origin in prepared.report.train.first_duplicates] == [":3"]
    (found,) = [one for one in prepared.report.findings() if one.name == "duplicate"]
    assert (found.count, found.of) == (1, 4)
    assert "1 of 4 training pairs" in found.sentence
    others = [texts | {"prompt": f"Bye {number}"} for number in range(6)]
    halves = look(*others, valid_fraction=0.4)
    for part in (halves.train, halves.valid):
        assert np.bincount(part.rows)[np.unique(part.rows)].tolist() == [2] * (len(part) // 2)
    assert halves.report.summary()["pairs"].startswith("4 to train on, 2 held out")
    valid = write_rows(texts, texts | {"rejected": "Never"}, texts | {"chosen": "Ciao"}, name="valid.jsonl")
    report = look(texts, texts | {"rejected": "So"}, valid=valid).report
    assert (report.valid.pairs, report.shared, report.first_shared) == (3, 1, [f"{valid}:1"])
    assert "1 validation pair is also a training pair" in report.warnings()[0]


def test_scores_that_say_the_other_way_round_are_warned_of(look: Survey) -> None:
    texts = FORMS["texts"]
    rows = [
        texts | {"chosen_rating": 2, "rejected_rating": 5},
        texts | {"prompt": "a", "score_chosen": 5, "score_rejected": 5, "score": 3},
        texts | {"prompt": "b", "score_chosen": 5, "score_rejected": "9"},
    ]
    report = look(*rows).report
    (warning,) = report.warnings()
    assert warning.startswith("1 of 3 pairs whose rejected answer has the higher score")
    assert warning.endswith("(first " + report.sources[0].name + ":1)")
    assert [key.key for key in report.keys if key.use == "unused"] == ["score"]


def test_every_key_of_a_published_row_is_counted(look: Survey) -> None:
    report = look(FORMS["ultrafeedback"] | {"chosen_model": "x", "label": True}).report
    uses = {key.key: key.use for key in report.keys if key.of == "row"}
    unused = {key for key, use in uses.items() if use == "unused"}
    assert unused == {"prompt_id", "messages", "chosen_model", "label"}
    assert {key: key_use for key, key_use in uses.items() if key not in unused} == dict.fromkeys(
        ("prompt", "chosen", "rejected", "score_chosen", "score_rejected"), "read"
    )
    counts = {key.key: key.count for key in report.keys if key.of == "message"}
    assert counts == {"role": 4, "content": 4}


def test_of_a_pair_the_chosen_answer_alone_is_looked_at_for_faults(look: Survey) -> None:
    sorry = "I'm sorry, but I cannot help with that."
    report = look(
        {"prompt": "a", "chosen": sorry, "rejected": "b c"}, {"prompt": "a", "chosen": "b", "rejected": sorry}
    )
    assert report.report.train.signs["refusal"]["count"] == 1
    assert report.report.signs == {"refusal": 1}


def test_where_trl_would_begin_an_answer_elsewhere_the_report_says_so(
    look: Survey, qwen3: PreTrainedTokenizerFast, make_tokenizer: MakeTokenizer
) -> None:
    """Qwen 3's header holds an empty think block where thinking is off, and TRL leaves it out of the answer."""
    as_usual = look(FORMS["texts"], using=qwen3).report
    assert [one.name for one in as_usual.findings()] == []
    report = look(FORMS["texts"], using=qwen3, chat_template_kwargs={"enable_thinking": False}).report
    (found,) = report.findings()
    assert (found.name, found.count, found.of, found.warns) == ("begun-otherwise", 1, 1, False)
    assert report.summary()["beside TRL"] == "1 pair whose answers it would begin with another token"
    assert report.warnings() == []
    exact = look(
        FORMS["texts"], using=qwen3, chat_template_kwargs={"enable_thinking": False}, train_think_prefill=False
    )
    assert exact.report.findings() == []
