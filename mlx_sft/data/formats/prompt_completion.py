"""`{"prompt": ..., "completion": ...}`, texts or lists of messages; the prompt is context."""

from __future__ import annotations

from mlx_sft.data.conversation import Conversation, answer_of, as_messages, conversation_of
from mlx_sft.data.formats import ANSWER_EXTRAS, RowFormat
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


FORMAT = RowFormat(
    "prompt-completion", ("prompt", "completion"), ANSWER_EXTRAS, '{"prompt": "...", "completion": "..."}', read
)
