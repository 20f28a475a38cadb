"""`{"prompt": ..., "completion": ...}`, texts or lists of messages; the prompt is context."""

from __future__ import annotations

from typing import Any

from mlx_sft.data.conversation import Conversation, answer_of, as_messages, conversation_of
from mlx_sft.data.formats import ANSWER_EXTRAS, RowFormat
from mlx_sft.data.formats.messages import extras, parts
from mlx_sft.data.messages import read_messages
from mlx_sft.data.readers import Row


def read(row: Row) -> Conversation:
    prompt = as_messages(row.value["prompt"], "prompt", "user")
    completion = row.value["completion"]
    if isinstance(completion, str):
        answer = read_messages([answer_of(row, completion)], "completion", ["completion"])
    else:
        answer = as_messages(completion, "completion", "assistant")
    return conversation_of(row, prompt + answer, context=len(prompt))


def write_labelled(conversation: Conversation) -> dict[str, Any]:
    """The row of a conversation whose answer has a label, of which `read` makes the same again."""
    prompt, completion = parts(conversation)
    return {"prompt": prompt, "completion": completion} | extras(conversation) | {"label": conversation.desirable}


FORMAT = RowFormat(
    "prompt-completion", ("prompt", "completion"), ANSWER_EXTRAS, '{"prompt": "...", "completion": "..."}', read
)
