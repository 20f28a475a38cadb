"""The spans that a template's own {% generation %} tags enclose → the turns of its assistants.

Tags of real templates enclose more than the model writes (the header, white space) or less (not the end token).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlx_sft.data.mask.assistant_spans import Turn, ends_in_space, ends_pattern
from mlx_sft.data.mask.headers import Headers
from mlx_sft.data.mask.reference_rendering import ReferenceRendering
from mlx_sft.data.mask.traced_rendering import NOBODY, Refusal, Span, TracedRendering, assistant_messages


def tagged_turns(
    reference: ReferenceRendering, rendering: TracedRendering, supervised: Sequence[int], end_tokens: frozenset[str]
) -> list[Turn]:
    """The turns of these messages as the tags enclose them.

    Raises:
        Refusal: where it is not certain to which message a tag's span belongs, or another's words are in it.
    """
    ending = ends_pattern(end_tokens)
    rendering = replace(rendering, tags=tuple(span for span in rendering.tags if span[1] > span[0]))
    tagged_messages = _messages_of_tags(rendering, ending)
    headers = Headers(reference, rendering.header)
    turns = []
    for index in supervised:
        own = [span for span, message in zip(rendering.tags, tagged_messages, strict=True) if message == index]
        turns.append(_turn(rendering, headers, index, own, ending))
    return turns


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


def _turn(
    rendering: TracedRendering, headers: Headers, index: int, tags: Sequence[Span], ending: re.Pattern[str]
) -> Turn:
    text = rendering.text
    spans: list[Span] = []
    ends = False
    for number, (start, end) in enumerate(tags):
        if number == 0:
            start = headers.start_in_tag(index, start, end)
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
