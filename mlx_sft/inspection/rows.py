"""One row as it is shown: what became of it, and its tokens turn by turn, with those that are supervised."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Literal

import numpy as np

from mlx_sft.config import TrainConfig
from mlx_sft.data.conversation import Conversation, Document, Item, items_of
from mlx_sft.data.encode import View
from mlx_sft.data.mask.trace import NOBODY
from mlx_sft.data.pipeline import Pipeline
from mlx_sft.data.readers import Row
from mlx_sft.data.report import SourceReport
from mlx_sft.data.row_reader import RowReader
from mlx_sft.data.screening import SIGNS, SPECIAL_SIGN
from mlx_sft.errors import UserError
from mlx_sft.inspection.selection import FINDINGS, Part, Selection, SurveyedRows

Fate = Literal["kept", "truncated", "dropped", "bad"]

_LONGEST_STRING = 400
_MOST_ITEMS = 20
_LONGEST_RAW = 4000


@dataclass(frozen=True, slots=True)
class Turn:
    """Consecutive tokens that the same message wrote.

    Attributes:
        message: Its index; None for what the template writes of itself, and for plain text.
        role: `user`, `assistant`, ...; `template`, `text` or `tokens` where there is no message.
        start, end: The tokens, half-open.
        supervised_tokens: How many of them are supervised.
    """

    message: int | None
    role: str
    start: int
    end: int
    supervised_tokens: int

    def token_ids_of(self, example: ShownExample) -> tuple[int, ...]:
        """Of an example, those at the turn's place."""
        return tuple(example.token_ids[self.start : self.end])

    def to_json(self) -> dict[str, Any]:
        return {
            "message": self.message,
            "role": self.role,
            "tokens": self.end - self.start,
            "supervised_tokens": self.supervised_tokens,
        }


@dataclass(frozen=True, slots=True)
class ShownExample:
    """A whole example and its text. Its supervised tokens are those before `cut_at` that have a weight.

    Attributes:
        name: What it is of those that are compared, `chosen` or `rejected`, or by its label; empty where it is neither.
        pieces: The text of each token.
        special: Whether each is one of the tokenizer's special tokens.
        cut_at: How many tokens are left within max_length.
    """

    origin: str
    pieces: list[str]
    token_ids: list[int]
    weights: list[float]
    special: list[bool]
    turns: list[Turn]
    cut_at: int
    name: str = ""

    @classmethod
    def of(cls, view: View, item: Item, special_ids: frozenset[int], max_length: int, name: str) -> ShownExample:
        """The view of an example that was made of this item."""
        example = view.example
        token_ids: list[int] = example.token_ids.tolist()
        return cls(
            example.origin,
            view.pieces,
            token_ids,
            [round(weight, 4) for weight in example.loss_weights.tolist()],
            [token_id in special_ids for token_id in token_ids],
            list(_turns(view, item)),
            min(len(token_ids), max_length),
            name,
        )

    @property
    def supervised_tokens(self) -> int:
        return sum(weight != 0 for weight in self.weights[: self.cut_at])

    def to_json(self) -> dict[str, Any]:
        own = {
            name: getattr(self, name)
            for name in ("origin", "name", "supervised_tokens", "cut_at", "pieces", "token_ids", "weights")
        }
        return own | {"tokens": len(self.token_ids), "turns": [turn.to_json() for turn in self.turns]}


@dataclass(frozen=True, slots=True)
class ShownRow:
    """A row, what became of it, and why.

    Attributes:
        signs: What is suspicious about it, in the order of `screening.SIGNS`.
        duplicate_of: The origin of the first earlier row with the same tokens and weights, or with one such example.
        left_out: Turns of which the chat template leaves out words.
        findings: The names of what would spoil a run and is in it, of `selection.FINDINGS`.
        examples: What it became, or would have; none for a bad row.
        raw: The row as JSON, shortened; empty where it could not even be read.
    """

    origin: str
    source: str
    part: Part
    fate: Fate
    reason: str = ""
    hint: str = ""
    signs: tuple[str, ...] = ()
    duplicate_of: str | None = None
    left_out: int = 0
    findings: tuple[str, ...] = ()
    examples: list[ShownExample] = field(default_factory=list)
    raw: str = ""

    @property
    def tokens(self) -> int:
        """Whole, before anything is cut."""
        return sum(len(example.token_ids) for example in self.examples)

    @property
    def supervised_tokens(self) -> int:
        return sum(example.supervised_tokens for example in self.examples)

    @property
    def shared_turns(self) -> int:
        """With how many turns that are only read, their prompt, all of several compared examples begin."""
        if len(self.examples) < 2 or not self.examples[0].name:
            return 0
        same = [
            len(set(turns)) == 1
            and not turns[0].supervised_tokens
            and len(set(map(turns[0].token_ids_of, self.examples))) == 1
            for turns in zip(*(example.turns for example in self.examples), strict=False)
        ]
        return same.index(False) if False in same else len(same)

    def to_json(self) -> dict[str, Any]:
        return {
            "origin": self.origin,
            "source": self.source,
            "part": self.part,
            "fate": self.fate,
            "reason": self.reason,
            "hint": self.hint,
            "signs": list(self.signs),
            "duplicate_of": self.duplicate_of,
            "turns_with_text_left_out": self.left_out,
            "findings": list(self.findings),
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "shared_turns": self.shared_turns,
            "examples": [example.to_json() for example in self.examples],
            "raw": self.raw,
        }


class RowViewer:
    """Reads rows of surveyed data again, and encodes them as training does, with their text."""

    def __init__(self, config: TrainConfig, tokenizer: Any, surveyed: SurveyedRows) -> None:
        self.surveyed = surveyed
        self._config = config
        self._pipeline = Pipeline.from_config(config, tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = frozenset(token_id for token_id, token in added if token.content.strip())

    def read(self, selection: Selection) -> Iterator[ShownRow]:
        """The selected rows, in their order; reading ends with the last of them."""
        left, first = len(selection), 0
        for index, source in enumerate(self.surveyed.sources):
            end = first + source.rows
            wanted = any(first <= key < end if isinstance(key, int) else key[0] == index for key in selection)
            rows = self.surveyed.located[index].rows() if left and wanted else ()
            for number, row in enumerate(rows, first):
                if number in selection or (index, _origin(row)) in selection:
                    left -= 1
                    yield self._shown(number, source, row)
                    if not left:
                        return
            first = end

    def _shown(self, number: int, source: SourceReport, row: Row | UserError) -> ShownRow:
        surveyed, origin = self.surveyed, _origin(row)
        part, indices = surveyed.examples_of(number)
        note = surveyed.notes.get(origin)
        fate: Fate = note.fate if note else "kept"
        examples, signs = ([], frozenset[str]()) if fate == "bad" else self._examples(row, source)
        return ShownRow(
            origin,
            source.name,
            part,
            fate,
            note.reason if note else "",
            note.hint if note else "",
            tuple(sign for sign in SIGNS if sign in signs),
            next(filter(None, (surveyed.duplicate_of(part, index) for index in indices)), None),
            sum(int(surveyed.parts[part].fact("turns_with_text_left_out")[index]) for index in indices),
            tuple(name for name in FINDINGS if indices and surveyed.found(part, name)[indices].any()),
            examples,
            raw_json(row.value) if isinstance(row, Row) else "",
        )

    def _examples(self, row: Row | UserError, source: SourceReport) -> tuple[list[ShownExample], frozenset[str]]:
        """The examples of a row and its signs; none where it cannot be read or encoded."""
        pipeline = self._pipeline
        try:
            if isinstance(row, UserError):
                raise row
            reading = replace(RowReader.from_config(self._config), format=source.format or "auto").reading(row)
            items = items_of(reading.taken())
            given = [pipeline.encoder.given_to_template(i) if isinstance(i, Conversation) else i for i in items]
            names = reading.row_format.compares or [_label(item) for item in items]
            views = [
                (item, view, name)
                for item, name in zip(given, names, strict=True)
                for whole in pipeline.encoder.view(item)
                for view in self._pieces(whole)
            ]
        except UserError:
            return [], frozenset()
        shown = [
            ShownExample.of(view, item, self._special_ids, self._config.max_length, name) for item, view, name in views
        ]
        signs = pipeline.signs_of(reading.taken())
        conversations = (item for item in items if isinstance(item, Conversation))
        if pipeline.special_in_content == "keep" and any(pipeline.special.found_in(item) for item in conversations):
            signs |= {SPECIAL_SIGN}
        return shown, signs

    def _pieces(self, view: View) -> list[View]:
        """What training makes of an example that is too long."""
        objective = self._pipeline.objective
        if self._config.overlong not in ("split", None) or (objective and objective.compares):
            return [view]
        return view.in_pieces(self._config.max_length)


def _label(item: Item) -> str:
    desirable = item.desirable if isinstance(item, Conversation) else None
    return "" if desirable is None else "desirable" if desirable else "undesirable"


def _origin(row: Row | UserError) -> str:
    return row.where if isinstance(row, UserError) else row.origin


def _turns(view: View, item: Item) -> Iterator[Turn]:
    no_message = "text" if isinstance(item, Document) else "tokens"
    roles = [str(message["role"]) for message in item.messages] if isinstance(item, Conversation) else []
    supervised, start = view.example.loss_weights != 0, 0
    for owner, tokens in groupby(view.token_to_message.tolist()):
        end = start + len(list(tokens))
        if owner < 0 and not start and isinstance(item, Conversation):
            owner = _system_at_start("".join(view.pieces[:end]), item)
        role = roles[owner] if 0 <= owner < len(roles) else "template" if roles else no_message
        yield Turn(owner if owner >= 0 else None, role, start, end, int(np.count_nonzero(supervised[start:end])))
        start = end


def _system_at_start(text: str, conversation: Conversation) -> int:
    """The first message where the template writes it outside its loop over messages, as many do with a system message."""
    first = conversation.messages[0]
    words = str(first.get("content") or "").strip()
    return 0 if first["role"] in ("system", "developer") and words and words in text else NOBODY


def raw_json(value: Any) -> str:
    """A row as JSON on one line, its long strings and lists shortened."""
    text = json.dumps(_shortened(value), ensure_ascii=False)
    return text if len(text) <= _LONGEST_RAW else f"{text[:_LONGEST_RAW]}…"


def _shortened(value: Any) -> Any:
    if isinstance(value, str) and len(value) > _LONGEST_STRING:
        return f"{value[:_LONGEST_STRING]}… (and {len(value) - _LONGEST_STRING:,} characters more)"
    if isinstance(value, dict):
        return {str(key)[:_LONGEST_STRING]: _shortened(item) for key, item in list(value.items())[:_MOST_ITEMS]}
    if isinstance(value, list):
        more = [f"… (and {len(value) - _MOST_ITEMS:,} more)"] if len(value) > _MOST_ITEMS else []
        return [_shortened(item) for item in value[:_MOST_ITEMS]] + more
    return value
