"""Row → `Conversation`, `Document` or `Tokens`: which format the rows of a file have, and where a row keeps its parts."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mlx_sft.data.conversation import (
    ConsecutiveTurns,
    Conversation,
    Items,
    NoWeightError,
    items_of,
    labelled,
    weighed,
    with_turns,
)
from mlx_sft.data.formats import RowFormat
from mlx_sft.data.json_text import parse_json
from mlx_sft.data.keys import LABELS, LeftOut, Reading, how_to_compare, label_of
from mlx_sft.data.messages import (
    REASONING_KEYS,
    ROLES,
    WEIGHT_KEYS,
    UnknownRole,
    nearest,
    role_key,
    role_of,
    shown,
    weight_in_cell,
    weight_said,
)
from mlx_sft.data.readers import Row
from mlx_sft.data.written import WatchedRow
from mlx_sft.errors import USAGE, UserError
from mlx_sft.registry import FORMATS, OBJECTIVES

if TYPE_CHECKING:
    from mlx_sft.config import TrainConfig

_ALIASES = {"user": "prompt", "assistant": "completion"}
"""What `--columns` may call a key besides its own name."""


def _formats(*, compares: bool = True) -> list[RowFormat]:
    """All formats, or those alone whose rows are not made to be compared."""
    return [row_format for _, row_format in FORMATS.items() if compares or not row_format.compares]


def _parts() -> dict[str, str]:
    """What `--columns` may name → the key that it stands for."""
    keys = (key for row_format in _formats() for key in (*row_format.keys, *row_format.optional))
    return _ALIASES | {key: key for key in (*keys, *WEIGHT_KEYS, *LABELS)}


class MixedFormats(UserError):
    """A row of another format than the first row of its file."""


@dataclass(frozen=True, slots=True)
class RowReader:
    """Reads the rows of one file, which are all of one format. It can be pickled.

    Args:
        format: The format's name, or `auto`: that of the first row.
        columns: Where a row keeps its parts: `{"user": "question", "assistant": "answer"}`, or a format's own keys under other
            names, `{"messages": "dialogue"}`.
        consecutive_turns: What becomes of assistant turns in a row.
        roles: What the data's own names of roles stand for: `{"narrator": "system", "hero": "assistant"}`.
        compares: Whether the objective compares the texts of a row; else no row is told to be of a format that is made for that.
        labelled: Whether it asks for the label of a row's answer.

    Raises:
        UserError: for a format, a part or a role that does not exist.
    """

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    consecutive_turns: ConsecutiveTurns = "keep"
    roles: Mapping[str, str] = field(default_factory=dict)
    compares: bool = False
    labelled: bool = False
    _first: tuple[RowFormat, str] | None = None
    """The settled format, and the origin of the row that settled it."""

    def __post_init__(self) -> None:
        check_roles(self.roles)
        if self.format != "auto" and self.format not in FORMATS:
            known = ", ".join(("auto", *FORMATS.names()))
            hint = nearest(self.format, FORMATS.names()) or f"known are {known}"
            raise UserError(f"no format is named {shown(self.format)}", where="format", hint=hint, exit_code=USAGE)
        parts = _parts() if self.columns else {}
        for part in self.columns:
            if part not in parts:
                hint = nearest(part, parts) or f"parts are {', '.join(parts)}"
                raise UserError(f"no part of a row is named {shown(part)}", where="columns", hint=hint, exit_code=USAGE)
        keys = [parts[part] for part in self.columns]
        if len(set(keys)) < len(keys):
            hint = "user is the same as prompt, and assistant the same as completion"
            raise UserError("a part of a row is named twice", where="columns", hint=hint, exit_code=USAGE)

    @classmethod
    def from_config(cls, config: TrainConfig) -> RowReader:
        kind = OBJECTIVES[config.objective]
        return cls(config.format, config.columns, config.consecutive_turns, config.roles, kind.compares, kind.labelled)

    @property
    def settled(self) -> RowFormat | None:
        """The format that all rows have, once it is settled."""
        if self._first:
            return self._first[0]
        return None if self.format == "auto" else FORMATS[self.format]

    @property
    def format_name(self) -> str | None:
        """The name of that format."""
        return self.settled.name if self.settled else None

    def settled_by(self, row: Row) -> RowReader:
        """A reader for rows of this row's format only.

        Raises:
            UserError: for a row of no known format, which settles nothing; with the exit code for wrong usage where a column
                that is asked for is not in it.
        """
        for column in self.columns.values():
            if column not in row.value:
                hint = nearest(column, row.value) or f"its columns are {_keys_shown(row.value)}"
                hint += "; a row that has none of it may say null"
                what = f"the first row has no column {shown(column)}"
                raise UserError(what, where=row.origin, hint=hint, exit_code=USAGE)
        return replace(self, _first=(self._format_of(self._renamed(row)), row.origin))

    def read(self, row: Row) -> Items:
        """The conversation, document or tokens in a row, or several of them.

        Raises:
            MixedFormats: for a row of another format than the row that settled this reader; naming both.
            UserError: naming the row's origin, what is wrong with it and what would be right.
        """
        return self.reading(row).taken()

    def reading(self, row: Row) -> Reading:
        """What is in a row, or why it cannot be read, with the keys that its format asked for.

        Raises:
            UserError: for a row of another format or of none, of which no key is read.
        """
        renamed = self._renamed(row)
        row_format = self._format_of(renamed)
        parts = _parts() if self.columns else {}
        columns = {parts[part]: column for part, column in self.columns.items()}
        watched = WatchedRow(with_roles(renamed.value, self.roles) if self.roles else renamed.value)
        reading = Reading(row.origin, watched, row_format, columns, row.value)
        try:
            read = row_format.read(Row(row.origin, watched))
        except ValueError as error:
            names = [f"{key} is its column {shown(column)}" for key, column in columns.items()]
            role = [_role_hint(error.role)] if isinstance(error, UnknownRole) else []
            hint = "; ".join([*role, f"such a row is {row_format.example}", *names])
            kind = LeftOut if isinstance(error, NoWeightError) else UserError
            return replace(reading, error=kind(str(error), where=row.origin, hint=hint))
        try:
            weight = _weight_of(reading)
            turns = self.consecutive_turns
            joined = [with_turns(item, turns) if isinstance(item, Conversation) else item for item in items_of(read)]
            items = [weighed(item, weight) for item in joined]
            if self.labelled and (label := label_of(reading)) is not None:
                items = [labelled(item, label) for item in items]
            if not items:
                what = f"the format {row_format.name} finds no example in it"
                raise UserError(what, where=row.origin, hint=f"such a row is {row_format.example}")
        except UserError as error:
            return replace(reading, error=error)
        if isinstance(read, list):
            numbered = [replace(item, origin=f"{row.origin}#{number}") for number, item in enumerate(items, 1)]
            return replace(reading, items=numbered)
        return replace(reading, items=tuple(items) if isinstance(read, tuple) else items[0])

    def _renamed(self, row: Row) -> Row:
        """The row with its parts under the keys of the formats."""
        if not self.columns:
            return row
        keys = _parts()
        others = {key: value for key, value in row.value.items() if key not in self.columns.values()}
        parts = {keys[part]: row.value.get(column) for part, column in self.columns.items()}
        return Row(row.origin, others | parts)

    def _format_of(self, row: Row) -> RowFormat:
        present = {key for key, value in row.value.items() if value is not None}
        settled = self.settled
        if settled and present.issuperset(settled.keys):
            return settled
        if settled and self.format != "auto":
            missing = " and ".join(shown(key) for key in settled.keys if key not in present)
            what = f"not a row of the format {settled.name}: it has no {missing}"
            raise UserError(what, where=row.origin, hint=f"such a row is {settled.example}")
        found = self._told_by(present)
        if found is None:
            raise _unknown(row, self._told_by, compares=self.compares)
        if self._first:
            what = f"this row is {found.name}, where {self._first[1]} is {self._first[0].name}"
            hint = "put rows of one format into one file, and give both: --data a.jsonl --data b.jsonl"
            raise MixedFormats(what, where=row.origin, hint=hint)
        return found

    def _told_by(self, present: set[str]) -> RowFormat | None:
        """The first format whose keys are there; where columns name keys that tell a format, one that they tell."""
        formats, parts = _formats(compares=self.compares), _parts() if self.columns else {}
        named = {parts[part] for part in self.columns} & {key for row_format in formats for key in row_format.keys}
        told = (f for f in formats if present.issuperset(f.keys) and (not named or named.intersection(f.keys)))
        return next(told, None)


def _role_hint(role: Any) -> str:
    """What to type so that a name is taken for a role."""
    plain = isinstance(role, str) and role.isprintable() and len(role) <= 30 and not {",", "=", " "} & set(role)
    return f"say which role it is: --roles {role if plain else 'narrator'}=system (or user, assistant, tool)"


def _weight_of(reading: Reading) -> float:
    """The weight that a row has as a whole, under the `WEIGHT_KEYS` that its format does not read itself.

    Raises:
        UserError: for a value that is none; `LeftOut` for a row that is not to be trained on.
    """
    row = reading.row
    said = {key: row.get(key) for key in WEIGHT_KEYS if key not in row.asked}
    said = {key: value for key, one in said.items() if (value := weight_in_cell(key, one)) is not None}
    try:
        weight = weight_said(said, "the row")
    except ValueError as error:
        hint = (
            "it is how much the whole row counts in the loss; where it means something else, rename it or take it out"
        )
        raise UserError(str(error), where=reading.origin, hint=hint) from None
    if weight == 0:
        key, value = next(iter(said.items()))
        what = f"not to be trained on: its {reading.columns.get(key, key)} is {shown(value).lower()}"
        raise LeftOut(what, where=reading.origin, hint="take the key out of rows that are to be trained on")
    return 1.0 if weight is None else weight


def _unknown(row: Row, told_by: Callable[[set[str]], RowFormat | None], *, compares: bool) -> UserError:
    if {"role", "from"} & row.value.keys() and {"content", "value"} & row.value.keys():
        hint = 'put the messages of a conversation into one row: {"messages": [...]}'
        return UserError("a message where a row should be", where=row.origin, hint=hint)
    # A row that says something itself, as one of SQuAD with its answers, is no object of rows.
    says = any(isinstance(item, str) and key != "version" for key, item in row.value.items())
    for key, item in row.value.items() if not says else ():
        first = item[0] if isinstance(item, list) and item else item
        if isinstance(first, dict) and told_by(set(first)):
            what = f"an object with rows inside of it, under {shown(key)}, where a row should be"
            return UserError(what, where=row.origin, hint="make the rows the file's own list, or write one a line")
    kind = "a row without a known format"
    is_preference = not compares and any(map(_is_rejected, row.value))
    if is_preference:
        kind = "a row of preferences, of which only the chosen answer can be trained on"
    what = f"{kind}: {'it has ' + _keys_shown(row.value) if row.value else 'it is empty'}"
    known = [row_format.example for row_format in _formats() if bool(row_format.compares) == compares]
    hint = f"a row is one of {', '.join(known)}" if len(known) > 1 else f"such a row is {known[0]}"
    if any(key.endswith((".", "?", "!")) for key in row.value):
        hint = "where a table's first line is a row already, put the names of its columns before it: question,answer"
    elif columns := _columns_of_pair(row.value) if compares else _columns_for(row.value):
        way = "train on the chosen answers alone" if is_preference else "say where its parts are"
        hint = f"{way}: --columns {shlex.quote(columns)}"
    if is_preference and (compared := how_to_compare()):
        hint = f"{compared}; {hint}"
    return UserError(what, where=row.origin, hint=hint)


def _keys_shown(value: dict[str, Any]) -> str:
    names = [f"{shown(key)} (null)" if item is None else shown(key) for key, item in value.items()]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


_ASKED = ("question", "query", "instruction", "prompt", "input", "problem", "user", "human")
_ANSWERED = ("answer", "response", "output", "completion", "chosen", "solution", "assistant", "gpt", "model_answer")
_ASKED_ABOUT = ("context", "passage", "document")
_REASONED = (*REASONING_KEYS, "complex_cot", "cot", "chain_of_thought", "rationale", "model_reasoning")
_WRITTEN = ("text", "content", "document", "article", "story", "passage", "body")


def _columns_for(value: dict[str, Any]) -> str:
    """The columns that a row of no known format seems to mean; empty where nothing is like one."""
    conversations = {key: item for key, item in value.items() if _is_conversation(item) and not _is_rejected(key)}
    chosen = conversations.get("chosen", [])
    if len(chosen) == 1 and "prompt" in value:
        return "user=prompt,assistant=chosen"
    for key in ("chosen", *conversations) if chosen else conversations:
        if key.isprintable() and len(key) <= 100:
            return f"messages={key}"
    lower = {key.lower(): key for key, item in value.items() if isinstance(item, str)}
    asked, answered, about, reasoned, text = (
        next((lower[name] for name in names if name in lower), "")
        for names in (_ASKED, _ANSWERED, _ASKED_ABOUT, _REASONED, _WRITTEN)
    )
    if not (asked and answered):
        return f"text={text}" if text else _columns_of_two(lower, asked, answered)
    parts = {"user": asked, "assistant": answered}
    if asked.lower() == "instruction":
        parts = {"instruction": asked, "output": answered, **({"input": about} if about else {})}
    elif about:
        parts = {"instruction": about, "input": asked, "output": answered}
    if reasoned and reasoned not in REASONING_KEYS:
        parts["reasoning"] = reasoned
    if "system_prompt" in lower:
        parts["system"] = lower["system_prompt"]
    return ",".join(f"{part}={column}" for part, column in parts.items() if part in _ALIASES or part != column)


def _columns_of_two(texts: dict[str, str], asked: str, answered: str) -> str:
    """The columns of a row of two texts, of which one at most is called as usual: the first is what is asked, where nothing tells."""
    names = [key for key in texts.values() if re.fullmatch(r"(?!rejected)[^=,]{1,100}", key) and key.isprintable()]
    if not len(names) == len(texts) == 2:
        return ""
    first, second = reversed(names) if names[1] == asked or names[0] == answered else names
    return f"user={first},assistant={second}"


def _columns_of_pair(value: dict[str, Any]) -> str:
    """The columns of the answers in a row of no known format, such as `chosen_response` and `rejected_response`; empty without such."""
    keys = [key for key, item in value.items() if isinstance(item, str | list | dict) and isinstance(key, str)]
    texts = [key for key in keys if re.fullmatch(r"\w{1,100}", key) and not key.endswith("model")]
    found = {name: [key for key in texts if name in key.lower().split("_")] for name in ("chosen", "rejected")}
    if any(len(keys) != 1 for keys in found.values()):
        return ""
    return ",".join(f"{name}={key}" for name, (key,) in found.items() if name != key)


def _is_rejected(key: str) -> bool:
    """Whether it holds the worse answer of a preference: `rejected`, `rejected_messages`."""
    return key.startswith("rejected")


def _is_conversation(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and bool({"role", "from"} & first.keys() and {"content", "value"} & first.keys())


# The names that a data set has for roles → those that every reader of messages knows. A row's messages are given their roles before its
# format reads it, so that this holds for every format, and for no message that a format itself makes of a text.

TARGETS = (*ROLES, "function_call")
"""What a name may stand for."""


def check_roles(roles: Mapping[str, str]) -> None:
    """Raise `UserError` where names stand for a role that there is not, or two of them are one name."""
    for name, role in roles.items():
        if role not in TARGETS:
            hint = nearest(role, TARGETS) or f"roles are {', '.join(TARGETS)}"
            what = f"{shown(name)} cannot be {shown(role)}, which is no role"
            raise UserError(what, where="roles", hint=hint, exit_code=USAGE)
    if len({role_key(name) for name in roles}) < len(roles):
        raise UserError(
            "a role is named twice", where="roles", hint="upper and lower case are one name", exit_code=USAGE
        )


def with_roles(row: dict[str, Any], roles: Mapping[str, str]) -> dict[str, Any]:
    """A row whose messages, in lists of them, alone or as JSON text, have the roles for which their names stand."""
    by_key = {role_key(name): role for name, role in roles.items()}
    return {key: _with_roles(value, by_key) for key, value in row.items()}


def _with_roles(value: Any, roles: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_with_role(one, roles) for one in value]
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", '"'):
        return _with_role(value, roles)
    try:
        parsed = parse_json(value)
    except ValueError:
        return value
    renamed = _with_roles(parsed, roles)
    return value if renamed == parsed else json.dumps(renamed, ensure_ascii=False)


def _with_role(value: Any, roles: Mapping[str, str]) -> Any:
    if not isinstance(value, dict):
        return value
    key = "from" if value.get("role") is None else "role"
    name = value.get(key)
    role = roles.get(role_key(name)) if isinstance(name, str) else None
    return value | {key: role} if role else value


def changed_names(roles: Mapping[str, str]) -> list[str]:
    """Of the names those that mean another role where nothing is said: a sentence each, for a person."""
    return [
        f"messages of {shown(name)} are read as {role}, by --roles; otherwise they would be {known}"
        for name, role in roles.items()
        if (known := role_of(name)) and known != role
    ]
