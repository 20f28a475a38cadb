"""Messages as people write them → as chat templates take them: roles, content, tool calls, weights.

Knows messages; knows nothing of rows and their shapes, of templates or tokens. What is wrong is a `ValueError` with a reason.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_sft.data.json_text import kind, parse_json
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
"""What a message says of itself to training, and the chat template does not see."""

_CALL = "function_call"
_ROLE_NAMES = {name: name for name in ROLES} | {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "chatbot", "ai", "bing", "bard"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys((_CALL, "tool_call"), _CALL),
}
"""The names of roles in public data (ShareGPT, LLaMA-Factory, axolotl), lower case, `_` for `-`. `function_call` is an
assistant's turn that is a call."""
_HEAVIEST = 1e6


def read_messages(value: Any, name: str) -> list[Message]:
    """A list of messages, written with role and content or with from and value, or JSON text of it.

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
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


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
        weights.append(_weight(message, f"message {index}"))
    return taken, tuple(weights) if any(weight != 1 for weight in weights) else None


def _weight(message: Mapping[str, Any], place: str) -> float:
    said = {key: message[key] for key in WEIGHT_KEYS if message.get(key) is not None}
    if not said:
        return 1.0
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
    value = numbers.pop() if numbers else float(supervised.pop())
    if value and message.get("role") != "assistant":
        raise ValueError(f"{place} has a weight, and only an assistant's messages are supervised")
    return value


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be an object with role and content, not {kind(value)}")
    message = {key: item for key, item in value.items() if item is not None}
    for key, other in (("role", "from"), ("content", "value")):
        if key not in message and other in message:
            message = {key: message.pop(other), **message}
    role = _role(message, place)
    message["role"] = "assistant" if role == _CALL else role
    if role == _CALL:
        message["tool_calls"] = _calls_in_content(message, place)
    elif role == "assistant" and _CALL in message:
        message.setdefault("tool_calls", [_as_call(message.pop(_CALL), f"{place}.{_CALL}")])
    for key in REASONING_KEYS:
        if not isinstance(message.get(key, ""), str):
            raise ValueError(f"{place}.{key} must be a string, not {kind(message[key])}")
    _check_tool_calls(message, place)
    if "content" in message:
        message["content"] = _text(message["content"], f"{place}.content")
    elif "tool_calls" not in message:
        raise ValueError(f"{place} has no content")
    check_characters("".join(message), f"a key of {place}")
    for key, item in message.items():
        check_characters(item, f"{place}.{key}")
    return message


def _role(message: Message, place: str) -> str:
    role = message.get("role")
    if role is None:
        raise ValueError(f"{place} has no role")
    if isinstance(role, str):
        name = _ROLE_NAMES.get(role[:100].strip().lower().replace("-", "_"))
        if name:
            return name
    guess = nearest(role, ROLES) if isinstance(role, str) else ""
    raise ValueError(f"{place} has the unknown role {shown(role)}; {guess or 'known are ' + ', '.join(ROLES)}")


def _calls_in_content(message: Message, place: str) -> list[Any]:
    """The calls of a turn whose content is JSON of one or of several."""
    content = message.pop("content", None)
    calls = parsed(content, f"{place}, a function call,")
    return [_as_call(call, place) for call in (calls if isinstance(calls, list) else [calls])]


def _as_call(call: Any, place: str) -> dict[str, Any]:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise ValueError(f'{place} is a call, and must be {{"name": ..., "arguments": {{...}}}}')
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def _check_tool_calls(message: Message, place: str) -> None:
    if "tool_calls" not in message:
        return
    calls = parsed(message["tool_calls"], f"{place}.tool_calls")
    if not calls and isinstance(calls, list | None):
        # Some templates ask only whether the key is there.
        del message["tool_calls"]
        return
    if not isinstance(calls, list):
        raise ValueError(f"{place}.tool_calls must be a list, not {kind(calls)}")
    if message["role"] != "assistant":
        raise ValueError(f"{place} has tool_calls, which only an assistant's message can have")
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{place}.tool_calls[{index}] names no function")
        if not isinstance(function.get("arguments", {}), dict | str):
            raise ValueError(f"{place}.tool_calls[{index}] has arguments that are neither an object nor a string")
    message["tool_calls"] = calls


def _text(content: Any, place: str) -> str:
    """Content as one string; text parts are joined, as templates that know parts write them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{place} must be a string or a list of text parts, not {kind(content)}")
    texts = []
    for index, part in enumerate(content):
        is_text = isinstance(part, dict) and part.get("type", "text") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            raise ValueError(f'{place}[{index}] is not a text part, such as {{"type": "text", "text": "..."}}')
        texts.append(part["text"])
    return "".join(texts)


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


def parsed(value: Any, name: str) -> Any:
    """A structured field, which tables (.csv, .parquet) may hold as JSON text; blank text is none."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return parse_json(value)
    except ValueError as error:
        raise ValueError(f"{name} is neither a list or object nor JSON text of one ({error})") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """`did_you_mean` among names that a person would type; it would take minutes over one of megabytes."""
    typed = [other for other in known if len(other) <= 100 and other.isprintable()]
    return did_you_mean(name, typed) if len(name) <= 100 else ""


def shown(value: Any) -> str:
    """A value for an error message, shortened."""
    text = repr(value[:100] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:60]}..."
