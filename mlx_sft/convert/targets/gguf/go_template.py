"""A chat template as Ollama's TEMPLATE in Go's language: guessed from what it writes around the messages of one conversation, and proved.

    messages   user: FIRST             assistant: ANSWER                    user: SECOND
    text       <|im_start|>user\nFIRST <|im_end|>\n<|im_start|>assistant\n  ANSWER<|im_end|>\n<|im_start|>user\nSECOND ...
    pieces     opening                 after + before                       after + before

What stands between two messages is cut in two where the text would end after the first of them. There is a guess for each place that a
system message may have. None is trusted: it must write sample conversations as the chat template does, character by character.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from jinja2 import Environment, Template

from mlx_sft.convert.targets.gguf.chat import Chat, Message, Unfit, between, length_in_common, message

_SHOWN = 90
"""Characters around a difference that a person is shown."""

_AS_JINJA = {
    '{{ if eq .Role "system" }}': "{% if role == 'system' %}",
    '{{ if eq .Role "user" }}': "{% if role == 'user' %}",
    '{{ else if eq .Role "user" }}': "{% elif role == 'user' %}",
    '{{ else if eq .Role "assistant" }}': "{% elif role == 'assistant' %}",
    "{{ .Content }}": "{{ content }}",
    "{{ $.System }}": "{{ system }}",
    "{{ if $.System }}": "{% if system %}",
    "{{ if and $.System $last }}": "{% if system and last %}",
    "{{ if $first }}": "{% if first %}",
    "{{ $first = false }}": "",
    "{{ if not $last }}": "{% if not last %}",
    '{{ if and $last (ne .Role "assistant") }}': "{% if last and role != 'assistant' %}",
    "{{ else }}": "{% else %}",
    "{{ end }}": "{% endif %}",
}
"""Every action that a TEMPLATE here has, in the language of chat templates. A constant, `{{ "{" }}`, is the same in both."""


@dataclass(frozen=True)
class GoTemplate:
    """A TEMPLATE, and the system message of a conversation that has none.

    Attributes:
        lead: What every prompt begins with.
        body: What is written of each message, in Go's language. `$first` is whether no question was before, `$last` whether no message
            follows, `$.System` all system messages.
        default_system: Of the Modelfile; empty where there is none.
    """

    lead: str
    body: str
    default_system: str = ""

    @property
    def text(self) -> str:
        """All of it in Go's language."""
        first = "{{ $first := true }}" if "$first" in self.body else ""
        last = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        return f"{literal(self.lead)}{first}{{{{ range $i, $_ := .Messages }}}}{last}{self.body}{{{{ end }}}}"

    def rendered(self, messages: list[Message]) -> str:
        """The prompt that Ollama makes of a conversation in which no two neighbours have the same role."""
        if self.default_system and messages[0]["role"] != "system":
            messages = [message("system", self.default_system), *messages]
        system = "\n\n".join(one["content"] for one in messages if one["role"] == "system")
        text, first = self.lead, True
        for number, one in enumerate(messages, 1):
            text += self._as_jinja.render(one, system=system, first=first, last=number == len(messages))
            first = first and one["role"] != "user"
        return text

    @cached_property
    def _as_jinja(self) -> Template:
        body = self.body
        for action, same in _AS_JINJA.items():
            body = body.replace(action, same)
        return Environment(keep_trailing_newline=True).from_string(body)  # noqa: S701 (no HTML)


def go_template(chat: Chat) -> GoTemplate:
    """The TEMPLATE with which Ollama writes what a chat template writes; raises `Unfit` where none is proved to."""
    turns, reason = _Turns(chat), ""
    for guess, samples in (
        (turns.with_system_turns, [*_SAMPLES, *_SAMPLES_OF_SYSTEM_TURNS]),
        (turns.with_system_in_first_question, _SAMPLES),
        (turns.with_system_in_last_question, _SAMPLES),
    ):
        try:
            template = guess()
        except Unfit as unfit:  # its system message stands elsewhere
            reason = reason or str(unfit)
            continue
        reason = _difference(template, chat, samples)
        if not reason:
            return template
    raise Unfit(reason)


def end_of_answer(chat: Chat) -> str:
    """What a template writes after an answer, be it the last message or not; raises `Unfit` where that cannot be seen."""
    to_question = between(chat.prompt([_FIRST, _ANSWER, _SECOND]), _FIRST, _ANSWER, _SECOND)[2]
    return chat.common_beginning(to_question, chat.end([_FIRST, _ANSWER]))


# --- guesses ------------------------------------------------------------------------------------------------------------------------


class _Turns:
    """The pieces of a template, and what may be made of them."""

    def __init__(self, chat: Chat) -> None:
        self.chat = chat
        talk = chat.prompt([_FIRST, _ANSWER, _SECOND])
        self.opening, to_answer, to_question, end = between(talk, _FIRST, _ANSWER, _SECOND)
        self.after_question = chat.common_beginning(end, to_answer, chat.end([_FIRST]))
        self.after_answer = end_of_answer(chat)
        self.question = to_question.removeprefix(self.after_answer)
        self.answer = to_answer.removeprefix(self.after_question)
        self.prompt = end.removeprefix(self.after_question)
        self.lead = self.opening.removesuffix(self.question) if self.opening.endswith(self.question) else ""
        self.with_system = chat.prompt([_SYSTEM, _FIRST, _ANSWER, _SECOND])

    def with_system_turns(self) -> GoTemplate:
        """A system message is written alike wherever it stands; where there is none, another may be put first."""
        later = self.chat.prompt([_FIRST, _ANSWER, _SYSTEM, _SECOND])
        before, after = between(later, _FIRST, _ANSWER, _SYSTEM, _SECOND)[2:4]
        before, after = before.removeprefix(self.after_answer), after.removesuffix(self.question)
        lead = between(self.with_system, _SYSTEM, _FIRST, _ANSWER, _SECOND)[0].removesuffix(before)
        default = ""
        if self.opening != lead + self.question:
            default = self.opening.removeprefix(lead + before).removesuffix(after + self.question)
        return self._template(
            lead, literal(self.question), f"{literal(before)}{{{{ .Content }}}}{literal(after)}", default
        )

    def with_system_in_first_question(self) -> GoTemplate:
        """What stands before the first question is another where there is a system message, or is always the same."""
        lead, usual = self.lead, literal(self.question)
        if self.with_system is None:
            # Ollama cannot reject a system message, and left out it would be lost without a word.
            first = literal(self.opening.removeprefix(lead)) + _if("$.System", "{{ $.System }}\n\n")
        elif _SYSTEM["content"] not in self.with_system:
            first = literal(self.opening.removeprefix(lead))
        else:
            before, after, *_ = between(self.with_system, _SYSTEM, _FIRST, _ANSWER, _SECOND)
            lead = lead if before.startswith(lead) else ""
            without = literal(self.opening.removeprefix(lead))
            first = _if("$.System", _with_system(before.removeprefix(lead), after), without)
        return self._template(lead, first if first == usual else _if("$first", first, usual) + "{{ $first = false }}")

    def with_system_in_last_question(self) -> GoTemplate:
        before, after = between(self.with_system, _FIRST, _ANSWER, _SYSTEM, _SECOND)[2:4]
        last = _with_system(before.removeprefix(self.after_answer), after)
        return self._template(self.lead, _if("and $.System $last", last, literal(self.question)))

    def _template(self, lead: str, question: str, system: str = "", default_system: str = "") -> GoTemplate:
        """From what stands before a question, and what a system message is, both in Go's language."""
        after_answer = _if("not $last", literal(self.after_answer)) if self.after_answer else ""
        roles = {"system": system} if system else {}
        roles["user"] = f"{question}{{{{ .Content }}}}{literal(self.after_question)}"
        roles["assistant"] = f"{literal(self.answer)}{{{{ .Content }}}}{after_answer}"
        choice = "{{ else ".join(f'if eq .Role "{role}" }}}}{text}' for role, text in roles.items())
        prompt = _if('and $last (ne .Role "assistant")', literal(self.prompt)) if self.prompt else ""
        return GoTemplate(lead, f"{{{{ {choice}{{{{ end }}}}{prompt}", default_system)


def literal(text: str) -> str:
    """Text as a template writes it: a brace, which might begin an action, becomes a constant."""
    return text.replace("{", '{{ "{" }}')


def _if(condition: str, then: str, otherwise: str = "") -> str:
    return f"{{{{ if {condition} }}}}{then}{'{{ else }}' + otherwise if otherwise else ''}{{{{ end }}}}"


def _with_system(before: str, after: str) -> str:
    return f"{literal(before)}{{{{ $.System }}}}{literal(after)}"


# --- proof --------------------------------------------------------------------------------------------------------------------------


def _difference(template: GoTemplate, chat: Chat, samples: list[list[Message]]) -> str:
    """Where Ollama would write something else than the chat template; empty where it would not."""
    for messages in samples:
        expected, written = chat.prompt(messages), template.rendered(messages)
        if expected is not None and written != expected:
            start = max(0, length_in_common(expected, written) - _SHOWN // 3)
            shown, other = (text[start : start + _SHOWN] for text in (expected, written))
            return f"it writes {shown!r} where Ollama would write {other!r}"
    return ""


_SYSTEM, _FIRST = message("system", "zqsystemqz"), message("user", "zqfirstqz")
_ANSWER, _SECOND = message("assistant", "zqanswerqz"), message("user", "zqsecondqz")
"""Words that no template writes by itself."""

_RULES = message("system", 'Be brief:\n- {{ .Content }}, "quoted" or `so`\n- {% raw %} and """')
_ASK, _MORE, _OTHER = (message("user", words) for words in ("What is 2 + 2?\n\nWhy?", "naïve 😀 {x}", "4"))
_SAY, _JSON = message("assistant", "**4**, since\n\n1. 2\n2. and 2"), message("assistant", '{"answer": 4}')
_THOUGHT = message("assistant", "Four.") | {"reasoning_content": "2 and 2\nmake 4"}

_TALKS = [
    [_ASK],
    [_ASK, _SAY],
    [_ASK, _SAY, _MORE],
    [_ASK, _SAY, _MORE, _JSON],
    [_ASK, _SAY, _MORE, _JSON, _OTHER],
    [_ASK, _THOUGHT, _MORE],
    [_ASK, _SAY, _MORE, _THOUGHT],
]
_SAMPLES = [*_TALKS, *([_RULES, *talk] for talk in _TALKS)]
_SAMPLES_OF_SYSTEM_TURNS = [
    [_ASK, _SAY, _RULES, _MORE],
    [_RULES, _ASK, _SAY, message("system", "Now at length."), _MORE],
]
