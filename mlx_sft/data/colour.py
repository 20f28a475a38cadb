"""A message's own words in one colour: the letters by which it is known where a template writes them, and whether it does.

Knows the keys of a message; knows nothing of templates.
"""

from __future__ import annotations

import re
from typing import Any

from mlx_sft.data.formats import REASONING_KEYS

COLOURED_KEYS = frozenset({"content", "text", "arguments", *REASONING_KEYS})
"""The parts of a message whose letters are its own words; the others (role, names, ids) steer the template."""

_LETTER = re.compile(r"[^\W_]")


def recoloured(value: Any, colour: str, constants: re.Pattern[str], words: bool = False) -> Any:
    """A copy of a message whose own words' letters are all one character; the length stays the same.

    Strings that the template's code holds are kept, so that it finds in the message what it looks for (`</think>`).
    """
    if isinstance(value, dict):
        return {key: recoloured(item, colour, constants, words or key in COLOURED_KEYS) for key, item in value.items()}
    if isinstance(value, list):
        return [recoloured(item, colour, constants, words) for item in value]
    if not words or not isinstance(value, str):
        return value
    pieces = constants.split(value)
    pieces[::2] = [_LETTER.sub(colour, piece) for piece in pieces[::2]]
    return "".join(pieces)


def own_letters(message: dict[str, Any], colour: str) -> int:
    """How many coloured letters of a recoloured message there are to write: content, reasoning, and calls' arguments."""
    content = message.get("content")
    parts = [part.get("text") for part in content if isinstance(part, dict)] if isinstance(content, list) else [content]
    # The reasoning is in the message under several names, and is to be written once.
    reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
    arguments = [function.get("arguments") for function in called_functions(message)]
    return sum(_letters(part, colour) for part in (*parts, reasoning, *arguments))


def called_functions(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The functions of a message's tool calls, in either of the forms that templates take."""
    calls = message.get("tool_calls")
    calls = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    functions = [call.get("function", call) for call in calls]
    return [function for function in functions if isinstance(function, dict)]


def _letters(value: Any, colour: str) -> int:
    if isinstance(value, dict):
        return sum(_letters(item, colour) for item in value.values())
    if isinstance(value, list):
        return sum(_letters(item, colour) for item in value)
    return value.count(colour) if isinstance(value, str) else 0
