"""The Modelfile of a GGUF file for Ollama: which template makes the prompt, the default system message, the tokens that end an answer.

A chat template with tools or reasoning is followed by Ollama itself, out of the GGUF file. For any other, Ollama has to be given a
TEMPLATE in Go's language. That is written from the pieces that the chat template writes, read again as Ollama reads it, and compared
with the chat template on sample conversations: it is exact there, or the Modelfile is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_sft.convert.targets.gguf.chat_pieces import (
    Around,
    Chat,
    Message,
    Pieces,
    Unfit,
    assistant,
    end_of_answer,
    find_pieces,
    system,
    user,
)
from mlx_sft.convert.targets.gguf.go_template import literal
from mlx_sft.convert.targets.gguf.ollama import REQUIRED, follows_gguf_template, parse_modelfile, rendered
from mlx_sft.data.template import todays_variables
from mlx_sft.data.tokenizer import end_tokens
from mlx_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEAD = "# Made by mlx-sft. In this folder: ollama create NAME -f Modelfile\n"
_NO_TEMPLATE = "# No TEMPLATE: Ollama follows the chat template in the GGUF file.\n"
_LAST = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
_SHOWN = 60


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
    tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any], source: str, adds_bos: bool | None = None
) -> Modelfile:
    """The Modelfile of a model, by which Ollama writes conversations as the tokenizer does.

    Args:
        tokenizer: Of the model.
        variables: Of its chat template, as the model was trained with them.
        source: The model's file, from the Modelfile's place.
        adds_bos: Whether the model's file has Ollama begin a prompt with the beginning-of-sequence token; as the tokenizer does,
            where it is not said.

    Raises:
        UserError: If there is no chat template, or it cannot be put in Ollama's form exactly.
    """
    if not tokenizer.chat_template:
        raise UserError("this tokenizer has no chat template", where=tokenizer.name_or_path, hint="leave out --ollama")
    named = tokenizer.chat_template
    in_gguf = named if isinstance(named, str) else named.get("default", "")
    if follows_gguf_template(in_gguf):
        return _without_template(Chat(tokenizer, variables), source, in_gguf)
    if adds_bos is None:
        adds_bos = _begins_with_bos(tokenizer)
    bos = str(tokenizer.bos_token) if adds_bos and tokenizer.bos_token else ""
    chat = Chat(tokenizer, todays_variables(tokenizer) | variables, left_out=bos)
    try:
        pieces = find_pieces(chat)
        template, default = _template(pieces)
        commands = [("FROM", source), ("TEMPLATE", template), *([("SYSTEM", default)] if default else [])]
        commands += [("stop", token) for token in _stops(chat)]
        text = _HEAD + _text(commands)
        _check(text, chat, pieces)
    except Unfit as unfit:
        raise UserError(
            f"this chat template cannot be put in Ollama's form exactly: {unfit}",
            where=tokenizer.name_or_path,
            hint="leave out --ollama: the GGUF carries the chat template itself, which llama.cpp follows",
        ) from None
    return Modelfile(text, tuple(_notes(chat, pieces, bos)))


def _without_template(chat: Chat, source: str, chat_template: str) -> Modelfile:
    """For a chat template that Ollama takes out of the GGUF file, and calls without the variables of this run."""
    commands = [("FROM", source), ("REQUIRES", REQUIRED), *(("stop", token) for token in _stops(chat))]
    notes = [f"Ollama {REQUIRED} or later is needed, which follows the chat template in the GGUF file"]
    talk = [user("a"), assistant("b"), user("c")]
    if chat.prompt(talk) != Chat(chat.tokenizer, {}).prompt(talk):
        given = ", ".join(f"{name}={value!r}" for name, value in chat.variables.items())
        notes.append(f"Ollama does not give the chat template what this run gave it: {given}")
    return Modelfile(_HEAD + _NO_TEMPLATE + _text(commands), tuple(notes), chat_template)


def _text(commands: list[tuple[str, str]]) -> str:
    """The commands as Ollama reads them; raises `Unfit` where it would read something else."""
    forms = {"TEMPLATE": 'TEMPLATE """{}"""\n', "SYSTEM": 'SYSTEM """{}"""\n', "stop": 'PARAMETER stop "{}"\n'}
    text = "".join(forms.get(name, name + " {}\n").format(value) for name, value in commands)
    try:
        same = parse_modelfile(text) == commands
    except ValueError:
        same = False
    if not same:
        raise Unfit("it has characters that a Modelfile cannot hold")
    return text


def _begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts the beginning-of-sequence token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def _stops(chat: Chat) -> list[str]:
    """The tokens that end a text, and the one with which the template ends an answer."""
    try:
        end = end_of_answer(chat).lstrip()
    except Unfit:
        end = ""
    ending = next(({token} for token in chat.tokens if end.startswith(token)), set())
    return sorted(end_tokens(chat.tokenizer) & set(chat.tokens) | ending)


def _template(pieces: Pieces) -> tuple[str, str]:
    """The Go template, and the system message of a conversation that has none; empty where there is none."""
    answer, after = map(literal, pieces.assistant)
    roles = {"assistant": f"{answer}{{{{ .Content }}}}{_if('not $last', after) if after else ''}"}
    in_place = _system_in_place(pieces)
    if in_place is not None and pieces.system_later is not None:
        (lead, default), question = in_place, literal(pieces.user.before)
        before, after = map(literal, pieces.system_later)
        system = {"system": f"{before}{{{{ .Content }}}}{after.removesuffix(question)}"}
    else:
        (lead, question), default, system = _system_in_question(pieces), "", {}
    roles = system | {"user": f"{question}{{{{ .Content }}}}{literal(pieces.user.after)}"} | roles
    choice = "{{ else ".join(f'if eq .Role "{role}" }}}}{text}' for role, text in roles.items())
    prompt = _if('and $last (ne .Role "assistant")', literal(pieces.prompt)) if pieces.prompt else ""
    body = f"{_LAST}{{{{ {choice}{{{{ end }}}}{prompt}"
    first = "{{ $first := true }}" if "$first" in body else ""
    return f"{literal(lead)}{first}{{{{ range $i, $_ := .Messages }}}}{body}{{{{ end }}}}", default


def _system_in_place(pieces: Pieces) -> tuple[str, str] | None:
    """The beginning of every text, and the default system message, where a system message is written alike wherever it stands."""
    head, later, user_before = pieces.system_first, pieces.system_later, pieces.user.before
    if head is None or later is None or head.after != later.after or not head.before.endswith(later.before):
        return None
    if not later.after.endswith(user_before):
        return None
    lead = head.before.removesuffix(later.before)
    if pieces.opening == lead + user_before:
        return lead, ""
    if not (pieces.opening.startswith(head.before) and pieces.opening.endswith(later.after)):
        return None
    default = pieces.opening[len(head.before) : -len(later.after) or None]
    return (lead, default) if default.strip() else None


def _system_in_question(pieces: Pieces) -> tuple[str, str]:
    """The beginning of every text, and what stands before a question, where the system message is written with the first
    question or the last one alone."""
    opening, usual, system = pieces.opening, literal(pieces.user.before), pieces.system_first
    lead = opening.removesuffix(pieces.user.before) if opening.endswith(pieces.user.before) else ""
    if pieces.system_last is not None:
        return lead, _if("and $.System $last", _with_system(pieces.system_last), usual)
    if system is not None and not system.before.startswith(lead):
        lead = ""
    first = literal(opening.removeprefix(lead))
    if system is not None:
        first = _if("$.System", _with_system(Around(system.before.removeprefix(lead), system.after)), first)
    elif pieces.rejects_system:  # Ollama cannot reject it, and left out it would be lost without a word
        first += _if("$.System", "{{ $.System }}\n\n")
    return lead, first if first == usual else _if("$first", first, usual) + "{{ $first = false }}"


def _with_system(around: Around) -> str:
    return f"{literal(around.before)}{{{{ $.System }}}}{literal(around.after)}"


def _if(condition: str, then: str, otherwise: str = "") -> str:
    return f"{{{{ if {condition} }}}}{then}{'{{ else }}' + otherwise if otherwise else ''}{{{{ end }}}}"


def _check(text: str, chat: Chat, pieces: Pieces) -> None:
    """Raise `Unfit` where Ollama would write something else than the chat template."""
    for messages in _samples(several_systems=_system_in_place(pieces) is not None):
        expected, written = chat.prompt(messages), rendered(text, messages)
        if expected is not None and written != expected:
            raise Unfit(_difference(expected, written))


def _samples(several_systems: bool) -> Iterator[list[Message]]:
    rules, ask, more, other = (
        system('Be brief:\n- {{ .Content }}, "quoted" or `so`\n- {% raw %} and """'),
        user("What is 2 + 2?\n\nWhy?"),
        user("naïve 😀 {x}"),
        user("4"),
    )
    say, answer = assistant("**4**, since\n\n1. 2\n2. and 2"), assistant('{"answer": 4}')
    thought = assistant("Four.") | {"reasoning_content": "2 and 2\nmake 4"}
    yield from ([ask], [ask, say, more], [ask, say, more, answer, other])
    yield from ([rules, ask], [rules, ask, say, more], [rules, ask, say, more, answer, other])
    yield from ([ask, say], [ask, say, more, answer], [rules, ask, say, more, answer])
    yield from ([ask, thought, more], [ask, say, more, thought], [rules, ask, thought, more, thought])
    if several_systems:
        yield from ([ask, say, rules, more], [rules, ask, say, system("Now at length."), more])


def _difference(expected: str, written: str) -> str:
    place = next(
        (i for i, (one, other) in enumerate(zip(expected, written, strict=False)) if one != other),
        min(len(expected), len(written)),
    )
    start = max(0, place - _SHOWN // 2)
    shown, other = (text[start : place + _SHOWN] for text in (expected, written))
    return f"it writes {shown!r} where Ollama would write {other!r}"


def _notes(chat: Chat, pieces: Pieces, bos: str) -> Iterator[str]:
    if pieces.rejects_system:
        yield "the chat template takes no system message; in Ollama, one is put before the first question"
    padded = chat.prompt([user("  zq  ")])
    if padded is not None and "  zq  " not in padded:
        yield "the chat template trims white space around messages; Ollama cannot, and sends it to the model"
    if bos and not (Chat(chat.tokenizer, chat.variables).prompt([user("a")]) or "").startswith(bos):
        yield f"Ollama begins a prompt with {bos}, and the chat template does not"
    if date := chat.variables.get("date_string"):
        yield f"the date that the chat template writes is fixed in the Modelfile: {date}"
