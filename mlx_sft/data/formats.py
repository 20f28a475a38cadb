"""Row → `Conversation`, `Document` or `Tokens`: which shape the rows of a file have, and where a row keeps its parts.

Knows how a shape is told; knows nothing of files, templates or tokenizers. What a shape holds is `shapes`', and what is inside
of messages is `messages`'.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_sft.data.messages import REASONING_KEYS, nearest, shown, take_weights
from mlx_sft.data.readers import Row
from mlx_sft.data.row_formats import SHAPES, Conversation, Document, Item, Shape, Tokens
from mlx_sft.errors import USAGE, UserError

__all__ = [
    "REASONING_KEYS",
    "SHAPES",
    "Conversation",
    "Document",
    "Item",
    "MixedShapes",
    "RowReader",
    "Tokens",
    "take_weights",
]

_BY_NAME = {shape.name: shape for shape in SHAPES}
_PARTS = {"user": "prompt", "assistant": "completion"} | {
    key: key for shape in SHAPES for key in (*shape.keys, *shape.optional)
}
"""What `--columns` may name → the key that it stands for."""


class MixedShapes(UserError):
    """A row of another shape than the first row of its file."""


@dataclass(frozen=True, slots=True)
class RowReader:
    """Reads the rows of one file, which are all of one shape. It can be pickled.

    Args:
        format: The shape's name, or `auto`: that of the first row.
        columns: Where a row keeps its parts: `{"user": "question", "assistant": "answer"}`, or a shape's own keys under other
            names, `{"messages": "dialogue"}`.

    Raises:
        UserError: for a format or a part that does not exist.
    """

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    _first: tuple[str, str] | None = None
    """The settled shape, and the origin of the row that settled it."""

    def __post_init__(self) -> None:
        if self.format != "auto" and self.format not in _BY_NAME:
            known = ", ".join(("auto", *_BY_NAME))
            hint = nearest(self.format, _BY_NAME) or f"known are {known}"
            raise UserError(f"no format is named {shown(self.format)}", where="format", hint=hint, exit_code=USAGE)
        for part in self.columns:
            if part not in _PARTS:
                hint = nearest(part, _PARTS) or f"parts are {', '.join(_PARTS)}"
                raise UserError(f"no part of a row is named {shown(part)}", where="columns", hint=hint, exit_code=USAGE)
        keys = [_PARTS[part] for part in self.columns]
        if len(set(keys)) < len(keys):
            hint = "user is the same as prompt, and assistant the same as completion"
            raise UserError("a part of a row is named twice", where="columns", hint=hint, exit_code=USAGE)

    @property
    def shape(self) -> str | None:
        """The name of the shape that all rows have, once it is settled."""
        if self._first:
            return self._first[0]
        return None if self.format == "auto" else self.format

    def settled_by(self, row: Row) -> RowReader:
        """A reader for rows of this row's shape only.

        Raises:
            UserError: for a row of no known shape, which settles nothing; with the exit code for wrong usage where a column
                that is asked for is not in it.
        """
        for column in self.columns.values():
            if column not in row.value:
                hint = nearest(column, row.value) or f"its columns are {_keys_shown(row.value)}"
                hint += "; a row that has none of it may say null"
                what = f"the first row has no column {shown(column)}"
                raise UserError(what, where=row.origin, hint=hint, exit_code=USAGE)
        return replace(self, _first=(self._shape_of(self._renamed(row)).name, row.origin))

    def read(self, row: Row) -> Item:
        """The conversation, document or tokens in a row.

        Raises:
            MixedShapes: for a row of another shape than the row that settled this reader; naming both.
            UserError: naming the row's origin, what is wrong with it and what would be right.
        """
        renamed = self._renamed(row)
        shape = self._shape_of(renamed)
        try:
            return shape.read(renamed)
        except ValueError as error:
            names = [f"{_PARTS[part]} is its column {shown(column)}" for part, column in self.columns.items()]
            hint = "; ".join([f"such a row is {shape.example}", *names])
            raise UserError(str(error), where=row.origin, hint=hint) from None

    def _renamed(self, row: Row) -> Row:
        """The row with its parts under the keys of the shapes."""
        if not self.columns:
            return row
        others = {key: value for key, value in row.value.items() if key not in self.columns.values()}
        parts = {_PARTS[part]: row.value.get(column) for part, column in self.columns.items()}
        return Row(row.origin, others | parts)

    def _shape_of(self, row: Row) -> Shape:
        present = {key for key, value in row.value.items() if value is not None}
        found = self._told_by(present)
        if self.shape is None:
            if found is None:
                raise _unknown(row)
            return found
        settled = _BY_NAME[self.shape]
        if present.issuperset(settled.keys):
            return settled
        if self.format != "auto":
            missing = " and ".join(shown(key) for key in settled.keys if key not in present)
            what = f"not a row of the format {settled.name}: it has no {missing}"
            raise UserError(what, where=row.origin, hint=f"such a row is {settled.example}")
        if found is None or self._first is None:
            raise _unknown(row)
        raise MixedShapes(
            f"this row is {found.name}, where {self._first[1]} is {settled.name}",
            where=row.origin,
            hint="put rows of one shape into one file, and give both: --data a.jsonl --data b.jsonl",
        )

    def _told_by(self, present: set[str]) -> Shape | None:
        """The first shape whose keys are there; where columns name keys that tell a shape, one that they tell."""
        named = {_PARTS[part] for part in self.columns} & {key for shape in SHAPES for key in shape.keys}
        told = (s for s in SHAPES if present.issuperset(s.keys) and (not named or named.intersection(s.keys)))
        return next(told, None)


def _unknown(row: Row) -> UserError:
    is_preference = {"chosen", "rejected"} <= row.value.keys()
    kind = (
        "a row of preferences, of which only the chosen answer can be learnt"
        if is_preference
        else "a row without a known shape"
    )
    what = f"{kind}: {'it has ' + _keys_shown(row.value) if row.value else 'it is empty'}"
    hint = "a row is one of " + ", ".join(shape.example for shape in SHAPES)
    columns = _columns_for(row.value)
    return UserError(
        what, where=row.origin, hint=f"say where its parts are: --columns {columns}; {hint}" if columns else hint
    )


def _keys_shown(value: dict[str, Any]) -> str:
    names = [f"{shown(key)} (null)" if item is None else shown(key) for key, item in value.items()]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


_ASKED = ("question", "query", "instruction", "prompt", "input", "problem", "user", "human")
_ANSWERED = ("answer", "response", "output", "completion", "chosen", "solution", "assistant", "gpt")
_WRITTEN = ("text", "content", "document", "article", "story", "passage", "body")


def _columns_for(value: dict[str, Any]) -> str:
    """The columns that a row of no known shape seems to mean; empty where nothing is like one."""
    conversations = {key: item for key, item in value.items() if _is_conversation(item)}
    chosen = conversations.get("chosen", [])
    if len(chosen) == 1 and "prompt" in value:
        return "user=prompt,assistant=chosen"
    for key in ("chosen", *conversations) if chosen else conversations:
        if key.isprintable() and len(key) <= 100:
            return f"messages={key}"
    lower = {key.lower(): key for key, item in value.items() if isinstance(item, str)}
    asked, answered, text = (
        next((lower[name] for name in names if name in lower), "") for names in (_ASKED, _ANSWERED, _WRITTEN)
    )
    if not (asked and answered):
        return f"text={text}" if text else ""
    is_alpaca = asked.lower() == "instruction"
    parts = {"instruction": asked, "output": answered} if is_alpaca else {"user": asked, "assistant": answered}
    if is_alpaca and "context" in lower:
        parts["input"] = lower["context"]
    if "system_prompt" in lower:
        parts["system"] = lower["system_prompt"]
    return ",".join(f"{part}={column}" for part, column in parts.items() if part != column)


def _is_conversation(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and bool({"role", "from"} & first.keys() and {"content", "value"} & first.keys())
