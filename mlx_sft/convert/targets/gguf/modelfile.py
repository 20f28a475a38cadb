"""The Modelfile of a GGUF file for Ollama: which template makes the prompt, the default system message, the tokens that end an answer.

A chat template with tools or reasoning is followed by Ollama itself, out of the GGUF file, whatever a TEMPLATE says that can do less. For
a plain one, Ollama has to be given a TEMPLATE in Go's language, or it may take one of its own that resembles it: the TEMPLATE is exact, or
the Modelfile is refused. `OLLAMA_GO_TEMPLATE=1` has Ollama follow a TEMPLATE always, and `=0` never: where we write one, that is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_sft.convert.targets.gguf.chat import Chat, Unfit, message
from mlx_sft.convert.targets.gguf.go_template import end_of_answer, go_template
from mlx_sft.data.template import todays_variables
from mlx_sft.data.tokenizer import end_tokens
from mlx_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REQUIRED = "0.30.11"
"""The first version of Ollama whose `/api/chat` and `/api/generate` both follow the chat template in a GGUF file."""

_HEAD = "# Made by mlx-sft. In this folder: ollama create NAME -f Modelfile\n"
_NO_TEMPLATE = "# No TEMPLATE: Ollama follows the chat template in the GGUF file, which has tools or reasoning.\n"
_A_TEMPLATE = "# Ollama follows this TEMPLATE, as the chat template in the GGUF file has neither tools nor reasoning.\n"


@dataclass(frozen=True, slots=True)
class Modelfile:
    """A Modelfile.

    Attributes:
        text: Of the file.
        notes: What a person should know of it.
        chat_template: The chat template that the GGUF file must hold, where the Modelfile has no TEMPLATE.
    """

    text: str
    notes: tuple[str, ...]
    chat_template: str | None = None


def make_modelfile(
    tokenizer: PreTrainedTokenizerBase,
    variables: dict[str, Any],
    source: str,
    adds_bos: bool | None = None,
    adapter: str = "",
) -> Modelfile:
    """The Modelfile of a model, by which Ollama writes conversations as the tokenizer does.

    Args:
        tokenizer: Of the model.
        variables: Of its chat template, as the model was trained with them.
        source: The model's file, from the Modelfile's place, or what Ollama calls the model.
        adds_bos: Whether the model's file has Ollama begin a prompt with the beginning-of-sequence token; as the tokenizer does,
            where it is not said.
        adapter: The file of an adapter on that model, where there is one.

    Raises:
        UserError: If there is no chat template, or it cannot be put in Ollama's form exactly.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "this tokenizer has no chat template",
            where=tokenizer.name_or_path,
            hint="leave out --ollama or --ollama-base",
        )
    named = tokenizer.chat_template
    in_gguf = named if isinstance(named, str) else named.get("default", "")
    if adds_bos is None:
        adds_bos = _begins_with_bos(tokenizer)
    bos = str(tokenizer.bos_token) if adds_bos and tokenizer.bos_token else ""
    origin = f"FROM {source}\n" + (f"ADAPTER {adapter}\n" if adapter else "")
    try:
        if _follows_gguf_template(in_gguf):
            return _without_template(Chat(tokenizer, variables), origin, in_gguf)
        return _with_template(Chat(tokenizer, todays_variables(tokenizer) | variables, left_out=bos), origin, bos)
    except Unfit as unfit:
        raise UserError(
            f"this chat template cannot be put in Ollama's form exactly: {unfit}",
            where=tokenizer.name_or_path,
            hint="leave out --ollama or --ollama-base: the GGUF of the model carries the chat template itself, which llama.cpp follows",
        ) from None


def _follows_gguf_template(chat_template: str) -> bool:
    """Whether Ollama follows a GGUF's chat template rather than a plain TEMPLATE, for what more that can do: tools, or reasoning.

    Ollama looks for these words (`chatTemplateCapabilities` in `server/images.go`, August 2026).
    """
    tools = "tools" in chat_template or "tool_call" in chat_template
    thinks = "<think>" in chat_template and "</think>" in chat_template
    splits = "content.split('</think>')" in chat_template or 'content.split("</think>")' in chat_template
    elsewhere = "reasoning_content" in chat_template or "<SPECIAL_12>" in chat_template
    return tools or thinks or (splits and not elsewhere)


def _without_template(chat: Chat, origin: str, chat_template: str) -> Modelfile:
    """For a chat template that Ollama takes out of the GGUF file, and calls without the variables of this run."""
    notes = [f"Ollama {REQUIRED} or later is needed, which follows the chat template in the GGUF file"]
    talk = [message("user", "a"), message("assistant", "b"), message("user", "c")]
    if chat.prompt(talk) != Chat(chat.tokenizer, {}).prompt(talk):
        given = ", ".join(f"{name}={value!r}" for name, value in chat.variables.items())
        notes.append(f"Ollama does not give the chat template what this run gave it: {given}")
    text = f"{_HEAD}{_NO_TEMPLATE}{origin}REQUIRES {REQUIRED}\n{_stops(chat)}"
    return Modelfile(text, tuple(notes), chat_template)


def _with_template(chat: Chat, origin: str, bos: str) -> Modelfile:
    """For a plain chat template."""
    template = go_template(chat)
    quoted = f"TEMPLATE {_quoted(template.text)}\n"
    if template.default_system:
        quoted += f"SYSTEM {_quoted(template.default_system)}\n"
    return Modelfile(f"{_HEAD}{_A_TEMPLATE}{origin}{quoted}{_stops(chat)}", tuple(_notes(chat, bos)))


def _quoted(value: str) -> str:
    """A value as Ollama reads it whole; raises `Unfit` for what would close its quotes, or is not printed and is dropped.

    A value in single quotes ends at the first line that ends with one; `"` alone would open triple ones.
    """
    if '"""' in value or not value.translate({ord("\n"): "", ord("\t"): ""}).isprintable():
        raise Unfit("it has characters that a Modelfile cannot hold")
    return f'"""{value}"""' if set(value) & set('"\n') else f'"{value}"'


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts the beginning-of-sequence token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def _stops(chat: Chat) -> str:
    """The tokens that end a text, and the one with which the template ends an answer, as parameters of Ollama."""
    try:
        end = end_of_answer(chat).lstrip()
    except Unfit:
        end = ""
    ending = next(({token} for token in chat.tokens if end.startswith(token)), set())
    stops = sorted(end_tokens(chat.tokenizer) & set(chat.tokens) | ending)
    return "".join(f"PARAMETER stop {_quoted(stop)}\n" for stop in stops)


def _notes(chat: Chat, bos: str) -> Iterator[str]:
    question, answer = message("user", "  zq  "), message("assistant", "a")
    if chat.prompt([message("system", "a"), question, answer, question]) is None:
        yield "the chat template takes no system message; in Ollama, one is put before the first question"
    if "  zq  " not in (chat.prompt([question]) or "  zq  "):
        yield "the chat template trims white space around messages; Ollama cannot, and sends it to the model"
    if bos and not (Chat(chat.tokenizer, chat.variables).prompt([question]) or "").startswith(bos):
        yield f"Ollama begins a prompt with {bos}, and the chat template does not"
    if date := chat.variables.get("date_string"):
        yield f"the date that the chat template writes is fixed in the Modelfile: {date}"
