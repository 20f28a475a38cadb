"""What Ollama makes of a Modelfile and a conversation: the text that the model is given.

As Ollama's own code does it (`parser`, `server/routes.go`, `template`): the file is read with its quotes, the file's system message
is put first where the conversation begins with none, messages of one role that follow each other become one, and the template is
given `.System` (all system messages) and `.Messages` (system messages too). Knows nothing of how a Modelfile is made.
"""

from __future__ import annotations

import re
from typing import Any

from mlx_sft.convert.ollama import go_template

_COMMENTS = re.compile(r"(?:\s+|#.*)*")
_NAME = re.compile(r"(PARAMETER[ \t]+)?(\w+)[ \t]")


def parse_modelfile(text: str) -> list[tuple[str, str]]:
    """The commands of a Modelfile and their values, in order: `("FROM", "./model.gguf")`, `("stop", "<|im_end|>")`.

    Raises:
        ValueError: Where Ollama would find no end of a value.
    """
    commands: list[tuple[str, str]] = []
    position = 0
    while (blank := _COMMENTS.match(text, position)) and blank.end() < len(text):
        name = _NAME.match(text, blank.end())
        if name is None:
            raise ValueError("no command")
        value, position = _value(text, name.end())
        commands.append((name[2], value))
    return commands


def _value(text: str, position: int) -> tuple[str, int]:
    """A value from here, and where it ends: at the first end of a line at which its quotes are closed."""
    kept = ""
    for place in range(position, len(text) + 1):
        character = text[place : place + 1]
        if character in ("\n", "\r", ""):
            value = _unquoted(kept.strip())
            if value is not None:
                return value, place
        if character in ("\n", "\r", "\t") or character.isprintable():  # what is not is lost
            kept += character
    raise ValueError("a value without an end")


def _unquoted(value: str) -> str | None:
    """None while its quotes are open."""
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            closed = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if closed else None
    return value


def rendered(modelfile: str, messages: list[dict[str, str]], think: bool | None = None) -> str:
    """The prompt of a conversation.

    Args:
        modelfile: Its text.
        messages: With `role` and `content`; an assistant's may have its reasoning in `reasoning_content`, Ollama's `thinking`.
        think: What is asked for; None where nothing is said of it.

    Raises:
        ValueError: Where the file or its template is none.
    """
    values = dict(parse_modelfile(modelfile))
    if values.get("SYSTEM") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": values["SYSTEM"]}, *messages]
    collated: list[dict[str, Any]] = []
    for message in messages:
        if collated and collated[-1]["Role"] == message["role"]:
            collated[-1]["Content"] += "\n\n" + message["content"]
            continue
        thinking = message.get("reasoning_content", "")
        collated.append({"Role": message["role"], "Content": message["content"], "Thinking": thinking})
    systems = [message["content"] for message in messages if message["role"] == "system"]
    data = {
        "System": "\n\n".join(systems),
        "Messages": collated,
        "Think": bool(think),
        "IsThinkSet": think is not None,
    }
    return go_template.render(values["TEMPLATE"], data)
