"""Row → `Conversation` or `Document`, by the row's shape.

Knows the shapes that rows come in, and nothing of files, templates or tokens. A shape is one entry of `SHAPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlx_sft.data.readers import Row, parse_json
from mlx_sft.errors import UserError, did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""The names under which a message's reasoning travels, the standard one first."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as a chat template takes them.

    The assistant turns among `messages[first_learnt:]` are learnt; what stands before is context only.

    Args:
        weights: Of each message in the loss; 0 where it is not to be learnt. None: all 1.
    """

    origin: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    first_learnt: int = 0
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text, learnt as a whole."""

    origin: str
    text: str


Item = Conversation | Document


@dataclass(frozen=True, slots=True)
class Shape:
    """A form of row: the keys that tell it, how it is written, and its reader, which raises `ValueError` with a reason."""

    keys: tuple[str, ...]
    example: str
    read: Callable[[Row], Item]


def read_item(row: Row) -> Item:
    """The conversation or document in a row.

    Raises:
        UserError: naming the row's origin, what is wrong with it and what would be right.
    """
    present = {key for key, value in row.value.items() if value is not None}
    shape = next((shape for shape in SHAPES if present.issuperset(shape.keys)), None)
    hint = "a row is one of " + ", ".join(shape.example for shape in SHAPES)
    if shape is None:
        raise UserError(f"a row without a known shape: {_keys_shown(row.value)}", where=row.origin, hint=hint)
    try:
        return shape.read(row)
    except ValueError as error:
        raise UserError(str(error), where=row.origin, hint=f"such a row is {shape.example}") from None


def _keys_shown(value: dict[str, Any]) -> str:
    if not value:
        return "it is empty"
    names = [f"{shown(key)} (null)" if item is None else shown(key) for key, item in value.items()]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"it has {', '.join(names[:8])}{more}"


def _read_messages(row: Row) -> Conversation:
    return _conversation(row, _messages(row.value["messages"], "messages"))


def _read_prompt_completion(row: Row) -> Conversation:
    prompt = _as_messages(row.value["prompt"], "prompt", "user")
    completion = _as_messages(row.value["completion"], "completion", "assistant")
    return _conversation(row, prompt + completion, first_learnt=len(prompt))


def _read_text(row: Row) -> Document:
    text = row.value["text"]
    if not isinstance(text, str):
        raise ValueError(f"text must be a string, not {kind(text)}")
    if not text.strip():
        raise ValueError("text is empty: there is nothing to learn")
    return Document(row.origin, text)


SHAPES: tuple[Shape, ...] = (
    Shape(("messages",), '{"messages": [{"role": "user", "content": "..."}, ...]}', _read_messages),
    Shape(("prompt", "completion"), '{"prompt": "...", "completion": "..."}', _read_prompt_completion),
    Shape(("text",), '{"text": "..."}', _read_text),
)
"""The known shapes; a row that has the keys of several is the first of them."""


def _conversation(row: Row, messages: list[dict[str, Any]], first_learnt: int = 0) -> Conversation:
    learnt = [message for message in messages[first_learnt:] if message["role"] == "assistant"]
    if not learnt:
        raise ValueError("a conversation with nothing to learn: it has no assistant turn")
    if not any(_says_something(message) for message in learnt):
        raise ValueError("a conversation with nothing to learn: every assistant turn is empty")
    tools = _parsed(row.value.get("tools"), "tools")
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"tools must be a list of objects, not {kind(tools)}")
    template_kwargs = _parsed(row.value.get("chat_template_kwargs"), "chat_template_kwargs")
    if template_kwargs is not None and not isinstance(template_kwargs, dict):
        raise ValueError(f"chat_template_kwargs must be an object, not {kind(template_kwargs)}")
    return Conversation(row.origin, messages, tools or None, template_kwargs or {}, first_learnt)


def _says_something(message: dict[str, Any]) -> bool:
    texts = [message.get(key) or "" for key in ("content", *REASONING_KEYS)]
    return "tool_calls" in message or any(text.strip() for text in texts)


def _as_messages(value: Any, name: str, role: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _messages(value, name)


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    value = _parsed(value, name)
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, not {kind(value)}")
    if not value:
        raise ValueError(f"{name} is empty")
    return [_message(message, f"{name}[{index}]") for index, message in enumerate(value)]


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be an object with role and content, not {kind(value)}")
    message = {key: item for key, item in value.items() if item is not None}
    role = message.get("role")
    if role is None:
        raise ValueError(f"{place} has no role")
    if role not in ROLES:
        guess = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        known = guess or f"known are {', '.join(ROLES)}"
        raise ValueError(f"{place} has the unknown role {shown(role)}; {known}")
    for key in REASONING_KEYS:
        if not isinstance(message.get(key, ""), str):
            raise ValueError(f"{place}.{key} must be a string, not {kind(message[key])}")
    _check_tool_calls(message, place)
    if "content" in message:
        message["content"] = _text(message["content"], f"{place}.content")
    elif "tool_calls" not in message:
        raise ValueError(f"{place} has no content")
    return message


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


def _check_tool_calls(message: dict[str, Any], place: str) -> None:
    calls = message.get("tool_calls")
    if calls is None:
        return
    if not isinstance(calls, list):
        raise ValueError(f"{place}.tool_calls must be a list, not {kind(calls)}")
    if not calls:
        # Some templates ask only whether the key is there.
        del message["tool_calls"]
        return
    if message["role"] != "assistant":
        raise ValueError(f"{place} has tool_calls, which only an assistant's message can have")
    for index, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{place}.tool_calls[{index}] names no function")
        if not isinstance(function.get("arguments", {}), dict | str):
            raise ValueError(f"{place}.tool_calls[{index}] has arguments that are neither an object nor a string")


def _parsed(value: Any, name: str) -> Any:
    """A structured field, which tables (.csv, .parquet) may hold as JSON text; blank text is none."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return parse_json(value)
    except ValueError:
        raise ValueError(f"{name} is neither a list or object nor JSON text of one") from None


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "a list"
        case dict():
            return "an object"
    return f"a {type(value).__name__}"


def shown(value: Any) -> str:
    """A value for an error message, shortened."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
