"""Examples → those that fit into `max_length`, and a note of every row that lost something."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mlx_sft.console import many
from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Note
from mlx_sft.data.token_counts import EMPTY_COLUMN, NO_COUNTS, TokenColumn, TokenCounts
from mlx_sft.errors import UserError

_RAISE = "raise --max-length to train on it"

Overlong = Literal["split", "truncate", "drop", "error"] | None
"""None: text is split, and what may not be split is truncated."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """The examples that are left, each no longer than allowed and with something to train on.

    Attributes:
        notes: The number of each row that lost something, and its note, in order.
        split: Rows of text that are in several pieces now, of which none is lost.
        tokens: What became of the tokens of the examples as they were; what is left counts as trained on. The first token of a piece is
            no lost one, though it is not supervised any more.
    """

    examples: Examples
    notes: list[tuple[int, Note]]
    split: int = 0
    tokens: TokenCounts = NO_COUNTS


def truncate(
    examples: Examples, max_length: int, overlong: Overlong, *, compared: bool = False, strict: bool = True
) -> Truncation:
    """Split, cut, drop or refuse what is longer than `max_length` tokens.

    Args:
        examples: All of one source; the turns of a row stand one after another.
        compared: Whether the examples of a row are compared, so that all of them are lost with one, and none is split.
        strict: Whether a row that is to be refused is an error, or dropped with a note.

    Raises:
        UserError: at the first that is too long, where that is an error.
    """
    whole_rows = np.unique(examples.rows[examples.lengths > max_length])
    if not len(whole_rows):
        return Truncation(examples, [], 0, TokenCounts(_tokens(examples)))
    whole = examples
    if overlong in ("split", None) and not compared:
        examples = examples.split_to(max_length)
    lengths, rows = examples.lengths, examples.rows
    too_long = lengths > max_length
    split = len(np.setdiff1d(whole_rows, rows[too_long]))
    refused = overlong in ("error", "split")
    if too_long.any() and refused and strict:
        first = int(np.argmax(too_long))
        raise _refusal(examples[first].origin, int(lengths[first]), max_length, overlong)
    cut = examples.truncated_to(max_length)
    kept = cut.supervised_tokens > 0
    if overlong not in ("truncate", None):
        kept &= ~too_long
    if compared:
        kept &= ~np.isin(rows, rows[~kept])
    ids, notes = cut.content_ids(), []
    for row in np.unique(rows[too_long]).tolist():
        first, end = np.searchsorted(rows, [row, row + 1]).tolist()
        own = slice(first, end)
        if compared or end - first == 1:
            length, is_kept = int(lengths[own].max()), bool(kept[first])
            alike = compared and is_kept and end - first > 1 and len(set(ids[own].tolist())) == 1
            kept[own] &= not alike
            note = _of_longest(examples, first, length, max_length, overlong, kept=is_kept, compared=compared)
            if alike:
                reason = f"its texts are the same in their first {max_length} tokens, which leaves nothing to compare"
                note = Note(note.origin, "dropped", reason, _RAISE)
        else:
            shortened = int((too_long & kept)[own].sum())
            note = _of_several(examples, first, end - first, shortened, int((~kept[own]).sum()), max_length)
        notes.append((row, replace(note, fate="bad") if refused and note.fate == "dropped" else note))
    left = cut.select(np.flatnonzero(kept))
    return Truncation(left, notes, split, _counts(whole, examples, cut, kept))


def _counts(whole: Examples, pieces: Examples, cut: Examples, kept: NDArray[np.bool_]) -> TokenCounts:
    """What became of the tokens of examples that were split into pieces, then cut, of which some are kept."""
    chosen, left_out = np.flatnonzero(kept), np.flatnonzero(~kept)
    left = _tokens(cut.select(chosen))
    no_longer = _tokens(whole).supervised - _tokens(pieces).supervised
    alone = int((pieces.supervised_tokens == 0).sum())  # pieces of one token, of which nothing is trained on
    return TokenCounts(
        trained_on=left,
        cut_off=_tokens(pieces.select(chosen)) - left,
        dropped=_tokens(pieces.select(left_out)) + TokenColumn(alone, -alone),
        first_of_pieces=no_longer - alone,
    )


def _refusal(origin: str, length: int, max_length: int, overlong: Overlong) -> UserError:
    what = f"{length} tokens, where max_length is {max_length}"
    if overlong == "split":
        what += ", and only text can be split"
        hint = "leave out --overlong, so that text is split and conversations are cut; or raise --max-length"
    else:
        hint = "raise --max-length, or choose --overlong truncate or drop"
    return UserError(what, where=origin, hint=hint)


def _tokens(examples: Examples) -> TokenColumn:
    return sum(examples.tokens(), EMPTY_COLUMN)


def _of_longest(
    examples: Examples, first: int, length: int, longest: int, overlong: Overlong, *, kept: bool, compared: bool
) -> Note:
    """A row with one example, or with several that are compared; it is kept as long as all of them are."""
    origin = examples.row_origin(first)
    if kept:
        return Note(origin, "truncated", f"{'its longest text of ' * compared}{length} tokens, cut to {longest}")
    if overlong not in ("truncate", None):
        return Note(origin, "dropped", f"{'its longest text has ' * compared}{length} tokens, more than {longest}")
    none = f"none of its first {longest} tokens (of {length}) is supervised"
    if compared:
        none = f"its prompt leaves nothing of one of its answers in the first {longest} tokens (of {length})"
    return Note(origin, "dropped", none, _RAISE if compared else "")


def _of_several(examples: Examples, first: int, number: int, shortened: int, dropped: int, longest: int) -> Note:
    """A row with several examples, such as its turns; it is kept as long as one of them is."""
    origin = examples.row_origin(first)
    if dropped == number:
        return Note(
            origin, "dropped", f"none of its {many(number, 'example')} can be supervised within {longest} tokens"
        )
    parts = [f"{shortened} cut" if shortened else "", f"{dropped} dropped" if dropped else ""]
    reason = f"of its {many(number, 'example')} {' and '.join(filter(None, parts))}, longer than {longest} tokens"
    return Note(origin, "truncated", reason)
