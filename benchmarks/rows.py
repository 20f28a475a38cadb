"""Rows of random tokens with the lengths and the learnt shares of real work: pairs, chats, documents, single rows.

A row ends with a token 0 that is learnt (`trainers/mlx_lm.py` says why). Pure NumPy. Knows nothing of files, models or trainers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.workload import IGNORED, Row

Quantiles = Sequence[tuple[float, float]]

PAIR_LENGTHS: Quantiles = (
    (0, 31), (0.05, 39), (0.25, 49), (0.5, 100), (0.75, 150), (0.9, 179), (0.95, 198), (0.99, 349), (1, 467),
)  # fmt: skip
"""A short instruction pair's length in tokens, as measured on 1,800 real ones."""
PROMPT_LENGTHS: Quantiles = ((0, 14), (0.05, 15), (0.5, 19), (0.95, 26), (1, 31))
"""Of these, the tokens up to the answer."""
CHAT_LENGTHS: Quantiles = (
    (0, 60), (0.05, 110), (0.25, 240), (0.5, 400), (0.75, 680), (0.9, 1100), (0.95, 1400), (0.99, 1900), (1, 2048),
)  # fmt: skip
"""A chat of several turns."""
CHAT_SHARE = 0.3
"""Of a chat's tokens, those of the assistant."""
TURN_TOKENS = 130
"""A question and its answer, about."""
DOCUMENT_SHARE = 0.1
GROUP = 16
"""Rows of one batch of a trainer that sorts a large file."""


def spread(quantiles: Quantiles, count: int) -> np.ndarray:
    """`count` lengths, spread evenly over quantiles: the same ones each time, from the shortest to the longest."""
    at = (np.arange(count) + 0.5) / count
    return np.interp(at, *zip(*quantiles, strict=True)).astype(int)


def row_lengths(quantiles: Quantiles, count: int, of: int | None) -> np.ndarray:
    """`count` lengths; or, with `of`, those that `count` rows have when a file of so many is sorted and taken in groups of 16.

    A trainer that sorts a file finds rows of nearly one length for each of its batches only where the file is large. The groups
    are spread evenly over it.
    """
    if of is None:
        return spread(quantiles, count)
    groups = spread(quantiles, of).reshape(-1, GROUP)
    wanted = count // GROUP
    chosen = ((np.arange(wanted) + 0.5) / wanted * len(groups)).astype(int)
    return groups[chosen].ravel()


def make_row(parts: Sequence[tuple[int, bool]], vocabulary: int, rng: np.random.Generator) -> Row:
    """Random tokens: so many learnt (True) or not (False), in turns."""
    learnt = np.concatenate([np.full(length, is_learnt) for length, is_learnt in parts])
    token_ids = rng.integers(1, vocabulary, len(learnt))
    token_ids[-1] = 0
    return {"input_ids": token_ids.tolist(), "labels": np.where(learnt, token_ids, IGNORED).tolist()}


def pairs(count: int, vocabulary: int, seed: int, of: int | None = None) -> list[Row]:
    """Short instruction pairs, median 100 tokens; `of` as in `row_lengths`."""
    rng = np.random.default_rng(seed)
    lengths = rng.permutation(row_lengths(PAIR_LENGTHS, count, of))
    prompts = rng.permutation(spread(PROMPT_LENGTHS, count))
    return [
        make_row([(int(prompt), False), (int(max(1, length - prompt)), True)], vocabulary, rng)
        for length, prompt in zip(lengths, prompts, strict=True)
    ]


def chats(count: int, vocabulary: int, seed: int, divisor: int = 1, of: int | None = None) -> list[Row]:
    """Chats of one to eight turns, median 400 tokens and up to 2,048, divided by `divisor`; 30 % of them learnt."""
    rng = np.random.default_rng(seed)
    lengths = rng.permutation(row_lengths(CHAT_LENGTHS, count, of)) // divisor
    return [make_row(turns(int(length), divisor, rng), vocabulary, rng) for length in lengths]


def turns(length: int, divisor: int, rng: np.random.Generator) -> list[tuple[int, bool]]:
    """Question and answer alternating, of uneven lengths; the answers make up `CHAT_SHARE`."""
    count = int(np.clip(length * divisor // TURN_TOKENS, 1, 8))
    answered = max(count, round(CHAT_SHARE * length))
    questions, answers = divide(length - answered, count, rng), divide(answered, count, rng)
    return [part for pair in zip(questions, answers, strict=True) for part in ((pair[0], False), (pair[1], True))]


def divide(total: int, count: int, rng: np.random.Generator) -> list[int]:
    """A number as `count` uneven parts of at least 1."""
    shares = rng.uniform(0.5, 1.5, count)
    bounds = np.round(np.cumsum(shares) / shares.sum() * (total - count)).astype(int)
    return [int(part) + 1 for part in np.diff(bounds, prepend=0)]


def documents(count: int, vocabulary: int, seed: int, length: int = 4096) -> list[Row]:
    """Long rows of which the last tenth is learnt."""
    rng = np.random.default_rng(seed)
    learnt = max(1, round(DOCUMENT_SHARE * length))
    return [make_row([(length - learnt, False), (learnt, True)], vocabulary, rng) for _ in range(count)]


def halves(count: int, vocabulary: int, seed: int, length: int) -> list[Row]:
    """Rows of one length whose second half is learnt."""
    rng = np.random.default_rng(seed)
    return [make_row([(length - length // 2, False), (length // 2, True)], vocabulary, rng) for _ in range(count)]


KINDS: dict[str, Callable[..., list[Row]]] = {
    "pairs": pairs,
    "chats": chats,
    "documents": documents,
    "halves": halves,
}
