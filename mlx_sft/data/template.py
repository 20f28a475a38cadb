r"""Conversation + the tokenizer's chat template → text, and the character spans that the model must learn.

Knows what a turn is; knows nothing of tokens.

A template writes a conversation as it likes: it rewrites history, merges tool responses, adds headers. So the spans are
neither searched for in the text nor derived from shorter conversations; the template is watched while it writes, and each
character of the text has its owner. A turn starts after the generation prompt, which the model does not write, and ends
with its end-of-turn token:

    text      <|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n
    owners    000000000000000000000000000000000011111111111111111111111111111111111111
    header                                      -----------------------
    span                                                               =============

Nothing is guessed. What is watched is the writing of a copy in which every letter is recoloured, one colour a message. Its
text must equal the tokenizer's own rendering of the conversation in all but these letters, and must show every assistant's
letters inside its own turn and all others outside. Otherwise the conversation is refused.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import Template, TemplateError
from numpy.typing import NDArray

from mlx_sft.data.colour import called_functions, own_letters, recoloured
from mlx_sft.data.formats import REASONING_KEYS, Conversation
from mlx_sft.data.watch import NOBODY, Alphabet, Integers, Watch, compile_watched
from mlx_sft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REASONING_OPENERS = ("<think>", "<thinking>", "<reasoning>", "<seed:think>", "[THINK]")
"""Where one of these stands in the generation prompt, what it opens is the model's own turn already."""
RESERVED_KWARGS = frozenset(
    {
        *("conversation", "messages", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "tokenize", "tokenizer_kwargs"),
        *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "sanitize_control_tokens"),
    }
)
"""What `apply_chat_template` takes besides a template's own variables."""

# Whatever a template's code may raise on data that it was not written for.
_RENDERING_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_DATE_FORMAT = re.compile(r"""strftime_now\(["']([^"']+)["']\)""")

Messages = list[dict[str, Any]]
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a person should know about how a template wrote a conversation, in numbers that add up over rows.

    Attributes:
        turns: Assistant turns that are learnt.
        turns_without_end: Those of them without a supervised end-of-turn token: the model is not taught to stop there.
        turns_with_text_left_out: Turns that are to be learnt and have words of their own that the template leaves out,
            such as earlier reasoning.
        systems_left_out: System messages of which the template writes nothing.
        systems_folded: System messages that the template writes inside another message's turn.
    """

    turns: int = 0
    turns_without_end: int = 0
    turns_with_text_left_out: int = 0
    systems_left_out: int = 0
    systems_folded: int = 0

    def __add__(self, other: Facts) -> Facts:
        return Facts(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Facts)))


NO_FACTS = Facts()


@dataclass(frozen=True, slots=True)
class Rendering:
    """A rendered conversation.

    Attributes:
        text: As the template writes it.
        spans: The half-open character spans in it that the model must learn.
        facts: What a person should know about it.
    """

    text: str
    spans: list[Span]
    facts: Facts = NO_FACTS


class Refusal(Exception):
    """Why a template's writing of a conversation is not understood; a person sees it inside a `UserError`."""


def render(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    *,
    train_on: Literal["all", "last"] = "all",
    end_tokens: frozenset[str] = frozenset(),
) -> Rendering:
    """Render a conversation with the tokenizer's chat template and find the spans that the model must learn.

    A span is an assistant turn (content, reasoning, tool calls, in whatever form the template writes them) from the end
    of its header through its end-of-turn token, without the white space that follows. A turn of whose words the template
    leaves nothing is not learnt: it would teach the model to say nothing.

    Args:
        tokenizer: Its `apply_chat_template` is the reference for the text.
        conversation: Learnt are the assistant turns of `messages[first_learnt:]`.
        train_on: All of these, or only the last.
        end_tokens: The texts of the model's end-of-sequence tokens.

    Raises:
        UserError: where the tokenizer has no template, the template rejects the conversation, or how it writes it is not
            understood.
    """
    for name in sorted(RESERVED_KWARGS & conversation.template_kwargs.keys()):
        raise UserError(
            f"{name} is not a variable of a chat template",
            where=conversation.origin,
            hint="leave it out",
        )
    messages = [_as_template_sees(message) for message in conversation.messages]
    text = _reference(tokenizer, conversation, messages)
    learnt = [index for index in _assistants(messages) if index >= conversation.first_learnt]
    learnt = learnt[-1 if train_on == "last" else 0 :]
    try:
        writing = _watch(tokenizer, conversation, messages, text)
        turns = {index: writing.turn(index, end_tokens) for index in learnt}
    except Refusal as refusal:
        raise UserError(
            f"the chat template of {_name(tokenizer)} is not understood well enough to know what "
            f"the model must learn here: {refusal}",
            where=conversation.origin,
            hint="use a model with a ChatML, Qwen or Llama 3 template, or give rows of plain `text`",
        ) from None
    cut = [index for index, turn in turns.items() if writing.leaves_out_words(index, turn)]
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()} if cut else set()
    silent = [index for index in cut if writing.is_silent(turns[index], end_tokens | added)]
    spans = [span for index, turn in turns.items() if index not in silent for span in turn]
    return Rendering(text, spans, Facts(turns=len(turns) - len(silent), turns_with_text_left_out=len(cut)))


def todays_variables(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """`date_string` as of today, for a template that writes the date unless it is given one; else nothing.

    Llama 3.2's does. Without a fixed date, the same rows would be other rows tomorrow.
    """
    templates = tokenizer.chat_template
    source = templates if isinstance(templates, str) else " ".join((templates or {}).values())
    pattern = _DATE_FORMAT.search(source) if "date_string" in source else None
    return {"date_string": f"{datetime.now():{pattern[1]}}"} if pattern else {}


def _as_template_sees(message: dict[str, Any]) -> dict[str, Any]:
    """A copy as `apply_chat_template` hands it on: without nulls, its reasoning under the names that templates read.

    It is also done beforehand because older releases of transformers leave the reasoning where it is.
    """
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _reference(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, messages: Messages) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"{_name(tokenizer)} has no chat template",
            where=conversation.origin,
            hint="use an instruct model, whose tokenizer has one, or give rows of plain `text`",
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=list(conversation.tools) if conversation.tools is not None else None,
                tokenize=False,
                **conversation.template_kwargs,
            )
        )
    except _RENDERING_ERRORS as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(
            f"the chat template rejects this conversation: {reason or type(error).__name__}",
            where=conversation.origin,
            hint="change the messages (roles, their order, the fields of tool calls) to what the template takes",
        ) from error


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return tokenizer.name_or_path or "this tokenizer"


def _assistants(messages: Messages) -> list[int]:
    return [index for index, message in enumerate(messages) if message.get("role") == "assistant"]


@dataclass(frozen=True, slots=True)
class Writing:
    """A conversation as its template wrote it.

    `owners[i]` is the message in whose loop item character i was written and `colours[i]` the message whose letter it is,
    `NOBODY` where there is none. `header` is what stands before an assistant's turn and the model does not write.
    `messages` are the recoloured ones, and message i has `letters[i]` coloured letters to be written.
    """

    text: str
    owners: Integers
    colours: Integers
    header: str
    messages: Messages
    letters: list[int]

    def turn(self, index: int, end_tokens: frozenset[str]) -> list[Span]:
        """The spans of the assistant's message `index`; none where the template leaves the message out."""
        owned = np.flatnonzero(self.owners == index)
        if not len(owned):
            return []
        first, last = int(owned[0]), int(owned[-1]) + 1
        if last - first != len(owned):
            raise Refusal(f"it writes message {index + 1} in several places")
        letters = np.flatnonzero(self.colours == index)
        start = self._start(first, int(letters[0]) if len(letters) else last, index)
        return self._through_end(start, int(letters[-1]) + 1 if len(letters) else start, last, end_tokens)

    def leaves_out_words(self, index: int, turn: list[Span]) -> bool:
        """Whether a letter of the message, or the name of a function that it calls, is not in its turn."""
        if np.count_nonzero(self.colours == index) < self.letters[index]:
            return True
        written = "".join(self.text[start:end] for start, end in turn)
        names = (function.get("name") for function in called_functions(self.messages[index]))
        return any(isinstance(name, str) and name not in written for name in names)

    def is_silent(self, turn: list[Span], tokens: Set[str]) -> bool:
        """Whether nothing but these tokens, such as that of its end, is in a turn."""
        written = "".join(self.text[start:end] for start, end in turn)
        for token in sorted(tokens, key=len, reverse=True):
            written = written.replace(token, "")
        return not written.strip()

    def _start(self, first: int, first_letter: int, index: int) -> int:
        """After the header, which stands before the message's first letter, or before its loop item."""
        position = self.text.find(self.header, first, first_letter)
        if position >= 0:
            return position + len(self.header)
        if self.text.endswith(self.header, 0, first):
            return first
        raise Refusal(f"message {index + 1} does not begin with the generation prompt {self.header!r}")

    def _through_end(self, start: int, after_letters: int, last: int, end_tokens: frozenset[str]) -> list[Span]:
        """Through the end token after the letters, and one more that stands right after the loop over messages."""
        ending = re.compile(f"(?:{'|'.join(map(re.escape, end_tokens)) or '(?!)'})+")
        own = ending.search(self.text, after_letters, last)
        end = own.end() if own else len(self.text[:last].rstrip())
        spans = [(start, end)] if end > start else []
        next_character = len(self.text) - len(self.text[end:].lstrip())
        after_loop = ending.match(self.text, next_character)
        if after_loop and self.owners[next_character] == NOBODY:
            spans.append(after_loop.span())
        return spans


def _watch(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, messages: Messages, text: str) -> Writing:
    """The writing of the conversation, by the first variant of watching that is free of contradictions."""
    template = compile_watched(tokenizer.get_chat_template(tools=conversation.tools))
    alphabet = Alphabet.absent_from(text, len(messages))
    if alphabet is None:
        raise Refusal("the messages are too many, or hold every kind of private-use character")
    variables = {
        "messages": [recoloured(m, alphabet.colour(index), template.constants) for index, m in enumerate(messages)],
        "tools": conversation.tools,
        "documents": None,
        **tokenizer.special_tokens_map,
        **conversation.template_kwargs,
    }
    refusal = Refusal("it cannot be watched")
    for variant in template.variants:
        try:
            writing = _watch_once(variant, variables, text, alphabet)
            _check_colours(messages, writing)
            return writing
        except Refusal as contradiction:
            refusal = contradiction
    raise refusal


def _watch_once(variant: Template, variables: dict[str, Any], text: str, alphabet: Alphabet) -> Writing:
    """Watch the template write the recoloured messages; its text must be the reference but for their letters."""

    def write(with_prompt: bool) -> tuple[str, Integers]:
        watch = Watch(variables["messages"], alphabet)
        variables["add_generation_prompt"] = with_prompt
        try:
            return alphabet.owners(variant.render(**variables, **watch.functions()))
        except _RENDERING_ERRORS as error:
            raise Refusal(f"it fails when it is watched: {error}") from error

    prompted, owners = write(with_prompt=True)
    header = prompted[len(text) :]
    colours = _read_colours(prompted[: len(text)], text, alphabet)
    if colours is None:
        # Some templates write an end token where they write no prompt: compare what follows the messages.
        prompt = _after_messages(prompted, owners)
        written, owners = write(with_prompt=False)
        header = prompt.removeprefix(_after_messages(written, owners))
        colours = _read_colours(written, text, alphabet)
    if colours is None:
        raise Refusal("its writing depends on the letters of the messages, or on being watched")
    recoloured_messages = variables["messages"]
    letters = [own_letters(message, alphabet.colour(index)) for index, message in enumerate(recoloured_messages)]
    return Writing(text, owners[: len(text)], colours, _before_reasoning(header), recoloured_messages, letters)


def _after_messages(text: str, owners: Integers) -> str:
    owned = np.flatnonzero(owners != NOBODY)
    return text[int(owned[-1]) + 1 :] if len(owned) else text


def _before_reasoning(header: str) -> str:
    openers = [header.find(opener) for opener in REASONING_OPENERS if opener in header]
    return header[: min(openers)] if openers else header


def _read_colours(coloured: str, text: str, alphabet: Alphabet) -> Integers | None:
    """Whose letter each character is, or None where the texts differ in anything but coloured letters."""
    characters, plain = _code_points(coloured), _code_points(text)
    colours = alphabet.colours(characters)
    if len(characters) != len(plain) or ((characters != plain) & (colours == NOBODY)).any():
        return None
    return colours


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _check_colours(messages: Messages, writing: Writing) -> None:
    """Raise `Refusal` where an assistant's letters stand outside its turn, or another's inside it."""
    owners, colours = writing.owners, writing.colours
    is_assistant = np.zeros(len(messages) + 1, bool)  # the last for NOBODY
    is_assistant[_assistants(messages)] = True
    misplaced = (is_assistant[colours] | is_assistant[owners]) & (owners != colours) & (colours != NOBODY)
    if misplaced.any():
        index = int(colours[np.argmax(misplaced)])
        raise Refusal(f"words of message {index + 1} stand where another message is written")
    for index, message in enumerate(messages):
        if message.get("role") == "developer" and not (colours == index).any():
            raise Refusal(f"it leaves out message {index + 1}, whose role is developer")
