"""Renderings of a conversation by its traced template, with probe letters in place of the messages' own.

Each way of tracing is tried, the plainest first; a rendering tells something where its text is the tokenizer's own but for the
probe letters.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from mlx_sft.data.mask.probe_letters import (
    AsciiProbeLetters,
    Constants,
    PrivateProbeLetters,
    ProbeLetters,
    count_letters,
)
from mlx_sft.data.mask.reasoning import before_reasoning
from mlx_sft.data.mask.reference_rendering import RENDERING_ERRORS, ReferenceRendering, reason_of
from mlx_sft.data.mask.trace import PrivateCharacters, Trace, TracedText
from mlx_sft.data.mask.traced_rendering import NOBODY, Integers, Messages, Refusal, TracedRendering, assistant_messages
from mlx_sft.data.mask.traced_template import VARIANTS, Variant, has_tags, string_constants, traced

_MOST_STRINGS = 2000
"""A real template has a tenth; each is looked for at each place of each message."""


def traced_renderings(reference: ReferenceRendering) -> Iterator[TracedRendering | Refusal]:
    """What each way of tracing shows, or why it shows nothing; the plainest first.

    Where probe letters of one kind can be read, the next kind is not tried. Where the template's author tagged what is
    generated, an assistant's letters may stand elsewhere too.

    Raises:
        Refusal: where no private character is left for markers.
    """
    tagged = has_tags(reference.template)
    for characters, letters in _probe_letters(reference):
        probed = letters.replace_in(reference.messages)
        is_read = False
        for variant in VARIANTS:
            try:
                rendering = _traced_rendering(reference, variant, characters, letters, probed)
                is_read = True
                if not tagged:
                    rendering.check()
                yield rendering
            except Refusal as refusal:
                yield refusal
        if is_read:
            return


def _probe_letters(reference: ReferenceRendering) -> Iterator[tuple[PrivateCharacters, ProbeLetters]]:
    """The kinds of probe letters for a conversation, and markers that its text does not hold."""
    characters = PrivateCharacters.absent_from(reference.text, len(reference.messages))
    if characters is None:
        raise Refusal("the messages are too many, or hold every kind of private-use character")
    constants = _constants(reference.template)
    private, ascii_letters = PrivateProbeLetters(characters, constants), AsciiProbeLetters(constants)
    yield characters, private
    (probed,) = private.replace_in(reference.messages)
    for index, (message, probe) in enumerate(zip(reference.messages, probed, strict=True)):
        if count_letters(probe, index, private) and not count_letters(message, index, ascii_letters):
            return  # its words have no ASCII letter, and would not be seen where they do not belong
    yield characters, ascii_letters


@lru_cache(maxsize=16)
def _constants(template: str) -> Constants:
    strings = string_constants(template)
    if len(strings) > _MOST_STRINGS:
        raise Refusal("its code holds too many strings")
    return Constants(strings)


def _traced_rendering(
    reference: ReferenceRendering,
    variant: Variant,
    characters: PrivateCharacters,
    letters: ProbeLetters,
    probed: list[Messages],
) -> TracedRendering:
    """Trace the template while it writes the messages with probe letters.

    Raises:
        Refusal: where it fails, or its text differs from the reference in more than their letters.
    """
    text = reference.text
    traces = _write(reference, variant, characters, probed, prompt=True)
    header = traces[0].text[len(text) :]
    letter_to_message = _found_letters(traces, text, letters)
    if letter_to_message is None:
        # Some templates write an end token where they write no prompt: compare what follows the messages.
        prompted = _after_messages(traces[0])
        traces = _write(reference, variant, characters, probed, prompt=False)
        header = prompted.removeprefix(_after_messages(traces[0]))
        letter_to_message = _found_letters(traces, text, letters)
    if letter_to_message is None:
        raise Refusal("its writing depends on the letters of the messages, or on being traced")
    char_to_message = _with_untraced(reference, variant, traces[0].char_to_message[: len(text)])
    counts = [count_letters(message, index, letters) for index, message in enumerate(probed[0])]
    return TracedRendering(
        text, char_to_message, letter_to_message, before_reasoning(header), probed[0], counts, traces[0].tags
    )


def _write(
    reference: ReferenceRendering,
    variant: Variant,
    characters: PrivateCharacters,
    probed: list[Messages],
    prompt: bool,
) -> list[TracedText]:
    """What the traced template writes, with the generation prompt or without."""
    template = traced(reference.template, variant, reference.name)
    texts = []
    for messages in probed:
        functions = Trace(messages, characters).functions()
        try:
            marked = template.render(**reference.variables(messages, prompt), **functions)
        except RENDERING_ERRORS as error:
            raise Refusal(f"it fails when it is traced: {reason_of(error)}") from error
        texts.append(characters.read(marked))
    return texts


def _with_untraced(reference: ReferenceRendering, variant: Variant, char_to_message: Integers) -> Integers:
    """With the assistants' messages that are written outside of all that is traced, as the last is in some templates.

    Such a message is what its rendering adds to the prompt before it, where both are exact prefixes of the whole text: where
    the template has the extension property.

    Raises:
        Refusal: where nothing is traced, and the template does not have the property.
    """
    for index in assistant_messages(reference.messages):
        if (char_to_message == index).any():
            continue
        added = reference.added(index)
        if added is None and not variant.loops:
            raise Refusal(f"it writes what comes up to message {index + 1} otherwise where more follows")
        if added and (char_to_message[slice(*added)] == NOBODY).all():
            char_to_message = char_to_message.copy()
            char_to_message[slice(*added)] = index
    return char_to_message


def _found_letters(traces: list[TracedText], text: str, letters: ProbeLetters) -> Integers | None:
    return letters.find([trace.text[: len(text)] for trace in traces], text, traces[0].char_to_message[: len(text)])


def _after_messages(trace: TracedText) -> str:
    written = np.flatnonzero(trace.char_to_message != NOBODY)
    return trace.text[int(written[-1]) + 1 :] if len(written) else ""
