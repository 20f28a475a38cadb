"""A traced rendering → the spans of its assistant turns: what the model must write itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import numpy as np

from mlx_sft.data.mask.reasoning import after_empty_think_block
from mlx_sft.data.mask.traced_rendering import NOBODY, Refusal, Span, TracedRendering, called_functions

Starts = Callable[[int, int, int], int]
"""Where a turn starts, given its message, where the first character of that message is, and where its first letter is."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What the model must write of one assistant message; nothing where the template leaves the message out.

    Args:
        message: The index of the message.
        spans: Half-open spans of characters.
        ends: Whether the last of it is an end-of-sequence token.
    """

    message: int
    spans: tuple[Span, ...]
    ends: bool

    def text(self, whole: str) -> str:
        """What the model must write, given the text of the whole conversation."""
        return "".join(whole[start:end] for start, end in self.spans)

    def from_place(self, place: int) -> Turn:
        """The part of it that stands from a place on."""
        spans = ((max(start, place), end) for start, end in self.spans)
        return Turn(self.message, tuple((start, end) for start, end in spans if start < end), self.ends)

    def moved(self, characters: int) -> Turn:
        return Turn(self.message, tuple((start + characters, end + characters) for start, end in self.spans), self.ends)

    def without_empty_thinking(self, whole: str) -> Turn:
        """Without an empty think block at its start."""
        return self.from_place(after_empty_think_block(whole, *self.spans[0])) if self.spans else self

    def leaves_out_words(self, rendering: TracedRendering) -> bool:
        """Whether a letter of its message, or the name of a function that it calls, is not in the turn."""
        if np.count_nonzero(rendering.letter_to_message == self.message) < rendering.letters[self.message]:
            return True
        written = self.text(rendering.text)
        names = (function.get("name") for function in called_functions(rendering.messages[self.message]))
        return any(isinstance(name, str) and name not in written for name in names)

    def is_silent(self, whole: str, tokens: Set[str]) -> bool:
        """Whether nothing but these tokens, such as that of its end, is in the turn."""
        written = self.text(whole)
        for token in sorted(tokens, key=len, reverse=True):
            written = written.replace(token, "")
        return not written.strip()

    def may_be_hidden(self, rendering: TracedRendering) -> bool:
        """Whether the turn seems to be left out, though its words may be there: they have no letters to be seen by."""
        content = rendering.messages[self.message].get("content")
        has_words = isinstance(content, str) and content.strip()
        return not self.spans and not rendering.letters[self.message] and bool(has_words)


def traced_turns(
    rendering: TracedRendering, supervised: Sequence[int], starts: Starts, end_tokens: frozenset[str]
) -> list[Turn]:
    """The turns of these messages.

    Args:
        rendering: The conversation.
        supervised: The indices of the messages.
        starts: Tells where their turns start.
        end_tokens: The texts of the model's end-of-sequence tokens.

    Raises:
        Refusal: where it is not certain what the model must write.
    """
    ending = ends_pattern(end_tokens)
    return [_turn(rendering, index, starts, ending) for index in supervised]


def ends_pattern(end_tokens: frozenset[str]) -> re.Pattern[str]:
    """Matches one end-of-sequence token or several, one directly after the other."""
    return re.compile(f"(?:{'|'.join(map(re.escape, sorted(end_tokens))) or '(?!)'})+")


def ends_in_space(text: str) -> bool:
    return text != text.rstrip()


def _turn(rendering: TracedRendering, index: int, starts: Starts, ending: re.Pattern[str]) -> Turn:
    written = np.flatnonzero(rendering.char_to_message == index)
    if not len(written):
        return Turn(index, (), ends=False)
    first, last = int(written[0]), int(written[-1]) + 1
    if last - first != len(written):
        raise Refusal(f"it writes message {index + 1} in several places")
    letters = np.flatnonzero(rendering.letter_to_message == index)
    start = starts(index, first, int(letters[0]) if len(letters) else last)
    return _through_end(rendering, index, start, int(letters[-1]) + 1 if len(letters) else start, last, ending)


def _through_end(
    rendering: TracedRendering, index: int, start: int, after_letters: int, last: int, ending: re.Pattern[str]
) -> Turn:
    """The turn through the end token after its words, or directly after its loop item, and one more right after the loop."""
    text = rendering.text
    after_words = rendering.after_words(index, after_letters, last)
    within = ending.search(text, after_words, last)
    own = ending.match(text, within.start() if within else last)
    if within is None and ends_in_space(text[after_words:last]):
        own = None
    end = own.end() if own else len(text[:last].rstrip())
    spans = [(start, end)] if end > start else []
    next_character = len(text) - len(text[end:].lstrip())
    after_loop = ending.match(text, next_character)
    if after_loop is None or rendering.char_to_message[next_character] != NOBODY:
        return Turn(index, tuple(spans), ends=own is not None)
    return Turn(index, (*spans, after_loop.span()), ends=True)
