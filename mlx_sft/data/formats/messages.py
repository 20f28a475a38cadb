"""`{"messages": [{"role": ..., "content": ...}]}`, as OpenAI and most others write it."""

from __future__ import annotations

from typing import Any

from mlx_sft.data.conversation import Conversation, conversation_of
from mlx_sft.data.formats import EXTRAS, RowFormat
from mlx_sft.data.messages import read_messages, written_weight
from mlx_sft.data.readers import Row


def read(row: Row) -> Conversation:
    return conversation_of(row, read_messages(row.value["messages"], "messages"))


def write(conversation: Conversation) -> dict[str, Any]:
    """The row of a conversation, of which `read` makes the same again; where turns are context only, they have the weight 0."""
    messages = []
    for index, message in enumerate(conversation.messages):
        weight = 1.0 if conversation.weights is None else conversation.weights[index]
        weight = 0.0 if index < conversation.first_supervised else weight
        row = {key: message[key] for key in ("role", "content") if key in message} | message
        messages.append(row | (written_weight(weight) if message["role"] == "assistant" else {}))
    extras = {"tools": conversation.tools, "chat_template_kwargs": conversation.template_kwargs}
    label = {} if conversation.desirable is None else {"label": conversation.desirable}
    return {"messages": messages} | {key: value for key, value in extras.items() if value} | label


FORMAT = RowFormat("messages", ("messages",), EXTRAS, '{"messages": [{"role": "user", "content": "..."}, ...]}', read)
