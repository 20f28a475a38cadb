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
from mlx_sft.data.json_text import is_blank
from mlx_sft.data.key_counts import KeyUse, Owner
from mlx_sft.data.messages import REASONING_KEYS, WEIGHT_KEYS, Message, shown
from mlx_sft.data.sandbox import parsed
from mlx_sft.data.written import WatchedRow, Written
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
"""What keys begin with that hold the answers of a preference: also `rejected_response`, `rejected_messages`, `chosen_messages`."""
LABELS = ("label", "kto_tag")
"""They say whether an answer is a good one: TRL's, and LLaMA-Factory's."""
_TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""What a label may be written as; in the cells of tables it is a number, or a text."""
_MEANINGS: dict[Owner, dict[str, str]] = {
    "message": dict.fromkeys(("mask", "ignore"), "masked")
    | dict.fromkeys(("trainable", "train_on_turn", "train_detail", "supervised"), "train")
    | dict.fromkeys(("thought", "thoughts", "cot", "reasoning_details"), REASONING_KEYS[0]),
    "row": dict.fromkeys(("system_prompt", "system_message", "sys"), "system")
    | dict.fromkeys(("available_tools", "tool_definitions", "tools_json"), "tools")
    | dict.fromkeys(("enable_thinking", "template_kwargs"), "chat_template_kwargs")
    | dict.fromkeys(("cot", "thought", "rationale"), REASONING_KEYS[0]),
}
"""What other programs call a key that is read here."""
_LIKENESS = 0.82
"""Of `difflib`'s ratio: in a word of six letters, one is wrong. `wieght` is 0.83 like `weight`, and `reason` 0.80 like `reasoning`."""
_LONGEST_NAME = 100


class LeftOut(UserError):
    """A row that says itself that it is not to be trained on, as a whole or turn by turn."""


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
        meant = [
            key
            for key, value in self.present()
            if not is_blank(value)
            # A figure, as `chosen_score` is one, stands beside answers and is none.
            and (key in (*_PREFERENCES, *LABELS) or (_is_preference(key) and not isinstance(value, int | float)))
        ]
        if not meant or self.row_format.compares:
            return []  # beside two answers, one of which is called the better, such a key has nothing to add
        declared = {*self.row_format.keys, *self.row_format.optional}
        unread = [key for key in meant if key not in self.row.asked and key not in declared]
        chosen_by_hand = any(map(_is_preference, self.columns.values()))
        refused = [] if chosen_by_hand else sorted(filter(_is_preference, unread))
        is_conversation = self.items and any(isinstance(item, Conversation) for item in items_of(self.items))
        labels = [key for key in unread if key in LABELS] if refused or is_conversation else []
        return [*refused, *labels]

    def _refusal(self, refused: list[str]) -> UserError:
        way_out = "take out the rows that are not to be trained on, and then the key"
        names = " and ".join(f"`{_named(key)}`" for key in refused if _is_preference(key))
        if not names:
            what = (
                f"a row with a `{refused[0]}`, which nothing reads: its answer would be trained on, whatever that says"
            )
            by_sft = f"--objective sft trains on all rows: {way_out}"
            return UserError(what, where=self.origin, hint="; ".join(filter(None, (how_to_label(), by_sft))))
        what = f"a row of preferences, by its {names}: what it has besides would be trained on, and nothing compared"
        # LLaMA-Factory's: one message, behind those of another key.
        is_one = isinstance(self.value.get("chosen"), dict) and self.row_format.name == "sharegpt"
        columns = "user=conversations,assistant=chosen" if is_one else "messages=chosen"
        by_hand = f"to train on one of the answers alone, name it, as in --columns {columns}"
        return UserError(what, where=self.origin, hint="; ".join(filter(None, (how_to_compare(), by_hand))))

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
        if isinstance(reading.error, LeftOut):
            return [self._of_row(reading, key, value, refused) for key, value in reading.value.items()]
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

    def without_unread(self, message: Message) -> Message:
        """A message with only those keys, also of its calls, that something reads, and its reasoning under the standard name.

        A template is given the reasoning as `reasoning_content` and as `thinking`, whatever it is called; another of its names stays
        beside these only where the template reads it, and would find something else.
        """
        reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
        kept = {key: item for key, item in message.items() if self._reads("message", key)}
        for key in REASONING_KEYS:
            if key in kept and (key not in self.of_template or (key == "thinking" and kept[key] == reasoning)):
                del kept[key]
        if reasoning is not None:
            kept[REASONING_KEYS[0]] = reasoning
        if "tool_calls" in kept:
            kept["tool_calls"] = list(map(self._read_of_call, kept["tool_calls"]))
        return kept

    def _read_of_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        read = {key: item for key, item in call.items() if self._reads("call", key)}
        return read | {"function": {key: item for key, item in call["function"].items() if self._reads("call", key)}}

    def _reads(self, owner: Owner, key: str) -> bool:
        """Whether training or the template reads the key of a message, or of a call."""
        return key in _KNOWN[owner] or key in self.of_template or owner in self.whole

    def _judged(self, reading: Reading, refused: Collection[str]) -> Iterator[tuple[str, KeyUse]]:
        """Each key, and where it stands."""
        for key, value in reading.value.items():
            yield "the row", self._of_row(reading, key, value, refused)
        for holder, part in reading.row.parts:
            for key, value in dict.items(part):
                yield f"an object under {holder}", self._of_part(holder, part, key, value)
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
        known = (*reading.row_format.optional, *WEIGHT_KEYS)
        return self._unread("row", name, tuple(key for key in known if key not in present))

    def _of_part(self, holder: str, part: WatchedRow, key: str, value: Any) -> KeyUse:
        name = _named(f"{holder}.{key}")
        if value is None or key in part.asked:
            return KeyUse("row", name, "null" if value is None else "read")
        absent = tuple(sorted(one for one in part.asked if dict.get(part, one) is None))
        return self._unread("row", key, absent)._replace(key=name)

    def _of(self, one: Written, key: str, value: Any) -> KeyUse:
        if value is None:
            return KeyUse(one.of, _named(key), "null")
        if key in one.read or key in self.of_template or one.of in self.whole:
            return KeyUse(one.of, _named(key), "read")
        absent = tuple(name for name in _KNOWN[one.of] if is_blank(one.made.get(name)))
        return self._unread(one.of, _named(key), absent)

    def _unread(self, owner: Owner, key: str, absent: tuple[str, ...]) -> KeyUse:
        meaning = _MEANINGS.get(owner, {}).get(key, "")
        suggestion = typo_of(key, absent) or (meaning if meaning in absent else "")
        # A name of another program's is refused where a turn would be trained on that is not meant to be.
        is_wrong = suggestion and (suggestion != meaning or meaning in WEIGHT_KEYS)
        return KeyUse(owner, key, "refused" if is_wrong and not self.ignore_unknown else "unused", suggestion)


def label_of(reading: Reading) -> bool | None:
    """What the row says of its answer, under one of the `LABELS`; None where it says nothing.

    Raises:
        UserError: for a value that is neither true nor false.
    """
    said = {key: value for key in LABELS if (value := reading.row.get(key)) is not None}
    found = {_TRUTHS.get(str(value).strip().lower()) for value in said.values()}
    if None in found or len(found) > 1:
        shown_as = " and ".join(
            f"its {reading.columns.get(key, key)} is {shown(value).lower()}" for key, value in said.items()
        )
        hint = "write true for an answer that the model should give, and false for one that it should not"
        raise UserError(f"{shown_as}, where a label is true or false", where=reading.origin, hint=hint)
    return next(iter(found), None)


def how_to_compare() -> str:
    """What to type so that answers are compared; empty where no objective does."""
    asked = _objectives("compares")
    return f"{asked} compares the answers of rows that have a chosen and a rejected one" if asked else ""


def how_to_label() -> str:
    """What to type so that answers are trained towards or away from, as their labels say; empty where no objective does."""
    asked = _objectives("labelled")
    return f"{asked} learns from the labels of answers" if asked else ""


def _objectives(trait: str) -> str:
    return " or ".join(f"--objective {name}" for name, kind in OBJECTIVES.items() if getattr(kind, trait, False))


def _is_preference(key: Any) -> bool:
    return isinstance(key, str) and (key in _PREFERENCES or key.startswith(tuple(f"{name}_" for name in _PREFERENCES)))


def keys_of_bad_row(row: Mapping[str, Any]) -> list[KeyUse]:
    """What became of the keys of a row of another format, or of none."""
    return [KeyUse("row", _named(key), "bad") for key in row]


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
