"""Renderings of a conversation by its traced template, with probe letters, by which a message is known where the template writes it.

message             {"role": "user", "content": "Hi, you"}
private letters     {"role": "user", "content": "⬤⬤, ⬤⬤⬤"}          one private-use character a message
ASCII letters       {"role": "user", "content": "Bb, bbb"}           for templates that depend on letters: twice, in
                    {"role": "user", "content": "Oo, ooo"}           different ones; what changes is the message's

Each way of tracing is tried, the plainest first; a rendering tells something where its text is the tokenizer's own but for the
probe letters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.mask.reasoning import before_reasoning
from mlx_sft.data.mask.reference_rendering import RENDERING_ERRORS, ReferenceRendering, reason_of
from mlx_sft.data.mask.trace import (
    NOBODY,
    Integers,
    Messages,
    PrivateCharacters,
    Refusal,
    Trace,
    TracedRendering,
    TracedText,
    assistant_messages,
    called_functions,
)
from mlx_sft.data.mask.traced_template import VARIANTS, Variant, has_tags, string_constants, traced
from mlx_sft.data.messages import REASONING_KEYS

REPLACED_KEYS = frozenset({"content", "text", "arguments", *REASONING_KEYS})
"""The parts of a message whose letters are its own words; the others (role, names, ids) steer the template."""

_LETTER = re.compile(r"[^\W_]")
_ASCII_LETTER, _CAPITAL, _SMALL = re.compile("[A-Za-z]"), re.compile("[A-Z]"), re.compile("[a-z]")
_LETTERS = 26
_SHIFT = 13
"""How far the letters of the second rendering are from those of the first."""


class Constants:
    """Strings that are kept where a text holds them; they may overlap there."""

    def __init__(self, strings: Iterable[str]) -> None:
        with_letters = sorted({s for s in strings if _LETTER.search(s)}, key=lambda s: (-len(s), s))
        self._pattern = re.compile("|".join(map(re.escape, with_letters)) or "(?!)")

    def split(self, text: str) -> list[str]:
        """The text in pieces, of which every second is kept."""
        bounds = [0]
        found = self._pattern.search(text)
        while found:
            start, end = found.span()
            if len(bounds) > 1 and start <= bounds[-1]:
                bounds[-1] = max(end, bounds[-1])
            else:
                bounds += [start, end]
            found = self._pattern.search(text, start + 1)
        return [text[first:last] for first, last in pairwise([*bounds, len(text)])]


@dataclass(frozen=True, slots=True)
class PrivateProbeLetters:
    """One private-use character a message, which replaces all its letters.

    Args:
        characters: Supplies the letters.
        constants: The strings that the template's code holds, which are kept, so that it finds in a message what it
            looks for (`</think>`).
    """

    characters: PrivateCharacters
    constants: Constants

    def replace_in(self, messages: Messages) -> list[Messages]:
        """The messages with probe letters, once for each rendering that is needed; every text keeps its length."""

        def probed(message: dict[str, Any], letter: str) -> Any:
            return _replaced(message, self.constants, lambda piece: _LETTER.sub(letter, piece))

        return [[probed(message, self.characters.probe_letter(index)) for index, message in enumerate(messages)]]

    def find(self, renderings: Sequence[str], text: str, char_to_message: Integers) -> Integers | None:
        """The message whose letter each character of the text is, `NOBODY` where it is none's.

        Args:
            renderings: What the template wrote of the messages with probe letters.
            text: What it writes of the messages as they are.
            char_to_message: The message that each character was written for: where a letter may stand for several
                messages, it is taken for this one's.

        Returns:
            Shape (characters,); None where the texts differ in anything but probe letters.
        """
        written, plain = _code_points(renderings[0]), _code_points(text)
        letters = self.characters.messages_of_letters(written)
        if len(written) != len(plain) or ((written != plain) & (letters == NOBODY)).any():
            return None
        return letters

    def count(self, probed: str, index: int) -> int:
        """How many probe letters are in a text of message `index`, as it is first rendered."""
        return probed.count(self.characters.probe_letter(index))


@dataclass(frozen=True, slots=True)
class AsciiProbeLetters:
    """A Latin letter a message, another one in a second rendering: only ASCII letters are replaced, in their case, so that
    what escapes, measures or asks for letters writes as much as before. Every 26th message has the same letter."""

    constants: Constants

    def replace_in(self, messages: Messages) -> list[Messages]:
        def probed(message: dict[str, Any], letter: int) -> Any:
            capital, small = chr(ord("A") + letter % _LETTERS), chr(ord("a") + letter % _LETTERS)
            return _replaced(message, self.constants, lambda piece: _SMALL.sub(small, _CAPITAL.sub(capital, piece)))

        return [[probed(message, index + shift) for index, message in enumerate(messages)] for shift in (0, _SHIFT)]

    def find(self, renderings: Sequence[str], text: str, char_to_message: Integers) -> Integers | None:
        first, second, plain = (_code_points(part) for part in (*renderings, text))
        if not len(first) == len(second) == len(plain) == len(char_to_message):
            return None
        letter, shifted, own = (_letter_numbers(part) for part in (first, second, plain))
        changed = first != second
        known = changed & (own >= 0) & (letter >= 0) & (shifted == (letter + _SHIFT) % _LETTERS)
        if ((changed & ~known) | (~changed & (first != plain))).any():
            return None
        nearest = char_to_message - (char_to_message - letter) % _LETTERS
        return np.where(known, np.where(nearest < 0, nearest + _LETTERS, nearest), NOBODY).astype(np.int32)

    def count(self, probed: str, index: int) -> int:
        return sum(len(_ASCII_LETTER.findall(piece)) for piece in self.constants.split(probed)[::2])


ProbeLetters = PrivateProbeLetters | AsciiProbeLetters


def count_letters(message: dict[str, Any], index: int, letters: ProbeLetters) -> int:
    """How many probe letters of a message are to be written: in its content, its reasoning, and its calls' arguments."""
    content = message.get("content")
    parts = [part.get("text") for part in content if isinstance(part, dict)] if isinstance(content, list) else [content]
    # The reasoning is in the message under several names, and is to be written once.
    reasoning = next((message[key] for key in REASONING_KEYS if key in message), None)
    arguments = [function.get("arguments") for function in called_functions(message)]
    return sum(_count(part, index, letters) for part in (*parts, reasoning, *arguments))


def _replaced(value: Any, constants: Constants, replace: Callable[[str], str], words: bool = False) -> Any:
    """A copy of a message with other letters in its own words, except in the constants that they hold."""
    if isinstance(value, dict):
        return {key: _replaced(item, constants, replace, words or key in REPLACED_KEYS) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, constants, replace, words) for item in value]
    if not words or not isinstance(value, str):
        return value
    pieces = constants.split(value)
    pieces[::2] = [replace(piece) for piece in pieces[::2]]
    return "".join(pieces)


def _count(value: Any, index: int, letters: ProbeLetters) -> int:
    if isinstance(value, dict):
        return sum(_count(item, index, letters) for item in value.values())
    if isinstance(value, list):
        return sum(_count(item, index, letters) for item in value)
    return letters.count(value, index) if isinstance(value, str) else 0


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _letter_numbers(code_points: NDArray[np.uint32]) -> NDArray[np.int64]:
    """0 to 25 for A to Z and a to z, -1 for other characters."""
    numbers = (code_points | 0x20).astype(np.int64) - ord("a")
    return np.where((numbers >= 0) & (numbers < _LETTERS), numbers, -1)


_MOST_STRINGS = 2000
"""A real template has a tenth; each is looked for at each place of each message."""


def traced_renderings(reference: ReferenceRendering, turns: Sequence[int]) -> Iterator[TracedRendering | Refusal]:
    """What each way of tracing shows, or why it shows nothing; the plainest first.

    Where probe letters of one kind can be read, the next kind is not tried. Where the template's author tagged what is
    generated, an assistant's letters may stand elsewhere too.

    Args:
        reference: The conversation.
        turns: The messages whose letters must stand in their own turns, and no others there.

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
                    rendering.check(turns)
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
    traced = set(np.unique(char_to_message).tolist())
    for index in assistant_messages(reference.messages):
        if index in traced:
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
