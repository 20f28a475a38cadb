"""The shapes that rows come in, and what each holds: a `Conversation`, a `Document` or `Tokens`.

Knows the keys of each shape; knows nothing of how a file's shape is told (`formats`), or of the inside of messages (`messages`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_sft.data.json_text import kind
from mlx_sft.data.messages import REASONING_KEYS, Message, check_characters, parsed, read_messages, shown, take_weights
from mlx_sft.data.readers import Row

IGNORED_LABEL = -100


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


@dataclass(frozen=True, slots=True)
class Tokens:
    """Text that was tokenized before, without padding. Labels are *not* shifted: -100, or the token at the same place."""

    origin: str
    token_ids: list[int]
    labels: list[int]


Item = Conversation | Document | Tokens


@dataclass(frozen=True, slots=True)
class Shape:
    """A form of row: the keys that tell it, those that it may have besides, how it is written, and its reader, which raises
    `ValueError` with a reason."""

    name: str
    keys: tuple[str, ...]
    optional: tuple[str, ...]
    example: str
    read: Callable[[Row], Item]


def _read_messages(row: Row) -> Conversation:
    return _conversation(row, read_messages(row.value["messages"], "messages"))


def _read_sharegpt(row: Row) -> Conversation:
    conversation = _conversation(row, read_messages(row.value["conversations"], "conversations"))
    tools = [_as_tool(tool) for tool in conversation.tools or ()]
    return replace(conversation, tools=tools or None)


def _read_alpaca(row: Row) -> Conversation:
    history = parsed(row.value.get("history"), "history") or []
    if not isinstance(history, list):
        raise ValueError(f"history must be a list of [question, answer] pairs, not {kind(history)}")
    messages: list[Message] = []
    for index, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(f'history[{index}] is not a pair, such as ["question", "answer"]')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    asked = [_string(row, key) for key in ("instruction", "input")]
    if not any(asked):
        raise ValueError("instruction and input are both empty")
    messages += [{"role": "user", "content": "\n".join(filter(None, asked))}]
    messages += [{"role": "assistant", "content": _string(row, "output")}]
    return _conversation(row, read_messages(messages, "messages"))


def _read_prompt_completion(row: Row) -> Conversation:
    prompt = _as_messages(row.value["prompt"], "prompt", "user")
    completion = _as_messages(row.value["completion"], "completion", "assistant")
    return _conversation(row, prompt + completion, context=len(prompt))


def _read_text(row: Row) -> Document:
    text = row.value["text"]
    if not isinstance(text, str):
        raise ValueError(f"text must be a string, not {kind(text)}")
    if not text.strip():
        raise ValueError("text is empty: there is nothing to learn")
    check_characters(text, "text")
    return Document(row.origin, text)


def _read_tokenized(row: Row) -> Tokens:
    token_ids, labels = _integers(row, "input_ids"), _integers(row, "labels")
    columns = {"input_ids": token_ids, "labels": labels}
    if row.value.get("attention_mask") is not None:
        columns["attention_mask"] = _integers(row, "attention_mask")
    if len({len(column) for column in columns.values()}) > 1:
        lengths = " and ".join(f"{len(column)} {name}" for name, column in columns.items())
        raise ValueError(f"the lists differ in length: {lengths}")
    first, last = _unpadded(columns.get("attention_mask", [1] * len(token_ids)))
    token_ids, labels = token_ids[first:last], labels[first:last]
    if not 0 <= min(token_ids) <= max(token_ids) < 2**31:
        raise ValueError("input_ids holds a number that is no token's, below 0 or above 2147483647")
    for index, (token_id, label) in enumerate(zip(token_ids, labels, strict=True)):
        if label != token_id and label != IGNORED_LABEL:
            shifted = all(y in (IGNORED_LABEL, x) for x, y in zip(token_ids[1:], labels, strict=False))
            rule = "labels are not to be shifted" if shifted else f"it must be {IGNORED_LABEL} or the token itself"
            place = first + index
            raise ValueError(f"labels[{place}] is {shown(label)}, where input_ids[{place}] is {token_id}: {rule}")
    if all(label == IGNORED_LABEL for label in labels[1:]):
        raise ValueError("tokens with nothing to learn: every label behind the first token is -100")
    return Tokens(row.origin, token_ids, labels)


def _conversation(row: Row, messages: list[Message], context: int = 0) -> Conversation:
    """Messages, of which the first `context` are not learnt, with what else the row has."""
    _check_that_messages_are_all(row)
    system = _string(row, "system")
    if system and messages[0]["role"] in ("system", "developer"):
        if messages[0].get("content") != system:
            raise ValueError("the row's system and its first message are two different system prompts")
    elif system:
        messages = [{"role": "system", "content": system}, *messages]
        context += 1 if context else 0
    messages, weights = take_weights(messages)
    learnt = [
        (message, weights is None or weights[index] > 0)
        for index, message in enumerate(messages)
        if index >= context and message["role"] == "assistant"
    ]
    reasons = {
        "it has no assistant turn": not learnt,
        "every assistant turn is empty": not any(_says_something(message) for message, _ in learnt),
        "every assistant turn has the weight 0": not any(heavy for _, heavy in learnt),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"a conversation with nothing to learn: {reason}")
    return Conversation(row.origin, messages, _tools(row), _template_kwargs(row), context, weights)


def _says_something(message: Message) -> bool:
    texts = [message.get(key) or "" for key in ("content", *REASONING_KEYS)]
    return "tool_calls" in message or any(text.strip() for text in texts)


def _check_that_messages_are_all(row: Row) -> None:
    """Refuse rows whose messages are not the whole of what they show or teach."""
    media = next((key for key in _MEDIA if row.value.get(key)), None)
    if media:
        raise ValueError(
            f"only text is read, and the row has `{media}`: leave that out where the text stands for itself"
        )
    if isinstance(row.value.get("rejected"), dict):
        raise ValueError("a row of preferences: its answers are `chosen` and `rejected`, and not among its messages")


def _tools(row: Row) -> list[dict[str, Any]] | None:
    """Under `tools`; or under `functions`, as they were written before there were tools."""
    tools = _objects(row, "tools") or [_as_tool(function) for function in _objects(row, "functions")]
    return tools or None


def _objects(row: Row, key: str) -> list[dict[str, Any]]:
    value = parsed(row.value.get(key), key) or []
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list of objects, not {kind(value)}")
    objects = [parsed(item, f"{key}[{index}]") for index, item in enumerate(value)]
    for index, item in enumerate(objects):
        if not isinstance(item, dict):
            raise ValueError(f"{key}[{index}] must be an object, not {kind(item)}")
    check_characters(objects, key)
    return objects


def _as_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as templates take it, of one or of a bare function, as LLaMA-Factory's data have them."""
    return tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool}


def _template_kwargs(row: Row) -> dict[str, Any]:
    template_kwargs = parsed(row.value.get("chat_template_kwargs"), "chat_template_kwargs")
    if not isinstance(template_kwargs, dict | None):
        raise ValueError(f"chat_template_kwargs must be an object, not {kind(template_kwargs)}")
    check_characters(template_kwargs, "chat_template_kwargs")
    return template_kwargs or {}


def _as_messages(value: Any, name: str, role: str) -> list[Message]:
    if isinstance(value, str):
        return read_messages([{"role": role, "content": value}], name)
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a string or a list of messages, not {kind(value)}")
    return read_messages(value, name)


def _string(row: Row, key: str) -> str:
    """Text of a row; empty where it is blank or absent."""
    text = row.value.get(key) or ""
    if not isinstance(text, str):
        raise ValueError(f"{key} must be a string, not {kind(text)}")
    check_characters(text, key)
    return text if text.strip() else ""


def _integers(row: Row, key: str) -> list[int]:
    value = parsed(row.value[key], key)
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list, not {kind(value)}")
    if set(map(type, value)) - {int}:  # true is an int to Python, and not one here
        index, other = next((i, x) for i, x in enumerate(value) if type(x) is not int)
        raise ValueError(f"{key}[{index}] must be a whole number, not {shown(other)}")
    return value


def _unpadded(attention_mask: list[int]) -> tuple[int, int]:
    """From where to where a row is without its padding."""
    if not set(attention_mask) <= {0, 1}:
        raise ValueError("attention_mask must hold only 0 and 1")
    if 1 not in attention_mask:
        raise ValueError("a row without a token that is not padding")
    first, last = attention_mask.index(1), len(attention_mask) - attention_mask[::-1].index(1)
    if 0 in attention_mask[first:last]:
        raise ValueError(f"attention_mask has a 0 inside of the text, at {first + attention_mask[first:].index(0)}")
    return first, last


_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_EXTRAS = ("system", "tools", "chat_template_kwargs")
SHAPES: tuple[Shape, ...] = (
    Shape(
        "messages", ("messages",), _EXTRAS, '{"messages": [{"role": "user", "content": "..."}, ...]}', _read_messages
    ),
    Shape(
        "sharegpt",
        ("conversations",),
        _EXTRAS,
        '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
        _read_sharegpt,
    ),
    Shape(
        "alpaca",
        ("instruction", "output"),
        ("input", "history", *_EXTRAS),
        '{"instruction": "...", "input": "...", "output": "..."}',
        _read_alpaca,
    ),
    Shape(
        "prompt-completion",
        ("prompt", "completion"),
        _EXTRAS,
        '{"prompt": "...", "completion": "..."}',
        _read_prompt_completion,
    ),
    Shape(
        "tokenized",
        ("input_ids", "labels"),
        ("attention_mask",),
        '{"input_ids": [9707, 0], "labels": [-100, 0]}',
        _read_tokenized,
    ),
    Shape("text", ("text",), (), '{"text": "..."}', _read_text),
)
"""The known shapes; a row that has the keys of several is the first of them."""
