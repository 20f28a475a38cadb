"""`{"query": ..., "answers": [calls], "tools": [...]}`, as Salesforce xLAM and APIGen write it; lists are often JSON text."""

from __future__ import annotations

from mlx_sft.data.conversation import Conversation, conversation_of, text_of
from mlx_sft.data.formats import RowFormat
from mlx_sft.data.messages import read_messages
from mlx_sft.data.readers import Row
from mlx_sft.data.tool_calls import read_calls


def read(row: Row) -> Conversation:
    calls = read_calls(row.value["answers"], "answers")
    if not calls:
        raise ValueError("answers has no call, which is what such a row teaches")
    messages = [
        {"role": "user", "content": text_of(row, "query")},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    return conversation_of(row, read_messages(messages, "messages", ["query", "answers"]))


FORMAT = RowFormat(
    "xlam",
    ("query", "answers", "tools"),
    ("system", "chat_template_kwargs"),
    '{"query": "...", "answers": [{"name": "...", "arguments": {}}], "tools": []}',
    read,
)
