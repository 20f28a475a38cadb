"""Where a text may be split, and the pieces of one that is longer than allowed.

    text      It rained. ⏎ ⏎ It snowed. So they stayed.
    tokens    It  rained .  ⏎⏎ It  snowed .  So  they stayed .  <eos>
    breaks                        ^ 0            ^ 2               ^ 0

A break at token i lets a piece end before it. Pieces hold all tokens of the text, each once, in order: nothing is put between them, and
the end-of-sequence token stands behind the last alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

BREAK = np.dtype([("token", "<i4"), ("level", "u1")])
"""A place where a text may be split: before which token, and how good it is, 0 the best."""
_BREAKS = (
    re.compile(r"\n[^\S\n]*\n\s*"),  # between paragraphs
    re.compile(r"(?<=[.!?…。！？])[\"'”’»)\]」』）]*[^\S\n]*\n\s*"),  # between lines where a sentence ends
    re.compile(r"(?<=[.!?…])[\"'”’»)\]]*\s+|(?<=[。！？])[」』”’）]*"),  # between sentences
    re.compile(r"\n\s*"),  # between lines
)
"""For each level the text between what stands before a break and behind it."""


def text_breaks(text: str, starts: NDArray[np.int64], length: int) -> NDArray[np.void]:
    """Where a text may be split, of dtype `BREAK`, in order; the last is its end.

    Args:
        starts: Shape (n,): where each of the first n tokens begins in the text.
        length: Tokens of the whole, the n and those that are not in the text.
    """
    if not len(starts):
        return np.array([(length, 0)], BREAK)
    starts = np.maximum.accumulate(starts)  # tokens that the tokenizer puts around a text have no place in it
    levels = np.full(length + 1, len(_BREAKS), np.uint8)
    for level, pattern in reversed(list(enumerate(_BREAKS))):
        gaps = np.array([match.span() for match in pattern.finditer(text)], np.int64).reshape(-1, 2)
        tokens = np.searchsorted(starts, gaps[:, 1])  # the first that begins behind the gap, ...
        inside = np.append(starts, len(text) + 1)[tokens] > gaps[:, 1]
        tokens = np.where(inside, np.searchsorted(starts, starts[tokens - 1]), tokens)  # ... or the last in it
        levels[tokens[starts[np.minimum(tokens, len(starts) - 1)] >= gaps[:, 0]]] = level
    levels[0], levels[length] = len(_BREAKS), 0
    places = np.flatnonzero(levels < len(_BREAKS))
    breaks = np.zeros(len(places), BREAK)
    breaks["token"], breaks["level"] = places, levels[places]
    return breaks


def pieces(breaks: NDArray[np.void], length: int, longest: int) -> Iterator[tuple[int, int]]:
    """The pieces of a text of so many tokens, half-open, none of more than `longest`.

    A piece ends at the last of the best breaks in its second half, and between any two tokens where there is none. None but the last of
    a text in pieces of 2 has less than half of `longest`, so that each has something to be predicted from.

    Args:
        breaks: Of dtype `BREAK`, in order.
    """
    start, least = 0, max(2, longest // 2)
    tokens, levels = breaks["token"], breaks["level"]
    while length - start > longest:
        earliest = start + least
        latest = min(start + longest, max(length - least, earliest))
        first, after = np.searchsorted(tokens, [earliest, latest + 1]).tolist()
        end = latest
        if after > first:
            there = levels[first:after]
            end = int(tokens[first + np.flatnonzero(there == there.min())[-1]])
        yield start, end
        start = end
    yield start, length
