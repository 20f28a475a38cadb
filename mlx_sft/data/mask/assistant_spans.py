"""A text of which each character's writer is known → the spans of its assistant turns.

Knows what a turn is; knows neither Jinja nor tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOBODY = -1
"""The owner of what no message wrote."""
THINK_BLOCKS = (
    *((r"<think(?::\w+)?>", r"</think(?::\w+)?>"), ("<thinking>", "</thinking>"), ("<reasoning>", "</reasoning>")),
    *(("<seed:think>", "</seed:think>"), (r"\[THINK\]", r"\[/THINK\]"), ("<longcat_think>", "</longcat_think>")),
    *((r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"), (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>")),
    ("Here are my reasoning steps:", r"\[BEGIN FINAL RESPONSE\]"),
    *((r"<\|channel>thought", r"<channel\|>"), (r"<\|think\|>", r"<\|/think\|>"), ("◁think▷", "◁/think▷")),
)
"""Patterns of what opens and closes reasoning. Where a generation prompt opens it, the model's own turn has begun."""

Integers = NDArray[np.int32]
Messages = list[dict[str, Any]]
Span = tuple[int, int]
Starts = Callable[[int, int, int], int]
"""Where a turn starts, given its message, where its writer's text begins, and where its first letter is."""

_OPENER = re.compile("|".join(opener for opener, _ in THINK_BLOCKS))
_CLOSER = re.compile("|".join(closer for _, closer in THINK_BLOCKS))
_LONGEST_OPENER = 40  # characters
_OPENED_AT_END = re.compile("|".join(rf"(?:{opener})\s*(?:{closer}\s*)?\Z" for opener, closer in THINK_BLOCKS))
_EMPTY_THINKING = re.compile("|".join(rf"{opener}\s*{closer}\s*" for opener, closer in THINK_BLOCKS))


class Refusal(Exception):
    """Why a template's writing of a conversation is not understood; a person sees it inside a `UserError`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model must write of one assistant's message; nothing where the template leaves the message out."""

    message: int
    spans: tuple[Span, ...]
    ends: bool
    """Whether the last of it is an end-of-sequence token."""

    def text(self, whole: str) -> str:
        return "".join(whole[start:end] for start, end in self.spans)

    def from_place(self, place: int) -> Turn:
        """What of it stands from a place on."""
        spans = ((max(start, place), end) for start, end in self.spans)
        return Turn(self.message, tuple((start, end) for start, end in spans if start < end), self.ends)

    def moved(self, characters: int) -> Turn:
        return Turn(self.message, tuple((start + characters, end + characters) for start, end in self.spans), self.ends)

    def without_empty_thinking(self, whole: str) -> Turn:
        """Without an empty think block at its start."""
        found = _EMPTY_THINKING.match(whole, *self.spans[0]) if self.spans else None
        return self.from_place(found.end()) if found else self


@dataclass(frozen=True, slots=True)
class Writing:
    """A conversation as its template wrote it.

    `owners[i]` is the message in whose loop item character i was written and `colours[i]` the message whose letter it is,
    `NOBODY` where there is none. `header` is the generation prompt after the whole conversation, cut at a reasoning
    opener. `messages` are the recoloured ones, and message i has `letters[i]` coloured letters to be written. `tags` are
    the spans that the template's own {% generation %} tags enclose.
    """

    text: str
    owners: Integers
    colours: Integers
    header: str
    messages: Messages
    letters: list[int]
    tags: tuple[Span, ...] = ()

    def turns(self, learnt: Sequence[int], starts: Starts, end_tokens: frozenset[str]) -> list[Turn]:
        """The turns of these messages.

        Args:
            learnt: Their indices.
            starts: Where they start.
            end_tokens: The texts of the model's end-of-sequence tokens.

        Raises:
            Refusal: where it is not certain what the model must write.
        """
        ending = ends_pattern(end_tokens)
        return [self._turn(index, starts, ending) for index in learnt]

    def _turn(self, index: int, starts: Starts, ending: re.Pattern[str]) -> Turn:
        owned = np.flatnonzero(self.owners == index)
        if not len(owned):
            return Turn(index, (), ends=False)
        first, last = int(owned[0]), int(owned[-1]) + 1
        if last - first != len(owned):
            raise Refusal(f"it writes message {index + 1} in several places")
        letters = np.flatnonzero(self.colours == index)
        start = starts(index, first, int(letters[0]) if len(letters) else last)
        return self._through_end(index, start, int(letters[-1]) + 1 if len(letters) else start, last, ending)

    def _through_end(self, index: int, start: int, after_letters: int, last: int, ending: re.Pattern[str]) -> Turn:
        """Through the end token after the words, or directly after the turn, and one more right after the loop."""
        after_words = self.after_words(index, after_letters, last)
        within = ending.search(self.text, after_words, last)
        own = ending.match(self.text, within.start() if within else last)
        if within is None and ends_in_space(self.text[after_words:last]):
            own = None
        end = own.end() if own else len(self.text[:last].rstrip())
        spans = [(start, end)] if end > start else []
        next_character = len(self.text) - len(self.text[end:].lstrip())
        after_loop = ending.match(self.text, next_character)
        if after_loop is None or self.owners[next_character] != NOBODY:
            return Turn(index, tuple(spans), ends=own is not None)
        return Turn(index, (*spans, after_loop.span()), ends=True)

    def after_words(self, index: int, after_letters: int, last: int) -> int:
        """Where a content ends of which the last letter stands before a place: after what it has then (`.`, `<|im_end|>`)."""
        content = self.messages[index].get("content")
        if not isinstance(content, str):
            return after_letters
        for end in range(min(last, after_letters + len(content)), after_letters, -1):
            if content.endswith(self.text[after_letters:end]):
                return end
        return after_letters

    def leaves_out_words(self, turn: Turn) -> bool:
        """Whether a letter of the message, or the name of a function that it calls, is not in its turn."""
        if np.count_nonzero(self.colours == turn.message) < self.letters[turn.message]:
            return True
        written = turn.text(self.text)
        names = (function.get("name") for function in called_functions(self.messages[turn.message]))
        return any(isinstance(name, str) and name not in written for name in names)

    def is_silent(self, turn: Turn, tokens: Set[str]) -> bool:
        """Whether nothing but these tokens, such as that of its end, is in a turn."""
        written = turn.text(self.text)
        for token in sorted(tokens, key=len, reverse=True):
            written = written.replace(token, "")
        return not written.strip()

    def may_hide(self, turn: Turn) -> bool:
        """Whether a turn seems to be left out, and has words that have no letters to be seen by."""
        content = self.messages[turn.message].get("content")
        has_words = isinstance(content, str) and content.strip()
        return not turn.spans and not self.letters[turn.message] and bool(has_words)

    def check(self) -> None:
        """Raise `Refusal` where an assistant's letters stand outside its turn, or another's inside it."""
        is_assistant = np.zeros(len(self.messages) + 1, bool)  # the last for NOBODY
        is_assistant[assistant_messages(self.messages)] = True
        owners, colours = self.owners, self.colours
        misplaced = (is_assistant[colours] | is_assistant[owners]) & (owners != colours) & (colours != NOBODY)
        if misplaced.any():
            index = int(colours[np.argmax(misplaced)])
            raise Refusal(f"words of message {index + 1} stand where another message is written")


def assistant_messages(messages: Iterable[dict[str, Any]]) -> list[int]:
    return [index for index, message in enumerate(messages) if message.get("role") == "assistant"]


def before_no_reasoning(header: str) -> str:
    """A generation prompt without what says that there is no reasoning, which is another where there is some."""
    closer = _CLOSER.search(header)
    return header[: closer.start()] if closer else header


def called_functions(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The functions of a message's tool calls, in either of the forms that templates take."""
    calls = message.get("tool_calls")
    calls = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    functions = [call.get("function", call) for call in calls]
    return [function for function in functions if isinstance(function, dict)]


def before_reasoning(header: str, first: int = 0) -> str:
    """A generation prompt without the reasoning that it opens, which is the model's own turn already.

    Args:
        header: The prompt, maybe behind other text.
        first: Where it begins; an opener may begin before, with what the other text has in common with it.
    """
    openers = _OPENER.finditer(header, max(0, first - _LONGEST_OPENER))
    return header[: next((opener.start() for opener in openers if opener.end() > first), len(header))]


def without_opened_reasoning(context: str) -> str:
    """What stands before the model, without the reasoning that it opens at its end."""
    opened = _OPENED_AT_END.search(context)
    return context[: opened.start()] if opened else context


def ends_in_space(text: str) -> bool:
    return text != text.rstrip()


def ends_pattern(end_tokens: frozenset[str]) -> re.Pattern[str]:
    """One end-of-sequence token or several, one directly after the other."""
    return re.compile(f"(?:{'|'.join(map(re.escape, sorted(end_tokens))) or '(?!)'})+")
