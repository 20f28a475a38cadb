"""`{"instruction": ..., "input": ..., "output": ...}`, as Stanford Alpaca writes it, with an optional history of pairs."""

from __future__ import annotations

from mlx_sft.data.conversation import Conversation, answer_of, conversation_of, text_of
from mlx_sft.data.formats import ANSWER_EXTRAS, RowFormat
from mlx_sft.data.json_text import kind, parsed
from mlx_sft.data.messages import Message, read_messages
from mlx_sft.data.readers import Row


def read(row: Row) -> Conversation:
    history = parsed(row.value.get("history"), "history") or []
    if not isinstance(history, list):
        raise ValueError(f"history must be a list of [question, answer] pairs, not {kind(history)}")
    messages: list[Message] = []
    places: list[str] = []
    for index, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(f'history[{index}] is not a pair, such as ["question", "answer"]')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        places += [f"history[{index}], question", f"history[{index}], answer"]
    asked = {key: text for key in ("instruction", "input") if (text := text_of(row, key))}
    if not asked:
        raise ValueError("instruction and input are both empty")
    messages += [{"role": "user", "content": "\n".join(asked.values())}]
    messages += [answer_of(row, text_of(row, "output"))]
    return conversation_of(row, read_messages(messages, "messages", [*places, " and ".join(asked), "output"]))


FORMAT = RowFormat(
    "alpaca",
    ("instruction", "output"),
    ("input", "history", *ANSWER_EXTRAS),
    '{"instruction": "...", "input": "...", "output": "..."}',
    read,
)
