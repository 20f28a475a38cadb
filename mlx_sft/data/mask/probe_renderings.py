"""How a template writes a conversation: the first way of watching it that is free of contradictions.

Knows the ways of watching and of colouring, and what a contradiction is; knows nothing of what a turn is.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from mlx_sft.data.mask.assistant_spans import (
    NOBODY,
    Integers,
    Messages,
    Refusal,
    Writing,
    assistant_messages,
    before_reasoning,
)
from mlx_sft.data.mask.probe_letters import AsciiPhases, Colouring, Constants, PrivateColours, own_letters
from mlx_sft.data.mask.reference_rendering import RENDERING_ERRORS, Reference, reason_of
from mlx_sft.data.mask.trace import Alphabet, Watch, Watched
from mlx_sft.data.mask.traced_template import VARIANTS, Variant, has_tags, instrumented, string_constants

_MOST_STRINGS = 2000
"""A real template has a tenth; each is looked for at each place of each message."""


def colourings(reference: Reference) -> Iterator[tuple[Alphabet, Colouring]]:
    """The ways to colour a conversation, and markers that its text does not hold.

    Raises:
        Refusal: where there are no such markers.
    """
    alphabet = Alphabet.absent_from(reference.text, len(reference.messages))
    if alphabet is None:
        raise Refusal("the messages are too many, or hold every kind of private-use character")
    private, phases = PrivateColours(alphabet, constants := _constants(reference.template)), AsciiPhases(constants)
    yield alphabet, private
    (painted,) = private.paint(reference.messages)
    for index, (message, coloured) in enumerate(zip(reference.messages, painted, strict=True)):
        if own_letters(coloured, index, private) and not own_letters(message, index, phases):
            return  # its words would not be seen where they do not belong
    yield alphabet, phases


@lru_cache(maxsize=16)
def _constants(template: str) -> Constants:
    strings = string_constants(template)
    if len(strings) > _MOST_STRINGS:
        raise Refusal("its code holds too many strings")
    return Constants(strings)


def writings(reference: Reference) -> Iterator[Writing | Refusal]:
    """What each way of watching shows, or why it shows nothing; the plainest first.

    A colouring that can be read has said what there is to say: the next is for where none can be read. Where the
    template's author tagged what is generated, its letters may stand elsewhere too.
    """
    tagged = has_tags(reference.template)
    for alphabet, colouring in colourings(reference):
        phases = colouring.paint(reference.messages)
        is_read = False
        for variant in VARIANTS:
            try:
                writing = _watch(reference, variant, alphabet, colouring, phases)
                is_read = True
                if not tagged:
                    writing.check()
                yield writing
            except Refusal as refusal:
                yield refusal
        if is_read:
            return


def _watch(
    reference: Reference, variant: Variant, alphabet: Alphabet, colouring: Colouring, phases: list[Messages]
) -> Writing:
    """Watch the template write the coloured messages; its text must be the reference but for their letters."""
    template = instrumented(reference.template, variant, reference.name)

    def write(prompt: bool) -> list[Watched]:
        try:
            return [
                alphabet.read(template.render(**reference.variables(messages, prompt), **watch.functions()))
                for messages, watch in ((messages, Watch(messages, alphabet)) for messages in phases)
            ]
        except RENDERING_ERRORS as error:
            raise Refusal(f"it fails when it is watched: {reason_of(error)}") from error

    text = reference.text
    watched = write(prompt=True)
    header = watched[0].text[len(text) :]
    colours = _colours(watched, text, colouring)
    if colours is None:
        # Some templates write an end token where they write no prompt: compare what follows the messages.
        prompted = _after_messages(watched[0])
        watched = write(prompt=False)
        header = prompted.removeprefix(_after_messages(watched[0]))
        colours = _colours(watched, text, colouring)
    if colours is None:
        raise Refusal("its writing depends on the letters of the messages, or on being watched")
    painted = phases[0]
    letters = [own_letters(message, index, colouring) for index, message in enumerate(painted)]
    owners = _with_unwatched(reference, watched[0].owners[: len(text)])
    return Writing(text, owners, colours, before_reasoning(header), painted, letters, watched[0].tags)


def _with_unwatched(reference: Reference, owners: Integers) -> Integers:
    """With the assistants' messages that are written outside loops, as the last is in some templates."""
    for index in assistant_messages(reference.messages):
        if (owners == index).any():
            continue
        added = reference.added(index)
        if added and (owners[slice(*added)] == NOBODY).all():
            owners = owners.copy()
            owners[slice(*added)] = index
    return owners


def _colours(watched: list[Watched], text: str, colouring: Colouring) -> Integers | None:
    owners = watched[0].owners[: len(text)]
    if any(not np.array_equal(other.owners[: len(text)], owners) for other in watched[1:]):
        return None
    return colouring.read([one.text[: len(text)] for one in watched], text, owners)


def _after_messages(watched: Watched) -> str:
    owned = np.flatnonzero(watched.owners != NOBODY)
    return watched.text[int(owned[-1]) + 1 :] if len(owned) else ""
