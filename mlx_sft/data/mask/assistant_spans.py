"""A traced rendering → the spans of its assistant turns: what the model must write itself.

Where the template has {% generation %} tags, the spans are those that the tags enclose. Tags of real templates enclose more than the
model writes (the header, white space) or less (not the end token).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.mask.headers import Headers
from mlx_sft.data.mask.reasoning import after_empty_think_block
from mlx_sft.data.mask.reference_rendering import ReferenceRendering
from mlx_sft.data.mask.trace import (
    NOBODY,
    Refusal,
    Span,
    TracedRendering,
    assistant_messages,
    called_functions,
    places_of,
)

_SPACE = re.compile(r"\s*")

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

    def leaves_out_words(self, rendering: TracedRendering, letters_written: int) -> bool:
        """Whether a letter of its message, of which so many are written, or the name of a function that it calls, is not in the turn."""
        letters = rendering.letters[self.message]
        if letters_written < letters:
            return True
        written = self.text(rendering.text)
        content = rendering.messages[self.message].get("content")
        if not letters and isinstance(content, str) and content.strip() not in written:
            return True
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
    written, letters = (
        places_of(messages, len(rendering.messages))
        for messages in (rendering.char_to_message, rendering.letter_to_message)
    )
    return [_turn(rendering, index, written[index], letters[index], starts, ending) for index in supervised]


def ends_pattern(end_tokens: frozenset[str]) -> re.Pattern[str]:
    """Matches one end-of-sequence token or several, one directly after the other."""
    return re.compile(f"(?:{'|'.join(map(re.escape, sorted(end_tokens))) or '(?!)'})+")


def ends_in_space(text: str) -> bool:
    return text != text.rstrip()


def _turn(
    rendering: TracedRendering,
    index: int,
    written: NDArray[np.int64],
    letters: NDArray[np.int64],
    starts: Starts,
    ending: re.Pattern[str],
) -> Turn:
    """The turn of a message, given the places of what was written for it and of its letters."""
    if not len(written):
        return Turn(index, (), ends=False)
    first, last = int(written[0]), int(written[-1]) + 1
    if last - first != len(written):
        raise Refusal(f"it writes message {index + 1} in several places")
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
    space = _SPACE.match(text, end)
    next_character = space.end() if space else end
    after_loop = ending.match(text, next_character)
    if after_loop is None or rendering.char_to_message[next_character] != NOBODY:
        return Turn(index, tuple(spans), ends=own is not None)
    return Turn(index, (*spans, after_loop.span()), ends=True)


# By the template's own tags


def tagged_turns(
    reference: ReferenceRendering, rendering: TracedRendering, supervised: Sequence[int], end_tokens: frozenset[str]
) -> list[Turn]:
    """The turns of these messages as the tags enclose them.

    Raises:
        Refusal: where it is not certain to which message a tag's span belongs, or another's words are in it.
    """
    ending = ends_pattern(end_tokens)
    rendering = replace(rendering, tags=_outermost(rendering.tags))
    tagged_messages = _messages_of_tags(rendering, ending)
    headers = Headers(reference, rendering.header)
    turns = []
    for index in supervised:
        own = [span for span, message in zip(rendering.tags, tagged_messages, strict=True) if message == index]
        turns.append(_tagged_turn(rendering, headers, index, own, ending))
    return turns


def _outermost(tags: Sequence[Span]) -> tuple[Span, ...]:
    """The spans of tags that enclose something, without those inside of another; in order."""
    kept: list[Span] = []
    for start, end in sorted({span for span in tags if span[1] > span[0]}, key=lambda span: (span[0], -span[1])):
        if not kept or end > kept[-1][1]:
            kept.append((start, end))
    return tuple(kept)


def _messages_of_tags(rendering: TracedRendering, ending: re.Pattern[str]) -> list[int]:
    """The assistant message of each span: whose letters are in it, else for which it was written."""
    assistants = assistant_messages(rendering.messages)
    found: list[int] = []
    for start, end in rendering.tags:
        letters = set(rendering.letter_to_message[start:end].tolist()) - {NOBODY}
        if not letters <= set(assistants):
            raise Refusal("it tags words of others as generated")
        candidates = letters or set(rendering.char_to_message[start:end].tolist()) - {NOBODY}
        if not candidates and found and ending.fullmatch(rendering.text[start:end].strip()):
            candidates = {found[-1]}  # what ends the conversation
        found.append(candidates.pop() if len(candidates) == 1 else NOBODY)
    if not set(found) <= set(assistants):
        raise Refusal("it is not certain to which message each part belongs that it tags as generated")
    return found


def _tagged_turn(
    rendering: TracedRendering, headers: Headers, index: int, tags: Sequence[Span], ending: re.Pattern[str]
) -> Turn:
    text = rendering.text
    spans: list[Span] = []
    ends = False
    for number, (start, end) in enumerate(tags):
        if number == 0:
            own_letters = np.flatnonzero(rendering.letter_to_message[start:end] == index)
            first_letter = start + int(own_letters[0]) if len(own_letters) else end
            start = headers.start_in_tag(index, start, end, first_letter)
        letters = np.flatnonzero(rendering.letter_to_message[start:end] == index)
        after_letters = start + int(letters[-1]) + 1 if len(letters) else start
        own = list(ending.finditer(text, after_letters, end))[-1:]
        if own and not text[own[0].end() : end].strip():
            end = own[0].end()
        elif not ends_in_space(text[rendering.after_words(index, after_letters, end) : end]) and (
            following := ending.match(text, end)
        ):
            own, end = [following], following.end()
        elif number == len(tags) - 1 or ending.match(text, end):
            end = start + len(text[start:end].rstrip())
        ends = bool(own) and own[0].end() == end
        if end > start:
            spans.append((start, end))
    return Turn(index, tuple(spans), ends)
