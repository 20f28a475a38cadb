from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest

from mlx_sft.data.dataset import Examples, pack
from mlx_sft.data.example import Example, Note, Outcome
from mlx_sft.data.findings import FACT_FINDINGS
from mlx_sft.data.key_counts import KeyCount
from mlx_sft.data.part_report import PartReport, histogram, length_summary
from mlx_sft.data.report import DataReport, SourceReport, reasons
from mlx_sft.data.template import Facts
from mlx_sft.data.token_counts import TokenColumn, TokenCounts

pytestmark = pytest.mark.fast


def example(length: int, origin: str = "chats.jsonl:1", fill: int = 5) -> Example:
    weights = np.zeros(length, np.float32)
    weights[length // 2 :] = 1
    return Example(origin, np.full(length, fill, np.int32), weights)


def stored(*rows: Outcome) -> Examples:
    return Examples([pack(rows)])


def part(*examples: Example) -> PartReport:
    return PartReport.of(Examples.of(list(examples)))


def report(train: PartReport | None = None, shared: int = 0, append_eos: bool = False, **source: object) -> DataReport:
    sources = [SourceReport("chats.jsonl", None, "messages", **({"kept": 4} | source))]  # type: ignore[arg-type]
    return of_sources(sources, train, shared, append_eos)


def of_sources(
    sources: list[SourceReport], train: PartReport | None = None, shared: int = 0, append_eos: bool = False
) -> DataReport:
    return DataReport(sources, train or part(example(10)), part(), shared, {"append_eos": append_eos})


def test_a_part_is_told_by_its_lengths_its_longest_and_its_duplicates() -> None:
    told = part(example(10, "a:1"), example(30, "a:2"), example(10, "a:3"), example(20, "a:4", fill=6))
    assert (told.rows, told.tokens, told.supervised_tokens, told.duplicates) == (4, 70, 35, 1)
    assert told.lengths["max"] == 30
    assert told.longest[:2] == [{"origin": "a:2", "tokens": 30}, {"origin": "a:4", "tokens": 20}]
    assert sum(bar["count"] for bar in told.histogram) == 4
    assert told.supervised_share == 0.5


def test_signs_are_counted_by_example_and_name_the_first_rows_once() -> None:
    mojibake = frozenset({"mojibake"})
    turns = [example(5, "a:1#1"), example(6, "a:1#2")]
    told = PartReport.of(stored(Outcome("a:1", turns, mojibake), Outcome("a:2", [example(7, "a:2")]))).signs
    assert told == {"mojibake": {"count": 2, "origins": ["a:1"]}}


def test_an_empty_part_is_told_too() -> None:
    told = part()
    assert (told.rows, told.tokens, told.duplicates, told.lengths, told.histogram) == (0, 0, 0, {}, [])
    assert told.supervised_share == 0


def test_every_row_is_accounted_for() -> None:
    notes = [Note("c:1", "bad", "x"), Note("c:2", "dropped", "y"), Note("c:3", "truncated", "z")]
    totals = report(notes=notes).to_json()["totals"]
    assert totals == {"rows": 6, "kept": 4, "truncated": 1, "dropped": 1, "bad": 1}


def test_a_report_is_shown_in_one_line_without_its_notes() -> None:
    told = report(notes=[Note("c:1", "bad", "x")])
    assert repr(told) == "DataReport(5 rows, 4 kept, 0 truncated, 0 dropped, 1 bad)"
    assert repr(told.sources[0]) == "SourceReport(chats.jsonl: 5 rows, 4 kept, 0 truncated, 0 dropped, 1 bad)"


def test_the_machine_form_is_json_and_holds_every_note() -> None:
    whole = json.loads(json.dumps(report(notes=[Note("c:1", "bad", "x", "do y")], signs=Counter(echo=2)).to_json()))
    assert whole["sources"][0]["not_simply_kept"] == [{"origin": "c:1", "fate": "bad", "reason": "x", "hint": "do y"}]
    assert whole["sources"][0]["format"] == "messages"
    assert whole["signs"] == {"echo": 2}


def test_reasons_that_differ_in_particulars_are_counted_together() -> None:
    notes = [
        Note("c:1", "truncated", "2100 tokens, cut to 2048"),
        Note("c:5", "truncated", "3000 tokens, cut to 2048"),
        Note("c:7", "bad", "messages[0] has the unknown role 'bot'"),
    ]
    assert reasons(notes) == [
        {"fate": "truncated", "reason": "… tokens, cut to 2048", "count": 2, "first": "c:1"},
        {"fate": "bad", "reason": "messages[0] has the unknown role 'bot'", "count": 1, "first": "c:7"},
    ]


def test_good_data_warns_of_nothing() -> None:
    assert report(facts=Facts(turns=4)).warnings() == []


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (Facts(turns=4, turns_without_end=2), "2 of 4 assistant turns without a supervised end token"),
        (Facts(turns=4, turns_with_text_left_out=1), "leaves out words (reasoning, tool calls) of 1 assistant turn;"),
        (Facts(turns=4, systems_left_out=3), "leaves out 3 system messages"),
        (Facts(turns=4, messages_left_out=2), "leaves out 2 messages of users or tools; "),
        (Facts(turns=4, tools_left_out=2), "leaves out the tools of 2 conversations; --chat-template "),
        (Facts(turns=4, consecutive_turns=1), "1 of 4 assistant turns directly behind another: "),
        (Facts(turns=4, systems_folded=1), "writes 1 system message inside another message's turn"),
    ],
)
def test_what_the_template_does_is_warned_of_once_with_counts(facts: Facts, words: str) -> None:
    (warning,) = report(facts=facts).warnings()
    assert words in warning


def test_every_field_of_facts_that_is_told_is_one_of_them_and_told_once() -> None:
    names = {field.name for field in fields(Facts)}
    assert {one.fact for one in FACT_FINDINGS} <= names
    assert {one.of for one in FACT_FINDINGS} <= names | {"", "rows"}
    kinds = [one.name for one in FACT_FINDINGS]
    assert len(set(kinds)) == len(kinds)


def test_a_finding_names_the_first_rows_and_is_told_where_it_is_counted() -> None:
    origins = [f"c:{line}" for line in range(1, 21)]
    told = report(kept=30, facts=Facts(turns=60, unanswered=20), first={"unanswered": origins})
    (finding,) = told.findings()
    assert (finding.name, finding.count, finding.of) == ("unanswered", 20, 30)
    assert finding.first == origins[:10]
    (warning,) = told.warnings()
    assert warning.startswith("20 of 30 rows without the assistant's last word")
    assert warning.endswith(" (first c:1, c:2, c:3, …)")
    assert told.to_json()["findings"] == [finding.to_json()]
    assert told.to_json()["warnings"] == [warning]


def test_the_first_rows_of_several_sources_are_named_in_their_order_and_once() -> None:
    told = report(facts=Facts(turns=4, turns_without_end=1), first={"turns_without_end": ["a:1"]})
    facts = Facts(turns=4, turns_without_end=2)
    other = SourceReport("b", None, "text", facts=facts, first={"turns_without_end": ["a:1", "b:1"]})
    told = of_sources([*told.sources, other])
    assert told.findings()[0].first == ["a:1", "b:1"]
    assert told.findings()[0].count == 3


def test_a_few_duplicates_and_a_few_lost_tokens_are_findings_and_no_warnings() -> None:
    train = part(*(example(10, f"a:{fill}", fill=fill) for fill in range(50)), example(10, "a:51", fill=3))
    tokens = TokenCounts(trained_on=TokenColumn(99, 1), cut_off=TokenColumn(1, 0))
    told = report(
        train,
        tokens=tokens,
        keys=[KeyCount("row", "id", "unused", 3, "a:2"), KeyCount("row", "text", "read", 4, "a:1")],
    )
    assert [(one.name, one.count, one.of, one.warns) for one in told.findings()] == [
        ("too-long", 1, 100, False),
        ("duplicate", 1, 51, False),
        ("unused-keys", 3, 7, False),
    ]
    assert [one.first for one in told.findings()[1:]] == [["a:51"], ["a:2"]]
    assert told.warnings() == []


def test_the_form_in_which_calls_are_given_to_the_template_is_told() -> None:
    told = report(facts=Facts(turns=4, arguments_as_text=3, contents_as_null=2))
    assert told.warnings() == []
    assert told.summary()["calls"] == "as the chat template takes them: arguments as text (3), content null (2)"
    assert told.to_json()["contents_as_null"] == 2


def test_append_eos_is_offered_where_it_is_not_taken() -> None:
    facts = Facts(turns=1, turns_without_end=1)
    assert "--append-eos" in report(facts=facts).warnings()[0]
    assert "--append-eos" not in report(facts=facts, append_eos=True).warnings()[0]


def test_rows_that_are_shared_or_repeated_are_warned_of() -> None:
    warnings = report(part(*[example(10)] * 4), shared=2).warnings()
    assert warnings[0].startswith("2 validation rows are also training rows, ")
    assert warnings[1].startswith("3 of 4 training rows equal an earlier one")


def test_suspicions_are_told_and_are_no_warning() -> None:
    suspicious = report(signs=Counter(echo=2, mojibake=1))
    assert suspicious.warnings() == []
    assert suspicious.summary()["suspicious"].startswith("2 echo, 1 mojibake; ")


def test_the_short_form_says_what_is_trained_on_and_what_is_lost() -> None:
    notes = [Note("c:1", "bad", "x"), Note("c:2", "truncated", "z")]
    assert report(part(*[example(10)] * 2), notes=notes).summary() == {
        "rows": "2 to train on, 0 held out, 1 truncated, 1 bad",
        "format": "messages",
        "tokens": "20, 50% supervised",
        "lengths": "10 (median), 10 (95 %), 10 (longest) tokens",
        "duplicates": "1",
    }


def test_examples_are_told_from_rows_where_a_row_gives_several() -> None:
    turns = report(part(*[example(10)] * 6), kept=4, examples=6, shared=1)
    assert turns.summary()["rows"] == "4 kept; 6 examples to train on, 0 held out"
    assert turns.warnings()[0].startswith("1 validation example is also a training example, ")
    assert turns.warnings()[1].startswith("5 of 6 training examples equal an earlier one")


def test_the_formats_of_several_sources_are_told_with_their_rows() -> None:
    two = of_sources([*report().sources, SourceReport("b.jsonl", None, "text", kept=3)])
    assert two.summary()["format"] == "messages (4), text (3)"


# Lengths in a few numbers


def test_percentiles_are_lengths_that_occur() -> None:
    summary = length_summary([1, 2, 3, 4, 1000])
    assert summary == {"min": 1, "mean": 202.0, "p10": 1, "p50": 3, "p90": 1000, "p95": 1000, "p99": 1000, "max": 1000}


def test_no_lengths_have_no_summary() -> None:
    assert length_summary([]) == {}
    assert histogram([]) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_histogram_counts_every_length_once_in_bars_that_touch(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 10 ** (seed + 1), 500)
    bars = histogram(lengths)
    assert sum(bar["count"] for bar in bars) == 500
    assert len(bars) <= 24
    for bar, after in zip(bars, [*bars[1:], None], strict=True):
        assert bar["count"] == np.count_nonzero((lengths >= bar["from"]) & (lengths <= bar["to"]))
        assert after is None or after["from"] == bar["to"] + 1


def test_a_few_giants_share_the_last_bar() -> None:
    bars = histogram([*range(100, 300), 100_000])
    assert bars[-1] == {"from": 300, "to": 100_000, "count": 1}
    assert bars[0] == {"from": 100, "to": 109, "count": 10}


def test_one_length_is_one_bar() -> None:
    assert histogram([7, 7]) == [{"from": 7, "to": 7, "count": 2}]
