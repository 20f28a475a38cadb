"""The spans that a template's own {% generation %} tags enclose → the turns of its assistants.

Knows what such a tag may enclose too much or too little; knows nothing of how a template is watched.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mlx_sft.data.mask.assistant_spans import (
    NOBODY,
    Refusal,
    Span,
    Turn,
    Writing,
    assistant_messages,
    ends_in_space,
    ends_pattern,
)
from mlx_sft.data.mask.headers import Headers
from mlx_sft.data.mask.reference_rendering import RENDERING_ERRORS, Reference, reason_of


def tagged_turns(
    reference: Reference, writing: Writing, learnt: Sequence[int], end_tokens: frozenset[str]
) -> list[Turn]:
    """The turns of these messages as the tags enclose them.

    Raises:
        Refusal: where it is not certain to which message a tag's span belongs, or another's words are in it.
    """
    ending = ends_pattern(end_tokens)
    writing = replace(writing, tags=tuple(span for span in writing.tags if span[1] > span[0]))
    owners = _owners(writing, ending)
    headers = Headers(reference, writing.header)
    turns = []
    for index in learnt:
        own = [span for span, owner in zip(writing.tags, owners, strict=True) if owner == index]
        turns.append(_turn(writing, headers, index, own, ending))
    return turns


def tracked(reference: Reference) -> Writing:
    """The writing of a conversation of which transformers' own tracker tells the tags and nobody tells more.

    Raises:
        Refusal: where the tracker's rendering is another.
    """
    blocks: list[str] = []
    tags: list[Span] = []
    template: Any = reference.compiled
    text = reference.text
    try:
        with template.environment.activate_tracker(blocks, tags):
            for block in template.generate(**reference.variables(reference.messages, prompt=False)):
                blocks.append(block)
    except RENDERING_ERRORS as error:
        raise Refusal(f"it fails when its tags are tracked: {reason_of(error)}") from error
    if "".join(blocks) != text:
        raise Refusal("it writes something else when its tags are tracked")
    nobody = np.full(len(text), NOBODY, np.int32)
    header = reference.header(len(reference.messages)) or ""
    return Writing(text, nobody, nobody, header, reference.messages, [0] * len(reference.messages), tuple(tags))


def _owners(writing: Writing, ending: re.Pattern[str]) -> list[int]:
    """The assistant's message of each tag's span: whose letters are in it, else who wrote it, else in their order."""
    assistants = assistant_messages(writing.messages)
    owners: list[int] = []
    for start, end in writing.tags:
        letters = set(writing.colours[start:end].tolist()) - {NOBODY}
        if not letters <= set(assistants):
            raise Refusal("it tags words of others as generated")
        candidates = letters or set(writing.owners[start:end].tolist()) - {NOBODY}
        if not candidates and owners and ending.fullmatch(writing.text[start:end].strip()):
            candidates = {owners[-1]}  # what ends the conversation
        owners.append(candidates.pop() if len(candidates) == 1 else NOBODY)
    if set(owners) <= set(assistants):
        return owners
    if len(owners) == len(assistants):
        return assistants
    raise Refusal("it is not certain to which message each part belongs that it tags as generated")


def _turn(writing: Writing, headers: Headers, index: int, tags: Sequence[Span], ending: re.Pattern[str]) -> Turn:
    text = writing.text
    spans: list[Span] = []
    ends = False
    for number, (start, end) in enumerate(tags):
        if number == 0:
            start = headers.start_in_tag(index, start, end)
        letters = np.flatnonzero(writing.colours[start:end] == index)
        after_letters = start + int(letters[-1]) + 1 if len(letters) else start
        own = list(ending.finditer(text, after_letters, end))[-1:]
        if own and not text[own[0].end() : end].strip():
            end = own[0].end()
        elif not ends_in_space(text[writing.after_words(index, after_letters, end) : end]) and (
            following := ending.match(text, end)
        ):
            own, end = [following], following.end()
        elif number == len(tags) - 1 or ending.match(text, end):
            end = start + len(text[start:end].rstrip())
        ends = bool(own) and own[0].end() == end
        if end > start:
            spans.append((start, end))
    return Turn(index, tuple(spans), ends)
