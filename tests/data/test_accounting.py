"""Every row, every key and every token of the input is in exactly one of the report's columns, and their sum is the input.

The input is counted here from the rows as they are written, by code that shares nothing with the readers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from mlx_sft.config import TrainConfig
from mlx_sft.data.dataset import Examples, pack
from mlx_sft.data.encode import Encoder, EncodeSettings
from mlx_sft.data.example import Example, Outcome
from mlx_sft.data.key_counts import Use, columns
from mlx_sft.data.keys import KeyRules
from mlx_sft.data.pipeline import Pipeline
from mlx_sft.data.prepare import survey
from mlx_sft.data.readers import Row
from mlx_sft.data.row_reader import RowReader
from mlx_sft.data.truncation import truncate
from mlx_sft.errors import UserError
from tests.data.test_keys import NoTokens

pytestmark = pytest.mark.fast

many = settings(max_examples=100, deadline=None, suppress_health_check=[*HealthCheck])

# Rows as people write them

WORDS = st.text("abc .", min_size=1, max_size=12).filter(str.strip)
UNKNOWN = st.dictionaries(
    st.sampled_from(["id", "mood", "source", "cache_control", "wieght", "tool", "argument", "nmae", "", "strict"]),
    st.sampled_from([None, 1, "x", [], {"a": 1}, True]),
    max_size=2,
)


def as_json(value: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """As it is, or as JSON text of it, once or twice encoded."""
    return st.builds(
        lambda one, times: one if not times else json.dumps(one) if times == 1 else json.dumps(json.dumps(one)),
        value,
        st.sampled_from([0, 0, 0, 1, 2]),
    )


ARGUMENTS = as_json(st.just({"n": 6})) | st.sampled_from(["", None, {}, '{"n": ', [1], "{'n': 6}", "{}"])


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    key = draw(st.sampled_from(["arguments", "arguments", "parameters", "input", "args"]))
    arguments = draw(st.just({}) | st.builds(lambda value: {key: value}, ARGUMENTS))
    function = {"name": "f", **arguments, **draw(UNKNOWN)}
    ids = draw(st.sampled_from([{}, {"id": "1"}, {"id": None}]))
    if draw(st.booleans()):
        return {**function, **ids}
    outside = draw(st.sampled_from([{}, {}, {"arguments": {"n": 6}}]))
    wrapped = draw(as_json(st.just(function)))
    return {**ids, "type": "function", "function": wrapped, **outside, **draw(UNKNOWN)}


def parts(kinds: list[dict[str, Any]]) -> st.SearchStrategy[list[dict[str, Any]]]:
    return st.lists(
        st.builds(lambda part, more: {**more, **part}, st.sampled_from(kinds), UNKNOWN), min_size=1, max_size=3
    )


TEXTS: list[dict[str, Any]] = [
    {"type": "text", "text": "a"},
    {"text": "b"},
    {"type": "input_text", "text": None, "value": "c"},
]
SAID: list[dict[str, Any]] = [
    {"type": "thinking", "thinking": "Hm.", "signature": "s"},
    {"type": "reasoning", "text": [{"type": "text", "text": "Hm."}]},
    *TEXTS,
    {"type": "tool_use", "id": "1", "name": "f", "input": {"n": 6}},
    {"type": "reasoning", "value": "Hm."},
    {"type": "tool_call", "value": {"name": "f", "arguments": {"n": 6}, "mood": 1}},
    {"type": "tool_call", "value": '{"function": {"name": "f", "strict": true}}', "tool_call": None},
    {"type": "image", "url": "u"},
]
ANSWERS: list[dict[str, Any]] = [
    {
        "type": "tool_result",
        "tool_use_id": "1",
        "content": [{"type": "text", "text": "6", "lang": "en"}],
        "is_error": None,
    },
    {"type": "tool_result", "tool_use_id": "1", "content": "6", "is_error": True},
    *TEXTS,
]


TURNS = st.sampled_from([["user"], ["assistant"], ["assistant", "call", "call"], ["call"], ["tool"], ["system"]])


@st.composite
def messages(draw: st.DrawFn) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for role in draw(
        st.lists(TURNS, min_size=1, max_size=4).map(lambda turns: [one for turn in turns for one in turn])
    ):
        more = draw(UNKNOWN)
        if role == "assistant":
            more |= draw(
                st.sampled_from([{}, {}, {"weight": 0.5}, {"train": False}, {"reasoning": "Hm."}, {"loss": None}])
            )
            more |= draw(
                st.just({}) | st.builds(lambda calls: {"tool_calls": calls}, as_json(st.lists(calls(), max_size=2)))
            )
            more |= draw(st.sampled_from([{}, {}, {"function_call": {"name": "g", "id": "2", "mood": 1}}]))
            content = draw(WORDS | st.none() | parts(SAID) | WORDS.map("<think>Hm.</think>{}".format))
        elif role == "call":
            role = draw(st.sampled_from(["tool_call", "function_call"]))
            content = draw(as_json(calls()).map(lambda call: call if isinstance(call, str) else json.dumps(call)))
        elif role == "tool":
            content = draw(WORDS)
        else:
            content = draw(WORDS | (parts(ANSWERS) if role == "user" else parts(TEXTS)))
        names = draw(st.sampled_from([("role", "content"), ("from", "value"), ("role", "value")]))
        both = draw(st.sampled_from([{}, {}, {}, {"from": "human", "role": None, "value": "x"}]))
        found.append({**both, **dict(zip(names, (role, content), strict=True)), **more})
    return found


TOOLS = st.sampled_from(
    [
        {"name": "f", "parameters": {}, "strict": True},
        {"name": "f", "input_schema": {}, "description": None},
        {"type": "function", "function": {"name": "f"}, "mood": 1},
        {"type": "web_search", "max_uses": 5},
    ]
)
EXTRAS = st.fixed_dictionaries(
    {},
    optional={
        "system": WORDS | parts(TEXTS),
        "tools": as_json(st.lists(TOOLS, max_size=2)) | st.none(),
        "functions": st.lists(TOOLS, max_size=1),
        "chat_template_kwargs": st.just({"a": 1}),
        "label": st.sampled_from([None, True]),
        "rejected": st.sampled_from([None, "no"]),
        "rejected_response": st.sampled_from([None, 1]),
        "weight": st.sampled_from([None, 0.5, 0, "much"]),
    },
)
GLAIVE = 'USER: Hi\n\nASSISTANT: <functioncall> {"name": "f", "mood": 1, "arguments": \'{"n": 6}\'} <|endoftext|>'
INSTANCES = st.lists(st.builds(lambda more, text: {**more, "input": None, "output": text}, UNKNOWN, WORDS), max_size=2)
ROWS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(lambda found: {"messages": found}, as_json(messages())),
    st.builds(lambda found: {"conversations": found}, messages()),
    st.builds(lambda one, two: {"instruction": one, "output": two, "history": [["a", "b"]]}, WORDS, WORDS | st.none()),
    st.builds(lambda one, two: {"question": one, "answer": two, "reasoning": "Hm."}, WORDS, WORDS | st.none()),
    st.builds(lambda found: {"instruction": "Hi", "instances": found}, as_json(INSTANCES)),
    st.builds(lambda one, two: {"prompt": one, "completion": two}, WORDS | messages(), WORDS | messages()),
    st.builds(
        lambda one, two, three, scores: {"prompt": one, "chosen": two, "rejected": three, **scores},
        WORDS | messages(),
        WORDS | messages(),
        WORDS | messages(),
        st.sampled_from([{}, {"score_chosen": 1, "score_rejected": 2.5}, {"chosen_rating": 3, "score_chosen": "x"}]),
    ),
    st.builds(lambda found: {"query": "Hi", "answers": found}, as_json(st.lists(calls(), max_size=2))).map(
        lambda row: {"tools": "[]", **row}
    ),
    st.builds(
        lambda text: {"system": f"SYSTEM: {text}", "chat": GLAIVE}, WORDS | st.just('Use {"name": "f", "mood": 1}')
    ),
    st.just({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": None}),
    st.builds(lambda text: {"text": text}, WORDS | st.none()),
    st.just({}),
)
GIVEN = st.builds(lambda row, extras, more: {**more, **extras, **row}, ROWS, EXTRAS, UNKNOWN)


# What is in them, counted from the rows


def from_text(value: Any) -> Any:
    while isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value


def listed(value: Any) -> list[Any]:
    value = from_text(value)
    return value if isinstance(value, list) else [] if value is None else [value]


def call_keys(value: Any) -> Iterator[str]:
    for call in map(from_text, listed(value)):
        for part in (call, from_text(call.get("function"))):
            yield from part or ()


def part_keys(content: Any) -> Iterator[str]:
    for part in content if isinstance(content, list) else ():
        yield from part
        for inner in part.values():
            yield from part_keys([one for one in inner if isinstance(one, dict)] if isinstance(inner, list) else [])


def calls_among(content: Any) -> list[Any]:
    return [one for one in content if one.get("type") == "tool_call"] if isinstance(content, list) else []


def is_words(value: Any) -> bool:
    return isinstance(value, str) and not value.strip().startswith(("[", '"'))


def keys_of(row: dict[str, Any]) -> Counter[str]:
    """How many keys a row has that can be read, by whose they are."""
    found = Counter({"row": len(row)})
    if "text" in row or "input_ids" in row:
        return found  # what such a row has besides, nobody reads
    for key in ("messages", "conversations", "prompt", "completion", "chosen", "rejected"):
        for message in listed(row.get(key)) if not is_words(row.get(key)) else ():
            found["message"] += len(message)
            role, content = (
                next((message[key] for key in keys if message.get(key) is not None), None)
                for keys in (("role", "from"), ("content", "value"))
            )
            found["part"] += len(list(part_keys(content)))
            found["call"] += len(list(call_keys([one["value"] for one in calls_among(content)])))
            found["call"] += len(list(call_keys(message.get("tool_calls"))))
            found["call"] += len(list(call_keys(message.get("function_call"))))
            found["call"] += len(list(call_keys(content))) if role in ("tool_call", "function_call") else 0
    found["row"] += sum(map(len, listed(row.get("instances"))))
    found["call"] += len(list(call_keys(row.get("answers"))))
    found["part"] += len(list(part_keys(row.get("system"))))
    if "chat" in row:
        found["call"] += len(("name", "mood", "arguments"))
        found["tool"] += len(("name", "mood")) if "{" in row["system"] else 0
    if not found["tool"]:
        found["tool"] += sum(map(len, listed(row.get("tools")) or listed(row.get("functions"))))
    return +found


class OneToken:
    """One supervised token a row."""

    def encode(self, item: Any) -> list[Example]:
        return [Example(item.origin, np.array([1, 2], np.int32), np.array([0, 1], np.float32))]


RULES = st.sampled_from(
    [KeyRules(), KeyRules(ignore_unknown=True), KeyRules(frozenset({"mood", "strict"}), frozenset({"call", "tool"}))]
)


@many
@given(st.lists(GIVEN, min_size=1, max_size=4), RULES, st.sampled_from(["keep", "join", "error"]))
def test_every_key_is_in_one_column_and_the_sum_is_the_input(
    rows: list[dict[str, Any]], rules: KeyRules, turns: Any
) -> None:
    whole, reader = Counter[str](), RowReader(consecutive_turns=turns, compares=True)
    for row in rows:
        pipeline = Pipeline(reader, OneToken(), NoTokens(), keys=rules)  # type: ignore[arg-type]
        table = columns(pack([pipeline.process(Row("a:1", row))]).keys)
        expected = keys_of(row) if is_read(row, turns) else Counter({"row": len(row)})
        assert {owner: counts["all"] for owner, counts in table.items()} == +expected
        for counts in table.values():
            assert counts["all"] == sum(counts[use] for use in get_args(Use))
        whole += expected
    pipeline = Pipeline(reader, OneToken(), NoTokens(), keys=rules)  # type: ignore[arg-type]
    store = pack(pipeline.process(Row(f"a:{line}", row)) for line, row in enumerate(rows, 1))
    assert {owner: counts["all"] for owner, counts in columns(store.keys).items()} == whole
    examples = Examples([store])
    assert store.rows == len(rows) == len(set(examples.rows.tolist())) + len(store.lost)


def is_read(row: dict[str, Any], turns: Any) -> bool:
    try:
        return RowReader(consecutive_turns=turns, compares=True).reading(Row("a:1", row)).error is None
    except UserError:
        return False  # of no known format


# Tokens

CONFIGS = st.fixed_dictionaries(
    {"max_length": st.integers(2, 120), "overlong": st.sampled_from([None, "truncate", "drop", "split", "error"])},
    optional={"valid_fraction": st.sampled_from([0.2, 0.5]), "train_on": st.sampled_from(["last", "every-turn"])},
)
TALKS = st.builds(
    lambda turns: {
        "messages": [
            one for u, a in turns for one in ({"role": "user", "content": u}, {"role": "assistant", "content": a})
        ]
    },
    st.lists(st.tuples(WORDS, WORDS.map(lambda word: word * 3)), min_size=1, max_size=3),
)
BOOKS = st.builds(lambda words: {"text": " ".join(words)}, st.lists(WORDS, min_size=1, max_size=20))


@settings(many, max_examples=25)
@given(
    st.lists(TALKS, min_size=1, max_size=5) | st.lists(BOOKS, min_size=1, max_size=5),
    st.lists(TALKS, max_size=2),
    CONFIGS,
)
def test_every_row_and_every_token_is_in_one_column_and_the_sum_is_the_input(
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    others: list[dict[str, Any]],
    config: dict[str, Any],
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    encoder = Encoder(tokenizer, EncodeSettings(train_on=config.get("train_on", "all")))
    read = [RowReader().read(Row("a:1", row)) for row in (*rows, *others)]
    whole = [example for item in read for example in encoder.encode(item)]  # type: ignore[arg-type]
    files = []
    for name, some in (("a", [*rows, {"words": 1}]), ("b", others)):
        if some:
            files.append(folder / f"{name}.jsonl")
            files[-1].write_text("".join(json.dumps(row) + "\n" for row in some))
    prepared = survey(TrainConfig(data=[str(file) for file in files], data_cache=False, **config), tokenizer)
    report = prepared.report
    assert report.rows == report.kept + report.dropped + report.bad == len(rows) + len(others) + 1
    tokens = report.tokens
    assert tokens.all == sum(map(len, whole))
    assert tokens.supervised == sum(example.supervised_tokens for example in whole)
    for part, told in ((prepared.train, tokens.trained_on), (prepared.valid, tokens.held_out)):
        assert told.all == sum(map(len, part))
        assert told.supervised == sum(example.supervised_tokens for example in part)
    assert all(
        min(one.supervised, one.context) >= 0 for source in report.sources for one in source.tokens.columns.values()
    )
    assert 0 <= tokens.first_of_pieces <= tokens.trained_on.context + tokens.held_out.context
    assert not tokens.first_of_pieces or report.split or config["overlong"] in (None, "split")


@many
@given(st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=3), min_size=1, max_size=4), st.integers(2, 35))
def test_the_tokens_of_compared_texts_are_dropped_together(rows: list[list[int]], max_length: int) -> None:
    made = [
        [Example(f"a:{n}", np.arange(length, dtype=np.int32), np.ones(length, np.float32)) for length in row]
        for n, row in enumerate(rows)
    ]
    whole = Examples([pack(Outcome(f"a:{n}", row) for n, row in enumerate(made))])
    truncation = truncate(whole, max_length, "drop", compared=True)
    assert truncation.tokens.all == sum(map(sum, rows))
    assert truncation.tokens.dropped.all == sum(sum(row) for row in rows if max(row) > max_length)
