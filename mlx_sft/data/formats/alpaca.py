"""`{"instruction": ..., "input": ..., "output": ...}`, as Stanford Alpaca writes it, with an optional history of pairs."""

from __future__ import annotations

from mlx_sft.data.conversation import Conversation, answer_of, conversation_of, text_of
from mlx_sft.data.formats import ANSWER_EXTRAS, RowFormat
from mlx_sft.data.json_text import is_blank, kind, parsed
from mlx_sft.data.messages import Message, read_messages
from mlx_sft.data.readers import Row


def read(row: Row) -> Conversation:
    prompt = prompt_of(row)
    answer = read_messages([answer_of(row, text_of(row, "output"))], "output", ["output"])
    return conversation_of(row, prompt + answer)


def prompt_of(row: Row) -> list[Message]:
    """What stands before the answer: the history, and the user's message."""
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
    instruction, given = text_of(row, "instruction"), text_of(row, "input")
    if not given and not is_blank(row.value.get("context")):
        what = "the instruction may be about the row's `context`, and nothing says where that goes"
        raise ValueError(f"{what}: --columns input=context puts it behind the instruction")
    messages.append(asked_with(instruction, given))
    asked = " and ".join(key for key, text in (("instruction", instruction), ("input", given)) if text)
    return read_messages(messages, "messages", [*places, asked])


def asked_with(instruction: str, given: str) -> Message:
    """The user's message: an instruction, and on the next line the input to it; either may be empty."""
    if not instruction and not given:
        raise ValueError("instruction and input are both empty")
    return {"role": "user", "content": "\n".join(filter(None, (instruction, given)))}


FORMAT = RowFormat(
    "alpaca",
    ("instruction", "output"),
    ("input", "history", *ANSWER_EXTRAS),
    '{"instruction": "...", "input": "...", "output": "..."}',
    read,
)
