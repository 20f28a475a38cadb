"""The Modelfile of a model: its chat template in Ollama's form, its default system message, the tokens that stop it.

Written from the pieces that the chat template writes, then read again as Ollama reads it, and compared with the chat template on
sample conversations: it is exact there, or it is not written. Knows nothing of the model itself.

What Ollama's form has no way to say, the notes say: it cannot trim a message, and it has no tools here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_sft.convert.ollama.go_template import literal
from mlx_sft.convert.ollama.pieces import Around, Chat, Message, Pieces, Unfit, assistant, system, user, watch
from mlx_sft.convert.ollama.rendering import parse_modelfile, rendered
from mlx_sft.data.template import todays_variables
from mlx_sft.data.tokenizer import end_tokens
from mlx_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HEAD = "# Made by mlx-sft. In this folder: ollama create NAME -f Modelfile\nFROM {source}\n"
_LAST = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Modelfile:
    """A Modelfile's text, and what a person should know of it."""

    text: str
    notes: tuple[str, ...]


def make_modelfile(
    tokenizer: PreTrainedTokenizerBase, variables: dict[str, Any], source: str, adds_bos: bool | None = None
) -> Modelfile:
    """The Modelfile of a model, which writes its conversations as the tokenizer does.

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
    today = todays_variables(tokenizer)
    if adds_bos is None:
        adds_bos = begins_with_bos(tokenizer)
    bos = str(tokenizer.bos_token) if adds_bos and tokenizer.bos_token else ""
    chat = Chat(tokenizer, today | variables, left_out=bos)
    try:
        pieces = watch(chat)
        template, default = _template(pieces)
        commands = {"TEMPLATE": template} | ({"SYSTEM": default} if default else {})
        stops = _stops(chat, pieces)
        text = _HEAD.format(source=source)
        text += "".join(f'{name} """{value}"""\n' for name, value in commands.items())
        text += "".join(f'PARAMETER stop "{stop}"\n' for stop in stops)
        _check(text, [("FROM", source), *commands.items(), *(("stop", stop) for stop in stops)], chat, pieces)
    except Unfit as unfit:
        raise UserError(
            f"this chat template cannot be put in Ollama's form exactly: {unfit}",
            where=tokenizer.name_or_path,
            hint="leave out --ollama: the GGUF carries the chat template itself, which llama.cpp follows",
        ) from None
    return Modelfile(text, tuple(_notes(chat, pieces, bos, today.get("date_string"))))


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer puts the beginning-of-sequence token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def _template(pieces: Pieces) -> tuple[str, str]:
    """The Go template, and the system message of a conversation that has none; empty where there is none."""
    in_place = _in_place(pieces)
    if in_place is not None:
        (lead, default), question = in_place, literal(pieces.user.before)
    else:
        (lead, question), default = _question_with_system(pieces), ""
    roles = {
        "user": f"{question}{{{{ .Content }}}}{literal(pieces.user.after)}",
        "assistant": _answer(pieces),
    }
    if in_place is not None and pieces.system_later is not None:
        before, after = map(literal, pieces.system_later)
        after = after.removesuffix(literal(pieces.user.before))
        roles = {"system": f"{before}{{{{ .Content }}}}{after}", **roles}
    choice = "{{ else ".join(f'if eq .Role "{role}" }}}}{text}' for role, text in roles.items())
    prompt = _if('and $last (ne .Role "assistant")', _prompt(pieces)) if pieces.prompt else ""
    body = f"{_LAST}{{{{ {choice}{{{{ end }}}}{prompt}"
    first = "{{ $first := true }}" if "$first" in body else ""
    return f"{literal(lead)}{first}{{{{ range $i, $_ := .Messages }}}}{body}{{{{ end }}}}", default


def _in_place(pieces: Pieces) -> tuple[str, str] | None:
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


def _question_with_system(pieces: Pieces) -> tuple[str, str]:
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


def _answer(pieces: Pieces) -> str:
    before, after = map(literal, pieces.assistant)
    silent, last = literal(pieces.silent), literal(pieces.silent_last)
    thinking = silent
    if silent != last:
        thinking = _if("$last", last, silent) if last else _if("not $last", silent)
    if pieces.thinking is not None:
        # Ollama takes what stands in this block, before and after the reasoning, for the tags by which to know it.
        around, condition = pieces.thinking, ".Thinking" if pieces.thinks_in_history else "and $last .Thinking"
        block = f"{literal(around.before)}{{{{ .Thinking }}}}{literal(around.after)}"
        thinking = _if(condition, block, thinking)
    return f"{before}{thinking}{{{{ .Content }}}}{_if('not $last', after) if after else ''}"


def _prompt(pieces: Pieces) -> str:
    prompt, silent = pieces.prompt, pieces.prompt_without_thinking
    if silent is None:
        return literal(prompt)
    condition = "and $.IsThinkSet (not $.Think)"
    if silent.startswith(prompt):
        return literal(prompt) + _if(condition, literal(silent.removeprefix(prompt)))
    return _if(condition, literal(silent), literal(prompt))


def _if(condition: str, then: str, otherwise: str = "") -> str:
    return f"{{{{ if {condition} }}}}{then}{'{{ else }}' + otherwise if otherwise else ''}{{{{ end }}}}"


def _stops(chat: Chat, pieces: Pieces) -> list[str]:
    """The tokens that end a text, and that with which the template ends an answer."""
    end = pieces.assistant.after.lstrip()
    ending = next(({token} for token in chat.tokens if end.startswith(token)), set())
    return sorted(end_tokens(chat.tokenizer) & set(chat.tokens) | ending)


def _check(text: str, commands: list[tuple[str, str]], chat: Chat, pieces: Pieces) -> None:
    """Raise `Unfit` where Ollama would read or write other than what is meant."""
    if not _is_read_as(text, commands):
        raise Unfit("it has characters that a Modelfile cannot hold")
    for messages, think in _samples(pieces):
        expected = chat.prompt(messages, **({} if think is None else {"enable_thinking": think}))
        written = rendered(text, messages, think)
        if expected is not None and written != expected:
            raise Unfit(_difference(expected, written))


def _is_read_as(text: str, commands: list[tuple[str, str]]) -> bool:
    try:
        return parse_modelfile(text) == commands
    except ValueError:
        return False


def _samples(pieces: Pieces) -> Iterator[tuple[list[Message], bool | None]]:
    """Conversations, and whether the model is asked to think."""
    rules, ask, more, other = (
        system('Be brief:\n- {{ .Content }}, "quoted" or `so`\n- {% raw %} and """'),
        user("What is 2 + 2?\n\nWhy?"),
        user("naïve 😀 {x}"),
        user("4"),
    )
    say, answer = assistant("**4**, since\n\n1. 2\n2. and 2"), assistant('{"answer": 4}')
    thought = assistant("Four.", "2 and 2\nmake 4")
    talks = [
        *([ask], [ask, say, more], [ask, say, more, answer, other]),
        *([rules, ask], [rules, ask, say, more], [rules, ask, say, more, answer, other]),
        *([ask, say], [ask, say, more, answer], [rules, ask, say, more, answer]),
        *([ask, thought, more], [ask, say, more, thought], [rules, ask, thought, more, thought]),
    ]
    if _in_place(pieces) is not None:
        talks += [[ask, say, rules, more], [rules, ask, say, system("Now at length."), more]]
    yield from ((talk, None) for talk in talks)
    if pieces.prompt_without_thinking is not None:
        yield from ((talk, False) for talk in talks if talk[-1]["role"] == "user")


def _difference(expected: str, written: str) -> str:
    place = next(
        (i for i, (one, other) in enumerate(zip(expected, written, strict=False)) if one != other),
        min(len(expected), len(written)),
    )
    start = max(0, place - _SHOWN // 2)
    shown, other = (text[start : place + _SHOWN] for text in (expected, written))
    return f"it writes {shown!r} where Ollama would write {other!r}"


def _notes(chat: Chat, pieces: Pieces, bos: str, date: str | None) -> Iterator[str]:
    if pieces.rejects_system:
        yield "the chat template takes no system message; in Ollama, one is put before the first question"
    padded = chat.prompt([user("  zq  ")])
    if padded is not None and "  zq  " not in padded:
        yield "the chat template trims white space around messages; Ollama cannot, and sends it to the model"
    if bos and not (Chat(chat.tokenizer, chat.variables).prompt([user("a")]) or "").startswith(bos):
        yield f"Ollama begins a prompt with {bos}, and the chat template does not"
    if date:
        yield f"the date that the chat template writes is fixed in the Modelfile: {date}"
    reasoned = chat.prompt([user("a"), assistant("<think>\nzq\n</think>\n\nb"), user("c")])
    if pieces.thinking is None and reasoned is not None and "zq" not in reasoned:
        yield "the chat template leaves out earlier reasoning; Ollama cannot, and sends it to the model again"
