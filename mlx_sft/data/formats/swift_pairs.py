"""ms-swift's preferences: a conversation that ends with the chosen answer, and `rejected_response`, which could stand in its place."""

from __future__ import annotations

from mlx_sft.data.conversation import Item, as_messages
from mlx_sft.data.formats import EXTRAS, RowFormat
from mlx_sft.data.formats.pairs import NAMES, pair_of
from mlx_sft.data.messages import read_messages
from mlx_sft.data.readers import Row


def read(row: Row) -> tuple[Item, ...]:
    *prompt, chosen = read_messages(row.value["messages"], "messages")
    rejected = as_messages(row.value["rejected_response"], "rejected_response", "assistant")
    for message, what in ((chosen, "messages end"), (rejected[-1], "rejected_response ends")):
        if message["role"] != "assistant":
            raise ValueError(f"{what} with a message of the {message['role']}, and an answer is the assistant's")
    if not prompt:
        raise ValueError("messages are one answer alone: a pair has a prompt, which is what stands before it")
    return pair_of(row, prompt, ([chosen], rejected), len(prompt))


FORMAT = RowFormat(
    "swift-pairs",
    ("messages", "rejected_response"),
    EXTRAS,
    '{"messages": [{"role": "user", "content": "..."}, ...], "rejected_response": "..."}',
    read,
    NAMES,
)
