"""`{"messages": [{"role": ..., "content": ...}]}`, as OpenAI and most others write it."""

from __future__ import annotations

from typing import Any

from mlx_sft.data.conversation import Conversation, conversation_of
from mlx_sft.data.formats import EXTRAS, RowFormat
from mlx_sft.data.messages import Message, read_messages, written_weight
from mlx_sft.data.readers import Row


def read(row: Row) -> Conversation:
    return conversation_of(row, read_messages(row.value["messages"], "messages"))


def write(conversation: Conversation) -> dict[str, Any]:
    """The row of a conversation, of which `read` makes the same again; where turns are context only, they have the weight 0."""
    context, answer = parts(conversation)
    unlearnt = [row | (written_weight(0.0) if row["role"] == "assistant" else {}) for row in context]
    return {"messages": unlearnt + answer} | extras(conversation)


def parts(conversation: Conversation) -> tuple[list[Message], list[Message]]:
    """The messages that are context only, and the others with their weights."""
    first = conversation.first_supervised
    rows = [{key: one[key] for key in ("role", "content") if key in one} | one for one in conversation.messages]
    weights = conversation.weights or (1.0,) * len(rows)
    weighted = zip(rows[first:], weights[first:], strict=True)
    return rows[:first], [
        row | (written_weight(weight) if row["role"] == "assistant" else {}) for row, weight in weighted
    ]


def extras(conversation: Conversation) -> dict[str, Any]:
    """What a row has beside its messages."""
    found = {"tools": conversation.tools, "chat_template_kwargs": conversation.template_kwargs}
    return {key: value for key, value in found.items() if value}


FORMAT = RowFormat("messages", ("messages",), EXTRAS, '{"messages": [{"role": "user", "content": "..."}, ...]}', read)
