"""A stand-in of Ollama: what it makes of a Modelfile and a conversation, the text that the model is given.

As Ollama's own code does it (`parser`, `server/routes.go`, `template`): the file is read with its quotes, the file's system message
is put first where the conversation begins with none, neighbouring messages of one role become one, and the template is given
`.System` (all system messages) and `.Messages` (system messages too).
"""

from __future__ import annotations

import re

from tests import go_template

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
        if character in ("\n", "\r", "\t") or character.isprintable():  # Ollama drops what is not
            kept += character
    raise ValueError("a value without an end")


def _unquoted(value: str) -> str | None:
    """None while its quotes are open."""
    for quotes in ('"""', '"'):
        if value.startswith(quotes):
            closed = len(value) >= 2 * len(quotes) and value.endswith(quotes)
            return value[len(quotes) : -len(quotes)] if closed else None
    return value


def rendered(modelfile: str, messages: list[dict[str, str]]) -> str:
    """The prompt that a Modelfile with a TEMPLATE makes of a conversation.

    Raises:
        ValueError: Where the file cannot be read, or its template has what `go_template` does not know.
    """
    values = dict(parse_modelfile(modelfile))
    if values.get("SYSTEM") and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": values["SYSTEM"]}, *messages]
    collated: list[dict[str, str]] = []
    for message in messages:
        if collated and collated[-1]["Role"] == message["role"]:
            collated[-1]["Content"] += "\n\n" + message["content"]
        else:
            collated.append({"Role": message["role"], "Content": message["content"]})
    systems = [message["content"] for message in messages if message["role"] == "system"]
    return go_template.render(values["TEMPLATE"], {"System": "\n\n".join(systems), "Messages": collated})
