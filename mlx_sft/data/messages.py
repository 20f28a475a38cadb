"""Messages as people write them → as chat templates take them: roles, content, tool calls, weights.

Knows messages; knows nothing of rows and their shapes, of templates or tokens. What is wrong is a `ValueError` with a reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mlx_sft.data.content_parts import answers_apart, has_answers, read_parts, read_text, written_parts
from mlx_sft.data.json_text import kind, parsed
from mlx_sft.data.tool_calls import calls_in_content, read_call, read_calls, same_calls
from mlx_sft.data.written import Read, Written, place_of
from mlx_sft.errors import did_you_mean

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""The names under which a message's reasoning travels, the standard one first."""

_SWITCHES = {"train": True, "loss": True, "masked": False}
"""The names under which people say whether a message is supervised (`loss` is ms-swift's) → the value with which it is."""
_NUMBERS = ("weight", "loss_weight")
"""The names under which they say how much."""
WEIGHT_KEYS = (*_SWITCHES, *_NUMBERS)
"""What a message says of itself to training, and the chat template does not see; a row says it of all that it teaches."""

_CALL = "function_call"
_ROLE_NAMES = {name: name for name in ROLES} | {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "chatbot", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys((_CALL, "tool_call"), _CALL),
}
"""The names of roles in public data (ShareGPT, LLaMA-Factory, axolotl), lower case, `_` for `-`. `function_call` is an
assistant's turn that is a call."""
_OTHER_NAMES = {"role": "from", "content": "value"}
"""ShareGPT's names of what makes a message one."""
_READ = frozenset({"tool_calls", "tool_call_id", _CALL, *REASONING_KEYS, *WEIGHT_KEYS})
"""What else of a message is taken, whatever the chat template does."""
_HEAVIEST = 1e6


def read_messages(value: Any, name: str, places: Sequence[str] | None = None) -> list[Message]:
    """A list of messages, written with role and content or with from and value, or JSON text of it.

    A message that is a call by its role goes on with the assistant's turn before it, as in `assistant`, `tool_call`, `tool_call`.

    Args:
        name: The row's key, for errors.
        places: For messages that the row has otherwise, such as a question and its answer: the key that each was made of, for errors.
            Their own keys are none of the row's.

    Returns:
        Messages with one of the `ROLES`, content as text, no nulls, and otherwise what they had.

    Raises:
        ValueError: naming the place, such as `messages[2].content`.
    """
    value = parsed(value, name)
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, not {kind(value)}")
    if not value:
        raise ValueError(f"{name} is empty")
    if places is None:
        return _read_each((item, f"{name}[{index}]", True) for index, item in enumerate(value))
    return _read_each((item, place, False) for item, place in zip(value, places, strict=True))


def read_message(value: Any, name: str) -> list[Message]:
    """One message that stands under a key of its own, as `read_messages` reads each of a list."""
    return _read_each([(value, name, True)])


def _read_each(given: Iterable[tuple[Any, str, bool]]) -> list[Message]:
    """Messages, each with its place and whether its keys are the row's."""
    messages: list[Read] = []
    for item, place, is_written in given:
        for number, one in enumerate(_apart(item, place)):
            message, is_call = _message(one, place)
            if isinstance(item, Read):  # read before
                message.place, message.written = item.place, [] if number else item.written
            elif not number and is_written:
                message.written = [*_written(item, place, dict(message)), *message.written]
            goes_on = is_call and messages and messages[-1]["role"] == "assistant"
            whole = _one_turn(messages[-1], message) if goes_on else None
            if whole:
                messages[-1] = whole
            else:
                messages.append(message)
    return [*messages]


def joined(first: Message, second: Message) -> Message | None:
    """Two assistant messages as one; None where it would say something in another order, or another speaker's.

    A message's reasoning stands before its text and its calls behind it, wherever a template writes it. Texts are put a blank
    line apart.
    """
    said = [_said(message) for message in (first, second)]
    last_of_first = max((_ORDER.index(key) for key in said[0]), default=0)
    first_of_second = min((_ORDER.index(key) for key in said[1]), default=len(_ORDER))
    speakers = [message["name"] for message in (first, second) if "name" in message]
    if last_of_first > first_of_second or speakers[:1] != speakers[-1:]:
        return None
    others = {key: item for key, item in (second | first).items() if key not in (*REASONING_KEYS, *_ORDER)}
    empty = {"content": ""} if "content" in first or "content" in second else {}
    both = {key: said[0][key] + _BETWEEN[key] + said[1][key] for key in said[0] if key in said[1]}
    return others | empty | said[1] | said[0] | both


_BETWEEN: dict[str, Any] = {REASONING_KEYS[0]: "\n\n", "content": "\n\n", "tool_calls": []}
"""The parts of a turn in the order in which templates write them, and what is put between two of a kind."""
_ORDER = tuple(_BETWEEN)


def _said(message: Message) -> dict[str, Any]:
    """What each part of a turn says, where it says something."""
    reasoning = next((message[key] for key in REASONING_KEYS if key in message), "")
    parts = {key: reasoning if key == REASONING_KEYS[0] else message.get(key, "") for key in _ORDER}
    return {key: part for key, part in parts.items() if (part.strip() if isinstance(part, str) else part)}


def _one_turn(turn: Read, call: Read) -> Read | None:
    """An assistant's message with the calls that follow it."""
    if _weight(turn, turn.place) != _weight(call, call.place):
        raise ValueError(
            f"{call.place} goes on with the turn before it, and has another train or weight: give both the same"
        )
    whole = joined(turn, call)
    return None if whole is None else Read(whole, turn.place, [*turn.written, *call.written])


def take_weights(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Message], tuple[float, ...] | None]:
    """Messages without their `WEIGHT_KEYS`, and the weight of each in the loss.

    Returns:
        The messages, and one weight a message: 0 where it says `"train": false`, `"loss": false` or `"masked": true`, else
        `weight` or `loss_weight`, else 1; None where all are 1.

    Raises:
        ValueError: for a value that is none, for two that contradict each other, and for a message that is not an
            assistant's and yet to be supervised.
    """
    taken, weights = [], []
    for index, message in enumerate(messages):
        taken.append({key: item for key, item in message.items() if key not in WEIGHT_KEYS})
        weights.append(_weight(message, place_of(message, index)))
    return taken, tuple(weights) if any(weight != 1 for weight in weights) else None


def _weight(message: Mapping[str, Any], place: str) -> float:
    weight = weight_said(message, place)
    if weight is None:
        return 1.0
    if weight and message.get("role") != "assistant":
        raise ValueError(f"{place} has a weight, and only an assistant's messages are supervised")
    return weight


def weight_said(owner: Mapping[str, Any], place: str) -> float | None:
    """The weight that a message or a row has under its `WEIGHT_KEYS`; None where it has none of them.

    Raises:
        ValueError: for a value that is none, and for two that contradict each other.
    """
    said = {key: owner[key] for key in WEIGHT_KEYS if owner.get(key) is not None}
    if not said:
        return None
    for key, value in said.items():
        if key in _SWITCHES and not isinstance(value, bool):
            raise ValueError(f"{key} of {place} must be true or false, not {kind(value)}")
        if key in _NUMBERS and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{key} of {place} must be a number, not {kind(value)}")
        if key in _NUMBERS and (not 0 <= value <= _HEAVIEST or not math.isfinite(value)):
            raise ValueError(f"{key} of {place} must be from 0 to {_HEAVIEST:,.0f}, not {shown(value)}")
    numbers = {float(said[key]) for key in _NUMBERS if key in said}
    supervised = {said[key] == _SWITCHES[key] if key in _SWITCHES else said[key] > 0 for key in said}
    if len(numbers) > 1 or len(supervised) > 1:
        raise ValueError(f"{' and '.join(said)} of {place} contradict each other")
    return numbers.pop() if numbers else float(supervised.pop())


def written_weight(weight: float) -> dict[str, float]:
    """What a message or a row says of its weight in the loss, of which `weight_said` reads the same; nothing where it is 1."""
    return {} if weight == 1 else {"weight": int(weight) if weight.is_integer() else weight}


def weight_in_cell(key: str, value: Any) -> Any:
    """A value under one of the `WEIGHT_KEYS`, where the cell of a table may hold it as text: `False`, `0.5`; None for blank text."""
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    if key in _SWITCHES:
        return {"true": True, "false": False, "": None}.get(text, value)
    try:
        return float(text) if text else None
    except ValueError:
        return value


def _apart(value: Any, place: str) -> Iterable[Any]:
    """A message, or the several that it is where its content holds the answers of tools."""
    if not isinstance(value, dict):
        return [value]
    message = _standard_keys(value)
    if not has_answers(message.get("content")):
        return [value]
    if _role(message, place) not in ("user", "tool"):
        raise ValueError(f"{place} has a tool's answer, which only a user's message can bring")
    return answers_apart(message, place)


def _standard_keys(value: Message) -> Message:
    """Without nulls, and with role and content where it has from and value."""
    message = {key: item for key, item in value.items() if item is not None}
    for key in _OTHER_NAMES:
        if key not in message and (other := _key_of(message, key)) in message:
            message = {key: message.pop(other), **message}
    return message


def _written(value: Message, place: str, made: Message) -> Iterator[Written]:
    """A message as the row has it, and the parts of its content."""
    names = [_key_of(value, key) for key in _OTHER_NAMES]
    yield Written("message", place, value, _READ.union(names), made)
    yield from written_parts(value.get(names[1]), f"{place}.{names[1]}")


def _key_of(message: Message, key: str) -> str:
    """The key under which it has its role or its content."""
    other = _OTHER_NAMES[key]
    return other if message.get(key) is None and message.get(other) is not None else key


def _message(value: Any, place: str) -> tuple[Read, bool]:
    """A message, and whether it is a call by its role."""
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be an object with role and content, not {kind(value)}")
    message = _standard_keys(value)
    role = _role(message, place)
    message["role"] = "assistant" if role == _CALL else role
    for key in REASONING_KEYS:
        if not isinstance(message.get(key, ""), str):
            raise ValueError(f"{place}.{key} must be a string, not {kind(message[key])}")
    calls: list[Read] = []
    if message["role"] == "assistant":
        calls = _read_assistant(message, place, is_call=role == _CALL)
    elif parsed(message.pop("tool_calls", None), f"{place}.tool_calls") or message.pop(_CALL, None):
        raise ValueError(f"{place} has tool_calls, which only an assistant's message can have")
    if "content" in message:
        message["content"] = read_text(message["content"], f"{place}.content")
    elif "tool_calls" not in message:
        raise ValueError(f"{place} has no content")
    check_characters("".join(message), f"a key of {place}")
    for key, item in message.items():
        check_characters(item, f"{place}.{key}")
    return Read(message, place, [one for call in calls for one in call.written]), role == _CALL


class UnknownRole(ValueError):
    """A message whose role has a name that is not known, which `--roles` may tell."""

    def __init__(self, reason: str, role: Any) -> None:
        super().__init__(reason)
        self.role = role


def role_of(name: str) -> str | None:
    """One of `ROLES` or `function_call`, by any of its names; None for a name that is not known."""
    return _ROLE_NAMES.get(role_key(name))


def role_key(name: str) -> str:
    """A role's name as it is compared: in lower case, with `_` for `-`."""
    return name[:100].strip().lower().replace("-", "_")


def _role(message: Message, place: str) -> str:
    role = message.get("role")
    if role is None:
        raise ValueError(f"{place} has no role")
    if isinstance(role, str) and (name := role_of(role)):
        return name
    guess = nearest(role, ROLES) if isinstance(role, str) else ""
    reason = f"{place} has the unknown role {shown(role)}; {guess or 'known are ' + ', '.join(ROLES)}"
    raise UnknownRole(reason, role)


def _read_assistant(message: Message, place: str, is_call: bool) -> list[Read]:
    """Put reasoning, text and calls where templates look for them, from wherever an assistant's message has them.

    Without a call there is no `tool_calls`: some templates ask only whether the key is there.

    Returns:
        The calls that the row has, which may be the same ones in two places.
    """
    found = [read_calls(message.get("tool_calls"), f"{place}.tool_calls")]
    if (call := parsed(message.pop(_CALL, None), f"{place}.{_CALL}")) is not None:
        found.append([read_call(call, f"{place}.{_CALL}")])
    reasoning, content = "", message.get("content")
    if is_call and (content or not any(found)):
        reasoning, calls = calls_in_content(message.pop("content", None), place)
        found.append(calls)
    elif isinstance(content, list):
        reasoning, text, calls = read_parts(content, f"{place}.content")
        found.append(calls)
        message["content"] = text
        if text is None:
            del message["content"]
    if reasoning and any(message.get(key, reasoning) != reasoning for key in REASONING_KEYS):
        raise ValueError(f"{place} has two different reasonings, in its content and beside it")
    message |= {REASONING_KEYS[0]: reasoning} if reasoning else {}
    calls = next(filter(None, found), [])
    if any(other and not same_calls(other, calls) for other in found):
        raise ValueError(f"{place} has different calls in two places, such as tool_calls and its content")
    if calls:
        message["tool_calls"] = list(map(dict, calls))
    else:
        message.pop("tool_calls", None)
    return [call for one in found for call in one]


def check_characters(value: Any, place: str) -> None:
    """Raise `ValueError` for half of a surrogate pair, which JSON can write and no text can hold."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(
            f"{place} holds half of a surrogate pair ({half}): it was cut inside a character, such as an emoji"
        ) from None


def nearest(name: str, known: Iterable[str]) -> str:
    """`did_you_mean` among names that a person would type; it would take minutes over one of megabytes."""
    typed = [other for other in known if len(other) <= 100 and other.isprintable()]
    return did_you_mean(name, typed) if len(name) <= 100 else ""


def shown(value: Any) -> str:
    """A value for an error message, shortened."""
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:60]}..."
