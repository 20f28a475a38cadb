"""`{"system": "SYSTEM: ...", "chat": "USER: ... ASSISTANT: ..."}`, as Glaive writes it: one text with the turns of a conversation.

system  SYSTEM: You are a helpful assistant with access to the following functions. Use them if required - {"name": ...} {...}
chat    USER: ...  ASSISTANT: <functioncall> {"name": ..., "arguments": '{...}'} <|endoftext|>  FUNCTION RESPONSE: {...}
"""

from __future__ import annotations

import re
from typing import Any

from mlx_sft.data.conversation import Conversation, conversation_of, text_of
from mlx_sft.data.formats import RowFormat
from mlx_sft.data.json_text import kind, parse_json
from mlx_sft.data.messages import Message, read_messages
from mlx_sft.data.readers import Row

_TURN = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_SYSTEM, _END, _CALL = "SYSTEM:", "<|endoftext|>", "<functioncall>"
_QUOTED = re.compile(r"""(\{\s*"name"\s*:.*?"arguments"\s*:\s*)'(.*)'\s*\}""", re.DOTALL)
_NEXT = re.compile(r"\}\s*(?=\{)")


def read(row: Row) -> Conversation:
    if isinstance(row.value["chat"], list):
        raise ValueError("chat is a list of messages and no text: give --columns messages=chat")
    before, *turns = _TURN.split(text_of(row, "chat"))
    if before.strip() or not turns:
        raise ValueError("chat does not begin with USER: or ASSISTANT:, as the turns of such a text do")
    pairs = list(zip(turns[::2], turns[1::2], strict=True))
    places = [f"chat, turn {number}" for number in range(1, len(pairs) + 1)]
    messages: list[Message] = [
        _message(role, text.strip(), place) for (role, text), place in zip(pairs, places, strict=True)
    ]
    words, tools = _system(text_of(row, "system"))
    return conversation_of(row, read_messages(messages, "chat", places), system=words, tools=tools or None)


def _message(role: str, text: str, place: str) -> Message:
    text = text.removesuffix(_END).strip()
    words, mark, call = text.partition(_CALL)
    if role != "ASSISTANT" or not mark:
        return {"role": _ROLES[role], "content": text}
    return {"role": "assistant", "content": words.strip(), "tool_calls": [_call(call.strip(), place)]}


def _call(text: str, place: str) -> dict[str, Any]:
    """A call, whose arguments stand in single quotes, as JSON has none."""
    quoted = _QUOTED.fullmatch(text)
    try:
        call = parse_json(f"{quoted[1]}null}}" if quoted else text)
    except ValueError as error:
        raise ValueError(f"{place} is no call ({error})") from None
    if not isinstance(call, dict):
        raise ValueError(f"{place} is no call, but {kind(call)}")
    return {**call, "arguments": quoted[2].replace("\\'", "'")} if quoted else call


def _system(text: str) -> tuple[str, list[Any]]:
    """The words of the system's turn, and the functions that are listed behind them."""
    text = text.strip().removeprefix(_SYSTEM).strip()
    words, brace, functions = text.partition("{")
    if not brace:
        return text, []
    try:
        return words.strip(), parse_json("[" + _NEXT.sub("},", brace + functions) + "]")
    except ValueError:
        return text, []  # words with a brace in them


FORMAT = RowFormat(
    "glaive",
    ("system", "chat"),
    ("chat_template_kwargs",),
    r'{"system": "SYSTEM: ...", "chat": "USER: ...\nASSISTANT: ..."}',
    read,
)
