"""`{"conversations": [{"from": ..., "value": ...}]}`, as ShareGPT and LLaMA-Factory write it; bare functions are wrapped as tools."""

from __future__ import annotations

from dataclasses import replace

from mlx_sft.data.conversation import Conversation, as_tool, conversation_of
from mlx_sft.data.formats import EXTRAS, RowFormat
from mlx_sft.data.messages import read_messages
from mlx_sft.data.readers import Row


def read(row: Row) -> Conversation:
    conversation = conversation_of(row, read_messages(row.value["conversations"], "conversations"))
    tools = [as_tool(tool) for tool in conversation.tools or ()]
    return replace(conversation, tools=tools or None)


FORMAT = RowFormat(
    "sharegpt",
    ("conversations",),
    EXTRAS,
    '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
    read,
)
