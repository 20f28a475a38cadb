"""Which keys of a row were read, which mean something that training would not do, and which nothing reads.

A row format reads a `WatchedRow`, so that its keys need not be declared to be counted; what a format declares as optional is what a
misspelt key may have been meant to be. A message's key is read by training, or by the chat template where that names it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError, nodes

from mlx_sft.data.conversation import Conversation, Items, items_of
from mlx_sft.data.formats import RowFormat
from mlx_sft.data.key_counts import KeyUse, Owner
from mlx_sft.data.messages import REASONING_KEYS, WEIGHT_KEYS, shown
from mlx_sft.data.sandbox import parsed
from mlx_sft.data.watched_row import WatchedRow
from mlx_sft.data.written import Written
from mlx_sft.errors import UserError
from mlx_sft.registry import OBJECTIVES

_KNOWN: dict[Owner, tuple[str, ...]] = {
    "message": ("tool_calls", "tool_call_id", *REASONING_KEYS, *WEIGHT_KEYS, "role", "content"),
    "call": ("id", "type", "function", "name", "arguments"),
    "part": ("id", "name", "input", "tool_use_id"),
    "tool": ("type", "function", "name", "description", "parameters"),
}
"""What a misspelt key may have been meant to be, where that is not there."""
_PREFERENCES = ("chosen", "rejected")
_LIKENESS = 0.82
"""Of `difflib`'s ratio: in a word of six letters, one is wrong. `wieght` is 0.83 like `weight`, and `reason` 0.80 like `reasoning`."""
_LONGEST_NAME = 100


@dataclass(frozen=True, slots=True)
class Reading:
    """What a row format made of a row, and what it asked for.

    Attributes:
        origin: The row's.
        row: Its value, as the format read it.
        row_format: The format.
        columns: The format's key → the column that the row has it in, as `--columns` says.
        value: The row as the person wrote it, under its own keys.
        items: What was made of it; None where that failed.
        error: Why it failed.
    """

    origin: str
    row: WatchedRow
    row_format: RowFormat
    columns: Mapping[str, str]
    value: Mapping[str, Any]
    items: Items | None = None
    error: UserError | None = None

    def taken(self) -> Items:
        """The items; raises the `UserError` for a row that is none, or that is meant for something else than its items say."""
        if refused := self.refused():
            raise self._refusal(refused)
        if self.error or self.items is None:
            raise self.error or UserError("nothing was read", where=self.origin)
        return self.items

    def refused(self) -> list[str]:
        """The keys that say that the row is a preference, or that its answer may be a bad one, where nothing reads them."""
        if not any(dict.get(self.row, key) is not None for key in (*_PREFERENCES, "label")):
            return []
        declared = {*self.row_format.keys, *self.row_format.optional}
        unread = {key for key, value in self.present() if not _is_blank(value)} - self.row.asked - declared
        chosen_by_hand = set(self.columns.values()) & set(_PREFERENCES)
        refused = [] if chosen_by_hand else [key for key in _PREFERENCES if key in unread]
        is_conversation = self.items and any(isinstance(item, Conversation) for item in items_of(self.items))
        return [*refused, "label"] if "label" in unread and (refused or is_conversation) else refused

    def _refusal(self, refused: list[str]) -> UserError:
        way_out = "take out the rows that are not to be trained on, and then the key"
        if refused == ["label"]:
            what = "a row with a `label`, which nothing reads: its answer would be trained on, whatever the label says"
            return UserError(what, where=self.origin, hint=f"--objective sft trains on all rows: {way_out}")
        names = " and ".join(f"`{key}`" for key in refused if key in _PREFERENCES)
        what = f"a row of preferences, by its {names}: what it has besides would be trained on, and nothing compared"
        compared = " or ".join(f"--objective {name}" for name in _comparing())
        hint = f"--objective sft trains on all rows, and compares none: {way_out}"
        if compared:
            hint = f"{compared} compares answers, in rows of a format that gives several"
        return UserError(what, where=self.origin, hint=f"{hint}; or name the answer, as in --columns messages=chosen")

    def present(self) -> Iterator[tuple[str, Any]]:
        """The row's keys that are not null."""
        return ((key, value) for key, value in dict.items(self.row) if value is not None)


@dataclass(frozen=True)
class KeyRules:
    """Judges the keys of rows. It can be pickled.

    Args:
        of_template: The names that the chat template reads in messages and calls.
        whole: What it may write with all that it has, `call` and `tool`.
        ignore_unknown: Whether a key that looks misspelt is only counted.
    """

    of_template: frozenset[str] = frozenset()
    whole: frozenset[str] = frozenset()
    ignore_unknown: bool = False

    @classmethod
    def of(cls, chat_template: Any, *, ignore_unknown: bool = False) -> KeyRules:
        """The rules for a tokenizer's chat template, or its several templates by name."""
        templates = chat_template.values() if isinstance(chat_template, dict) else [chat_template]
        sources = [source for source in templates if isinstance(source, str)]
        names = frozenset[str]().union(*map(names_in_template, sources))
        return cls(names, frozenset[str]().union(*map(written_whole, sources)), ignore_unknown)

    def uses(self, reading: Reading) -> list[KeyUse]:
        """What became of each key of a row and of the objects inside of it; of a row that could not be read, of its own keys alone."""
        refused = reading.refused()
        if reading.error:
            return [KeyUse("row", _named(key), "refused" if key in refused else "bad") for key in reading.value]
        return [use for _, use in self._judged(reading, refused)]

    def check(self, reading: Reading) -> None:
        """Raise `UserError` for a key that looks misspelt, unless that is let pass."""
        for place, use in self._judged(reading, []):
            if use.use == "refused":
                raise UserError(
                    f'{place} has the key {shown(use.key)}, which nothing reads; did you mean "{use.suggestion}"?',
                    where=reading.origin,
                    hint="write it so, or go on without what it says: --ignore-unknown-keys",
                )

    def _judged(self, reading: Reading, refused: Collection[str]) -> Iterator[tuple[str, KeyUse]]:
        """Each key, and where it stands."""
        for key, value in reading.value.items():
            yield "the row", self._of_row(reading, key, value, refused)
        counted: dict[str, list[Mapping[str, Any]]] = {}  # the texts of a preference have their prompt in common
        for one in reading.row.written:
            others = counted.setdefault(one.place, [])
            if not any(one.value is other or one.value == other for other in others):
                others.append(one.value)
                for key, value in one.value.items():
                    yield one.place, self._of(one, key, value)

    def _of_row(self, reading: Reading, column: str, value: Any, refused: Collection[str]) -> KeyUse:
        name, columns = _named(column), reading.columns
        if value is None:
            return KeyUse("row", name, "null")
        keys = [key for key, other in columns.items() if other == column]
        if not keys and column in columns:
            return KeyUse("row", name, "unused")  # another column is read in its place
        keys = keys or [column]
        if any(key in refused for key in keys):
            return KeyUse("row", name, "refused")
        if any(key in reading.row.asked for key in keys):
            return KeyUse("row", name, "read")
        present = {key for key, _ in reading.present()}
        return self._unread("row", name, tuple(key for key in reading.row_format.optional if key not in present))

    def _of(self, one: Written, key: str, value: Any) -> KeyUse:
        if value is None:
            return KeyUse(one.of, _named(key), "null")
        if key in one.read or key in self.of_template or one.of in self.whole:
            return KeyUse(one.of, _named(key), "read")
        return self._unread(
            one.of, _named(key), tuple(name for name in _KNOWN[one.of] if _is_blank(one.made.get(name)))
        )

    def _unread(self, owner: Owner, key: str, absent: tuple[str, ...]) -> KeyUse:
        suggestion = typo_of(key, absent)
        return KeyUse(owner, key, "refused" if suggestion and not self.ignore_unknown else "unused", suggestion)


def keys_of_bad_row(row: Mapping[str, Any]) -> list[KeyUse]:
    """What became of the keys of a row of another format, or of none."""
    return [KeyUse("row", _named(key), "bad") for key in row]


def _comparing() -> list[str]:
    return [name for name, objective in OBJECTIVES.items() if getattr(objective, "compares", False)]


def _is_blank(value: Any) -> bool:
    """Whether it is null, blank text, or empty: a table's cell that has to hold something, or arguments that were not found."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, list | dict) and not value)


def _named(key: Any) -> str:
    return str(key)[:_LONGEST_NAME]


@lru_cache(maxsize=4096)
def typo_of(key: str, known: tuple[str, ...]) -> str:
    """The known name of which this is a misspelling, one slip of the hand away; empty for another word.

        wieght → weight     tool → tools     chat_template_kwarg → chat_template_kwargs     Tools → tools
        topic, reason, story, text_id → none

    Args:
        known: Names that could be meant; those that stand there already are not among them.
    """
    name = key.lower().replace("-", "_").replace(" ", "_")
    if not 3 < len(name) <= _LONGEST_NAME:
        return ""
    alike = [other for other in known if other[0] == name[0] and abs(len(other) - len(name)) <= 1]
    if swapped := next((other for other in alike if sorted(other) == sorted(name)), ""):
        return swapped
    return next(iter(get_close_matches(name, alike, n=1, cutoff=_LIKENESS)), "")


NO_TEMPLATE = KeyRules()
"""The rules where no chat template is known."""


# What a chat template reads


@lru_cache(maxsize=16)
def names_in_template(source: str) -> frozenset[str]:
    """Every name that a template may read in an object: `message.name`, `message['name']`, `'name' in message`.

    Rather a name too many: a key that something may read is not called unused. Empty for what is no template.
    """
    tree = _tree(source)
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    strings = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(attributes | strings)


@lru_cache(maxsize=16)
def written_whole(source: str) -> frozenset[str]:
    """Which of `call` and `tool` a template may write with all that it has, as `tool_call | tojson` does.

    Rather one too many: where a template looks at tools and writes anything as JSON, that may be a tool.
    """
    tree = _tree(source)
    filters = [node for node in tree.find_all(nodes.Filter) if node.name == "tojson"]
    calls = any("call" in name or "function" in name for name in (_last_name(node.node) for node in filters))
    shown = [
        name.name for output in tree.find_all(nodes.Output) for name in output.nodes if isinstance(name, nodes.Name)
    ]
    looked_at = any(name.name == "tools" for name in tree.find_all(nodes.Name))
    tools = looked_at and (bool(filters) or any("tool" in name for name in shown))
    return frozenset({"call"} if calls else ()) | frozenset({"tool"} if tools else ())


def _last_name(node: nodes.Node | None) -> str:
    """`function` of `tool_call.function`, and of `message.tool_calls | map(attribute='function') | list`, `tool_calls`."""
    while isinstance(node, nodes.Filter):
        node = node.node
    if isinstance(node, nodes.Getitem):
        return str(node.arg.value) if isinstance(node.arg, nodes.Const) else ""
    return node.attr if isinstance(node, nodes.Getattr) else node.name if isinstance(node, nodes.Name) else ""


def _tree(source: str) -> nodes.Template:
    try:
        return parsed(source)
    except (TemplateError, UserError):
        return nodes.Template([], lineno=1)  # the encoder says what is wrong with it
