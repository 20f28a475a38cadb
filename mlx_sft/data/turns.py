"""Assistant messages in a row: those that are one turn by their roles, and those that a setting joins, keeps or refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from mlx_sft.data.conversation import Conversation
from mlx_sft.data.messages import Message, joined
from mlx_sft.errors import UserError

ConsecutiveTurns = Literal["keep", "join", "error"]


def follows_a_turn(messages: list[dict[str, Any]], index: int) -> bool:
    """Whether a message and the one before it are both the assistant's."""
    return index > 0 and _is_turn(messages[index - 1]) and _is_turn(messages[index])


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


def _is_turn(message: Mapping[str, Any]) -> bool:
    return message.get("role") == "assistant"
