"""The turns of a conversation by comparing it with its own beginnings, where watching its template shows nothing.

Knows that a turn is what the rendering of one more message adds, and that this holds only where every rendering is an exact
beginning of the whole text; knows nothing of how a template writes.
"""

from __future__ import annotations

import numpy as np

from mlx_sft.data.mask.assistant_spans import NOBODY, Integers, Refusal, Writing, assistant_messages
from mlx_sft.data.mask.probe_letters import own_letters
from mlx_sft.data.mask.probe_renderings import colourings
from mlx_sft.data.mask.reference_rendering import RENDERING_ERRORS, Reference, reason_of


def by_beginnings(reference: Reference) -> Writing:
    """The writing of a conversation as its beginnings show it.

    Raises:
        Refusal: where a beginning is rendered otherwise than the whole conversation begins, or the colours contradict.
    """
    owners = _owners(reference)
    text = reference.text
    for _, colouring in colourings(reference):
        phases = colouring.paint(reference.messages)
        written = [_plainly(reference, messages) for messages in phases]
        colours = colouring.read(written, text, owners)
        if colours is not None:
            letters = [own_letters(message, index, colouring) for index, message in enumerate(phases[0])]
            header = reference.header(len(reference.messages)) or ""
            writing = Writing(text, owners, colours, header, phases[0], letters)
            writing.check()
            return writing
    raise Refusal("its writing depends on the letters of the messages")


def _owners(reference: Reference) -> Integers:
    """Who wrote each character: an assistant what its rendering adds to the prompt before it."""
    owners = np.full(len(reference.text), NOBODY, np.int32)
    for index in assistant_messages(reference.messages):
        added = reference.added(index)
        if added is None:
            raise Refusal(f"it writes what comes up to message {index + 1} otherwise where more follows")
        owners[slice(*added)] = index
    return owners


def _plainly(reference: Reference, messages: list[dict[str, object]]) -> str:
    """What the template writes of the coloured messages."""
    try:
        return reference.compiled.render(**reference.variables(messages, prompt=False))
    except RENDERING_ERRORS as error:
        raise Refusal(f"it fails on other letters: {reason_of(error)}") from error
