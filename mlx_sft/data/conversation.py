"""What a row is once it is read: a `Conversation`, a `Document` or `Tokens`; the checks of every conversation, and its turns in a row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mlx_sft.data.content_parts import read_text, written_parts
from mlx_sft.data.json_text import kind, parsed
from mlx_sft.data.messages import (
    REASONING_KEYS,
    Message,
    check_characters,
    joined,
    read_message,
    read_messages,
    take_weights,
)
from mlx_sft.data.readers import Row
from mlx_sft.data.tool_calls import TOOL_KEYS, as_tool
from mlx_sft.data.written import Read, WatchedRow, Written, place_of
from mlx_sft.errors import UserError

ConsecutiveTurns = Literal["keep", "join", "error"]

_NOTHING = "a conversation with nothing to train on"
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as a chat template takes them.

    The assistant turns among `messages[first_supervised:]` are supervised; what stands before is context only.

    Args:
        weights: Of each message in the loss; 0 where it is not to be supervised. None: all 1.
        score: How good its answer is, where the row says so of answers that are compared.
        desirable: Whether its answer is one that the model should give, where the row says so and the objective asks for it.
        places: Where each message stands in the row, as the person wrote it: `messages[2]`, or a key such as `system` or `output`.
        null_content: Give the template a null where a message of calls has no content. Otherwise there is no such key, as newer
            releases of transformers have it.
    """

    origin: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    first_supervised: int = 0
    weights: tuple[float, ...] | None = None
    null_content: bool = False
    score: float | None = None
    desirable: bool | None = None
    places: tuple[str, ...] = field(default=(), compare=False)

    def place(self, index: int) -> str:
        """Where message `index` stands in the row."""
        return self.places[index] if self.places else f"messages[{index}]"


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text, supervised as a whole, with one weight in the loss."""

    origin: str
    text: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Tokens:
    """Text that was tokenized before, without padding. Labels are *not* shifted: -100, or the token at the same place.

    All tokens with a label have the one weight in the loss.
    """

    origin: str
    token_ids: list[int]
    labels: list[int]
    weight: float = 1.0


Item = Conversation | Document | Tokens
Items = Item | tuple[Item, ...] | list[Item]
"""What a row format makes of a row: one item; a list of items, each an example of its own; or a tuple of items for an objective that
compares them, such as a preferred answer and a rejected one."""


def items_of(read: Items) -> tuple[Item, ...]:
    """One item or several, as a tuple."""
    return tuple(read) if isinstance(read, tuple | list) else (read,)


def apart(read: Items) -> list[Item | tuple[Item, ...]]:
    """What each of a row's examples is made of: an item, or the several that are compared."""
    return [*read] if isinstance(read, list) else [read]


class NoWeightError(ValueError):
    """A conversation that says of each of its assistant turns that it is not to be trained on."""


def conversation_of(
    row: Row, messages: list[Message], context: int = 0, *, system: str | None = None, tools: list[Any] | None = None
) -> Conversation:
    """Messages, of which the first `context` are not supervised, with what else the row has.

    Args:
        system: The system prompt, where the row's own `system` is not simply its text.
        tools: The tools, where the row has them elsewhere than under `tools`.

    Raises:
        ValueError: for a conversation that cannot be trained on; `NoWeightError` where it says so itself.
    """
    if media := next((key for key in _MEDIA if row.value.get(key)), None):
        raise ValueError(
            f"only text is read, and the row has `{media}`: leave that out where the text stands for itself"
        )
    if system is None:
        system = text_of(row, "system", in_parts=True)
    _note(row, (one for message in messages if isinstance(message, Read) for one in message.written))
    _note(row, written_parts(row.value.get("system"), "system"))
    if system and messages[0]["role"] in ("system", "developer"):
        if messages[0].get("content") != system:
            raise ValueError("the row's system and its first message are two different system prompts")
    elif system:
        messages = [Read({"role": "system", "content": system}, "system"), *messages]
        context += 1 if context else 0
    places = tuple(place_of(message, index) for index, message in enumerate(messages))
    messages, weights = take_weights(messages)
    supervised = [
        (message, weights is None or weights[index] > 0)
        for index, message in enumerate(messages)
        if index >= context and message["role"] == "assistant"
    ]
    reasons = {
        "it has no assistant turn": not supervised,
        "every assistant turn is empty": not any(
            "tool_calls" in message or any((message.get(key) or "").strip() for key in ("content", *REASONING_KEYS))
            for message, _ in supervised
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"{_NOTHING}: {reason}")
    if not any(heavy for _, heavy in supervised):
        raise NoWeightError(f"{_NOTHING}: every assistant turn has the weight 0")
    tools = _tools(row, tools)
    return Conversation(row.origin, messages, tools, _template_kwargs(row), context, weights, places=places)


def _note(row: Row, written: Iterable[Written]) -> None:
    """Remember what of the row was read, so that its keys are accounted for."""
    if isinstance(row.value, WatchedRow):
        row.value.written += written


def weighed(item: Item, weight: float) -> Item:
    """The item, of which each part weighs so many times what it did."""
    if not isinstance(item, Conversation):
        return replace(item, weight=weight * item.weight)
    weights = item.weights or (1.0,) * len(item.messages)
    return item if weight == 1 else replace(item, weights=tuple(weight * one for one in weights))


def labelled(item: Item, desirable: bool) -> Item:
    """The conversation with a label of its answer, which is the last assistant message where the row does not set it apart."""
    if not isinstance(item, Conversation):
        return item
    last = max(index for index, message in enumerate(item.messages) if message["role"] == "assistant")
    return replace(item, desirable=desirable, first_supervised=item.first_supervised or last)


def answer_of(row: Row, text: str) -> Message:
    """An assistant's message of this text, with the reasoning that the row has beside it, under one of the `REASONING_KEYS`.

    The row has no such message, so that its `read_messages` is to be told the `places`.
    """
    said = {key: reasoning for key in REASONING_KEYS if (reasoning := text_of(row, key))}
    if len(set(said.values())) > 1:
        raise ValueError(f"{' and '.join(said)} are two different reasonings of one answer")
    message = {"role": "assistant", "content": text}
    return message | {REASONING_KEYS[0]: next(iter(said.values()))} if said else message


def _tools(row: Row, given: list[Any] | None) -> list[dict[str, Any]] | None:
    """Those that are given; else under `tools`, or under `functions`, as they were written before there were tools."""
    key = "tools" if given or parsed(row.value.get("tools"), "tools") else "functions"
    tools = []
    for index, tool in enumerate(_objects(given or row.value.get(key), key)):
        place = f"{key}[{index}]"
        tools.append(as_tool(tool, place))
        _note(row, [Written("tool", place, tool, TOOL_KEYS, tools[-1])])
    return tools or None


def _objects(value: Any, key: str) -> list[dict[str, Any]]:
    value = parsed(value, key) or []
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list of objects, not {kind(value)}")
    objects = [parsed(item, f"{key}[{index}]") for index, item in enumerate(value)]
    for index, item in enumerate(objects):
        if not isinstance(item, dict):
            raise ValueError(f"{key}[{index}] must be an object, not {kind(item)}")
    check_characters(objects, key)
    return objects


def _template_kwargs(row: Row) -> dict[str, Any]:
    template_kwargs = parsed(row.value.get("chat_template_kwargs"), "chat_template_kwargs")
    if not isinstance(template_kwargs, dict | None):
        raise ValueError(f"chat_template_kwargs must be an object, not {kind(template_kwargs)}")
    check_characters(template_kwargs, "chat_template_kwargs")
    return template_kwargs or {}


def as_messages(value: Any, name: str, role: str) -> list[Message]:
    """A text, which is a message of this role, or a message, or a list of messages."""
    if isinstance(value, str):
        return read_messages([{"role": role, "content": value}], name, [name])
    if isinstance(value, dict):
        return read_message(value, name)
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a string or a list of messages, not {kind(value)}")
    return read_messages(value, name)


def text_of(row: Row, key: str, in_parts: bool = False) -> str:
    """Text of a row; empty where it is blank or absent. Where it may be in parts, a list of text parts is one text."""
    text = row.value.get(key) or ""
    if in_parts and isinstance(text, list):
        text = read_text(text, key)
    if not isinstance(text, str):
        raise ValueError(f"{key} must be a string, not {kind(text)}")
    check_characters(text, key)
    return text if text.strip() else ""


# Assistant messages in a row: one turn by their roles, or such as a setting joins, keeps or refuses


def follows_a_turn(messages: list[dict[str, Any]], index: int) -> bool:
    """Whether a message and the one before it are both the assistant's."""
    return index > 0 and all(one.get("role") == "assistant" for one in messages[index - 1 : index + 1])


def with_turns(conversation: Conversation, choice: ConsecutiveTurns) -> Conversation:
    """The conversation with assistant turns in a row as they are, or each row of them as one turn.

    Raises:
        UserError: for turns in a row where they are to be refused, or cannot be joined without moving words, or would mix what is
            trained on with what is not.
    """
    in_a_row = [index for index in range(len(conversation.messages)) if follows_a_turn(conversation.messages, index)]
    if choice == "keep" or not in_a_row:
        return conversation
    if choice == "error":
        hint = (
            "make them one message, or choose --consecutive-turns join, or keep to train on each as a turn of its own"
        )
        raise _refusal(conversation, in_a_row[0], "are assistant turns in a row", hint)
    messages: list[Message] = []
    weights: list[float] = []
    places: list[str] = []
    for index, message in enumerate(conversation.messages):
        weight = 1.0 if conversation.weights is None else conversation.weights[index]
        if index not in in_a_row:
            messages.append(message)
            weights.append(weight)
            places.append(conversation.place(index))
            continue
        if index == conversation.first_supervised or weight != weights[-1]:
            raise _refusal(conversation, index, "cannot be joined: they weigh differently in the loss", _AS_THEY_ARE)
        whole = joined(messages[-1], message)
        if whole is None:
            what = (
                "cannot be joined: a turn is reasoning, then text, then calls, and the second would go before the first"
            )
            raise _refusal(conversation, index, what, _AS_THEY_ARE)
        messages[-1] = whole
    return replace(
        conversation,
        messages=messages,
        places=tuple(places),
        weights=None if conversation.weights is None else tuple(weights),
        first_supervised=conversation.first_supervised - sum(i < conversation.first_supervised for i in in_a_row),
    )


_AS_THEY_ARE = "choose --consecutive-turns keep, which trains on each as a turn of its own, or put them right"


def _refusal(conversation: Conversation, index: int, what: str, hint: str) -> UserError:
    places = f"{conversation.place(index - 1)} and {conversation.place(index)}"
    return UserError(f"{places} {what}", where=conversation.origin, hint=hint)
