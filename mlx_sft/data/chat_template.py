"""A chat template in the place of the model's own: by a name, from a file, or as its text. A run keeps the text.

The named ones are in `chat_templates/`; they write plain turns, and refuse tools.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_sft.errors import USAGE, UserError, did_you_mean
from mlx_sft.files import read_json, read_text, user_path
from mlx_sft.gate import MOST_TEMPLATE_BYTES
from mlx_sft.writing import write_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMED = Path(__file__).parent / "chat_templates"
FILE, _OLD_FILE = "chat_template.jinja", "chat_template.json"

_MARKERS = re.compile(r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>")


def names() -> list[str]:
    """Of the templates that there are."""
    return sorted(file.stem for file in _NAMED.glob("*.jinja"))


def template_text(given: str) -> str:
    """The template that a name, a file or the text itself stands for; raises `UserError` where there is none."""
    if _is_text(given):
        return given
    if given in names():
        return (_NAMED / f"{given}.jinja").read_text(encoding="utf-8")
    path = user_path(given)
    if path.is_file():
        text = read_text(path, most=MOST_TEMPLATE_BYTES, hint="give a text file in UTF-8")
        if _is_text(text):
            return text
        raise UserError("it writes nothing of a conversation", where=given, hint="give a chat template in Jinja")
    near = did_you_mean(given, names())
    raise UserError(
        f"no chat template is named so, and there is no such file: {given}",
        where="chat_template",
        hint=near or f"there is {', '.join(names())}; or give a file in Jinja",
        exit_code=USAGE,
    )


def with_template(tokenizer: PreTrainedTokenizerBase, given: str | None, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer, with another chat template where one is given; else with that of chat_template.json, where it has none itself.

    Raises:
        UserError: If there is no such template, or a named one has marks that are no tokens of this tokenizer.
    """
    if given is not None:
        text = template_text(given)
        marks = sorted(set(_MARKERS.findall(text))) if given in names() else []
        if missing := [mark for mark in marks if mark not in tokenizer.get_vocab()]:
            what = f"the chat template {given} writes {missing[0]}, which is no token of {tokenizer.name_or_path}"
            hint = "give --chat-template plain, which needs the end token alone"
            raise UserError(what, where="chat_template", hint=hint, exit_code=USAGE)
        tokenizer.chat_template = text
    elif not tokenizer.chat_template and (text := _in_json(folder / _OLD_FILE)):
        tokenizer.chat_template = text
    return tokenizer


def write_template(given: str | None, folder: Path) -> None:
    """As the file that transformers reads before any other; nothing where none was given."""
    if given is not None:
        write_file(folder / FILE, template_text(given))


def _is_text(given: str) -> bool:
    return "{%" in given or "{{" in given


def _in_json(file: Path) -> str:
    try:
        text = read_json(file).get("chat_template")
    except UserError:
        return ""
    return text if isinstance(text, str) else ""
