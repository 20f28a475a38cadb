"""`{"prompt": ..., "completion": ...}`, texts or lists of messages; the prompt is context."""

from __future__ import annotations

from mlx_sft.data.conversation import Conversation, as_messages, conversation_of
from mlx_sft.data.formats import EXTRAS, RowFormat
from mlx_sft.data.readers import Row


def read(row: Row) -> Conversation:
    prompt = as_messages(row.value["prompt"], "prompt", "user")
    completion = as_messages(row.value["completion"], "completion", "assistant")
    return conversation_of(row, prompt + completion, context=len(prompt))


FORMAT = RowFormat(
    "prompt-completion", ("prompt", "completion"), EXTRAS, '{"prompt": "...", "completion": "..."}', read
)
