"""What would spoil a run, each thing once: how often, in which rows first, and in a sentence with a way out.

The warnings before training, the table of `inspect` and `data_report.json` all show these. What a chat template does to conversations is
a row of `FACT_FINDINGS`: a further field of `Facts` is found, told and shown by a line there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from typing import Any

from mlx_sft.console import many
from mlx_sft.data.template import Facts

ORIGINS_NAMED = 10
"""How many rows are named of each finding."""
_IN_A_SENTENCE = 3
"""How many of them to a person."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that would spoil a run, or might.

    Attributes:
        name: By which `--only` and machines know it.
        count: How many there are.
        of: Of how many; None where that says nothing.
        sentence: What there is, what it does, and a way out.
        first: The origins of the first rows that have it, at most `ORIGINS_NAMED`.
        warns: Whether a person is to be told before training, and not only who looks.
    """

    name: str
    count: int
    of: int | None
    sentence: str
    first: list[str] = field(default_factory=list)
    warns: bool = True

    @property
    def text(self) -> str:
        """The sentence, and where to look: `... (first chats.jsonl:3, chats.jsonl:9, …)`."""
        more = ", …" if len(self.first) > _IN_A_SENTENCE else ""
        where = f" (first {', '.join(self.first[:_IN_A_SENTENCE])}{more})" if self.first else ""
        return self.sentence + where

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class FactFinding:
    """How a field of `Facts` is told.

    Attributes:
        name: Of the finding.
        fact: The field.
        thing: What is counted.
        of: The field of `Facts` that counts all of them, or `rows`; empty where that is not known.
        sentence: With {} for how many there are.
        way_out: A setting, which is named unless it has the value `taken` already.
        warns: Whether a person is to be told before training.
    """

    name: str
    fact: str
    thing: str
    of: str
    sentence: str
    way_out: str = ""
    taken: tuple[str, Any] = ("", True)
    warns: bool = True

    def found(self, facts: Facts, rows: int, first: list[str], settings: Mapping[str, Any]) -> Finding:
        """The finding; its count may be 0."""
        count: int = getattr(facts, self.fact)
        whole: int | None = (rows if self.of == "rows" else getattr(facts, self.of)) if self.of else None
        counted = many(count, self.thing) if whole is None else out_of(count, whole, self.thing)
        setting, value = self.taken
        sentence = self.sentence.format(counted) + ("" if settings.get(setting) == value else self.way_out)
        return Finding(self.name, count, whole, sentence, first, self.warns)


FACT_FINDINGS = (
    FactFinding(
        "no-end",
        "turns_without_end",
        "assistant turn",
        "turns",
        "{} without a supervised end token: the model is not taught to stop there",
        "; --append-eos puts one after each conversation",
        ("append_eos", True),
    ),
    FactFinding(
        "left-out",
        "turns_with_text_left_out",
        "assistant turn",
        "",
        "the chat template leaves out words (reasoning, tool calls) of {}; they cannot be trained on",
        " so: --train-on every-turn shows each turn where the model writes it, in which templates write more",
        ("train_on", "every-turn"),
    ),
    FactFinding(
        "system-left-out",
        "systems_left_out",
        "system message",
        "",
        "the chat template leaves out {}; the model is trained to answer without them",
        "; --system fold puts their words into the user's messages",
        ("system", "fold"),
    ),
    FactFinding(
        "message-left-out",
        "messages_left_out",
        "message",
        "",
        "the chat template leaves out {} of users or tools; the model is trained to answer without them",
    ),
    FactFinding(
        "tools-left-out",
        "tools_left_out",
        "conversation",
        "",
        "the chat template leaves out the tools of {}; --chat-template takes one that writes them",
    ),
    FactFinding(
        "system-folded",
        "systems_folded",
        "system message",
        "",
        "the chat template has no system role: it writes {} inside another message's turn",
    ),
    FactFinding(
        "consecutive-turns",
        "consecutive_turns",
        "assistant turn",
        "turns",
        "{} directly behind another: the model is taught to end its turn between them; --consecutive-turns join makes them one",
    ),
    FactFinding(
        "unanswered",
        "unanswered",
        "row",
        "rows",
        "{} without the assistant's last word: what a user or a tool says last is read, and no answer to it is trained on; "
        "add the answer, or take the last message out",
    ),
    FactFinding(
        "scores-swapped",
        "scores_swapped",
        "pair",
        "rows",
        "{} whose rejected answer has the higher score: the model is taught to prefer the worse, unless the scores are wrong; "
        "take these rows out, or swap their answers",
    ),
    FactFinding(
        "begun-otherwise",
        "begun_otherwise",
        "pair",
        "rows",
        "in {}, TRL would begin the answers with another token: it begins where the prompt's tokens and the whole's part",
        warns=False,
    ),
)
"""In the order in which they are told."""


def first_of(lists: Iterable[Iterable[str]]) -> list[str]:
    """The first origins of several lists of them, each once."""
    return list(islice(dict.fromkeys(chain.from_iterable(lists)), ORIGINS_NAMED))


def out_of(number: int, whole: int, thing: str) -> str:
    """`1 of 1,234 rows`."""
    return f"{number:,} of {many(whole, thing)}"
