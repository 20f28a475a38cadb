"""A row beside the clean row that was made of it: what is different, in a few words each, which are counted over rows.

Nothing here knows how a format is read: a message is cleaned again by itself, and its keys are compared with those that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain
from typing import Any

from mlx_sft.data.conversation import Conversation, Item
from mlx_sft.data.formats import pairs
from mlx_sft.data.json_text import kind, parse_json
from mlx_sft.data.keys import Reading
from mlx_sft.data.messages import REASONING_KEYS, WEIGHT_KEYS, Message, read_messages, shown
from mlx_sft.data.tool_calls import ARGUMENT_KEYS, SCHEMA_KEYS

Clean = Callable[[list[Message]], list[Message]]
"""Messages as they were read → as they are written."""

_STANDARD = {
    "from": "role",
    "value": "content",
    "function_call": "tool_calls",
    "functions": "tools",
    **dict.fromkeys(REASONING_KEYS, REASONING_KEYS[0]),
    **dict.fromkeys(WEIGHT_KEYS, "weight"),
    **dict.fromkeys(ARGUMENT_KEYS, ARGUMENT_KEYS[0]),
    **dict.fromkeys(SCHEMA_KEYS, "parameters"),
    **{key: written for keys in pairs.SCORES for key, written in zip(keys, pairs.SCORES[0], strict=True)},
}
"""Other names of keys → those under which they are written."""
_MESSAGES = "messages"
_PARTS = ("prompt", *pairs.NAMES)
"""The lists of messages of a clean pair."""
_LISTS_OF_PAIRS = ("conversations", _MESSAGES, *_PARTS)
_SCORES = frozenset(chain(*pairs.SCORES))
_OWNERS = {"tool_calls": "call", "tools": "tool"}
"""Keys of lists whose items are compared by their own keys, and what one is called."""
_LISTS = (_MESSAGES, *_OWNERS)
_OTHERWISE = "written otherwise"


def changes(reading: Reading, item: Item, clean_row: Mapping[str, Any], format_name: str, clean: Clean) -> list[str]:
    """What is different in a clean row: a list with each change as often as it was made, empty for rows that are equal.

    Args:
        reading: Of the row; its item, or the first of those that are compared, is `item`.
        clean_row: What is written, a row of the format of this name.
        clean: Cleans messages as those of this row were cleaned.
    """
    row = dict(dict.items(reading.row))
    if row == clean_row and not reading.columns:
        return []
    found = [f"column {shown(column)} → {key}" for key, column in reading.columns.items()]
    if reading.row_format.name != format_name:
        found.append(f"format {reading.row_format.name} → {format_name}")
    read = set(reading.row.asked) - _SCORES if isinstance(item, Conversation) else set()
    place = _MESSAGES if _MESSAGES in clean_row else _PARTS[0]
    found += _differences("row", row, clean_row, {key: f"{key} → {place}" for key in read})
    if isinstance(item, Conversation):
        keys = reading.row_format.keys if place == _MESSAGES else sorted(read.intersection(_LISTS_OF_PAIRS))
        lists = [_messages_in(row.get(key)) for key in keys]
        made = [(raw, clean(messages)) for one in lists for raw, messages in one]
        for raw, messages in made:
            found += _of_message(raw, messages)
        if all(lists) and place == _MESSAGES:
            found += _of_turns([one["role"] for _, messages in made for one in messages], clean_row[_MESSAGES])
        context = clean_row.get(_MESSAGES, [])[: item.first_supervised]
        found += ["weight 0 added to an answer in a prompt" for one in context if one["role"] == "assistant"]
    return found or [_OTHERWISE]


def _of_message(raw: Message, made: list[Message]) -> Iterator[str]:
    if len(made) > 1 or ("tool_call_id" in made[0] and "tool_call_id" not in raw):
        yield from ["message: tool_result in content → message of the tool" for one in made if one["role"] == "tool"]
        return
    found = [key for key in ("tool_calls", REASONING_KEYS[0]) if key in made[0] and not _has(raw, key)]
    yield from (f"message: content → {key}" for key in found)
    yield from _differences("message", raw, made[0], dict.fromkeys(("content", "value"), "") if found else {}, found)


def _has(raw: Message, standard: str) -> bool:
    return any(_value(value) for key, value in raw.items() if _STANDARD.get(key, key) == standard)


def _of_turns(roles: list[str], written: list[Message]) -> list[str]:
    """Messages that became one, of those with these roles before."""
    system_added = written[0]["role"] == "system" and roles[0] not in ("system", "developer")
    return ["assistant messages in a row → one"] * (len(roles) + system_added - len(written))


def _messages_in(value: Any) -> list[tuple[Message, list[Message]]]:
    """Each message in a part of a row that is one or a list of them, or JSON text of that, and what its reader makes of it by itself."""
    found = _value(value)
    found = [found] if isinstance(found, dict) else found
    try:
        return [(raw, read_messages([raw], "")) for raw in found] if isinstance(found, list) else []
    except ValueError:  # a list of something else, such as tools
        return []


def _differences(
    owner: str, raw: Mapping[str, Any], made: Mapping[str, Any], moved: Mapping[str, str], told: Collection[str] = ()
) -> Iterator[str]:
    """What is different in an object, key by key.

    Args:
        moved: Keys that are not left out where they are gone, and what is said of them.
        told: New keys of which it has been said where they come from.
    """
    given = {key: value for key, value in raw.items() if value is not None}
    standard = {key: _STANDARD.get(key, key) for key in given}
    names = {key: key if key in made or name in given else name for key, name in standard.items()}
    for key, value in given.items():
        name = names[key]
        if name not in made:
            is_empty = _value(value) in ("", [], {})
            said = moved[key] if key in moved and not is_empty else f"{'empty ' if is_empty else ''}{key} left out"
            yield from [f"{owner}: {said}"] if said else []
            continue
        if name != key:
            yield f"{owner}: {key} → {name}"
        if name in _LISTS and isinstance(value, str):
            yield f"{owner}: {name} JSON text → a list"
        if name in _OWNERS:
            yield from _inside(_OWNERS[name], value, made[name])
        elif name in _LISTS_OF_PAIRS and isinstance(_value(value), list):
            continue  # message by message
        elif name != _MESSAGES and value != made[name] and (name == key or name != "weight"):
            yield f"{owner}: {name} {_change(name, value, made[name])}"
    new = [key for key in made if key not in {*names.values(), *told, _MESSAGES}]
    if "function" in new:
        yield f"{owner}: wrapped in function"
        new = [key for key in new if key not in ("function", "type")]
    yield from (f"{owner}: {key} {'{} ' if made[key] == {} else ''}added" for key in new)
    yield from ["null left out" for key in raw.keys() - given.keys() if key not in made]


def _change(name: str, value: Any, made: Any) -> str:
    if name == "role":
        return f"{value} → {made}"
    return f"{kind(value)} → {kind(made)}" if kind(value) != kind(made) else _OTHERWISE


def _inside(owner: str, value: Any, made: list[dict[str, Any]]) -> Iterator[str]:
    """What is different in calls or tools."""
    items = _value(value)
    for one, other in zip(items if isinstance(items, list) else [items], made, strict=False):
        call = _value(one)
        if one != other and isinstance(call, dict):
            yield from _differences(owner, _flat(call), _flat(other), {})


def _flat(one: Mapping[str, Any]) -> dict[str, Any]:
    """A call or a tool with the keys that are inside of its `function` among its own."""
    function = _value(one.get("function"))
    return {**one, **function, "function": "around it"} if isinstance(function, dict) else dict(one)


def _value(value: Any) -> Any:
    """What JSON text holds, however often encoded; text of nothing and all other values as they are."""
    while isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError:
            return value
    return value
