"""`{"conversations": [{"from": ..., "value": ...}]}`, as ShareGPT and LLaMA-Factory write it."""

from __future__ import annotations

from mlx_sft.data.conversation import Conversation, conversation_of
from mlx_sft.data.formats import EXTRAS, RowFormat
from mlx_sft.data.messages import read_messages
from mlx_sft.data.readers import Row


def read(row: Row) -> Conversation:
    return conversation_of(row, read_messages(row.value["conversations"], "conversations"))


FORMAT = RowFormat(
    "sharegpt",
    ("conversations",),
    EXTRAS,
    '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
    read,
)
