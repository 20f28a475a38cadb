"""`{"messages": [{"role": ..., "content": ...}]}`, as OpenAI and most others write it."""

from __future__ import annotations

from mlx_sft.data.conversation import Conversation, conversation_of
from mlx_sft.data.formats import EXTRAS, RowFormat
from mlx_sft.data.messages import read_messages
from mlx_sft.data.readers import Row


def read(row: Row) -> Conversation:
    return conversation_of(row, read_messages(row.value["messages"], "messages"))


FORMAT = RowFormat("messages", ("messages",), EXTRAS, '{"messages": [{"role": "user", "content": "..."}, ...]}', read)
