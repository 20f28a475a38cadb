"""When lost rows and tokens are too much to go on: bad rows that are not to be skipped, and more than half of the data."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_sft.data.dataset import LostRow
from mlx_sft.data.example import Note
from mlx_sft.data.report import SourceReport, reasons
from mlx_sft.errors import UserError

SHOWN_BAD_ROWS = 10
"""So many bad rows are named in one error."""
MOST_IN_A_ROW = 100_000
"""So many bad rows one after another, some three seconds of work, end the reading: this is no file of rows."""
MOST_LOST = 0.5
"""The share of the rows that may be dropped or bad, and of the supervised tokens that may be lost to the longest length."""


class BadRows:
    """The bad rows of a source, which are an error together, or are let pass."""

    def __init__(self, source: str, *, refused: bool) -> None:
        self._source = source
        self._refused = refused
        self._notes: list[Note] = []
        self._in_a_row, self._last = 0, -1

    def add(self, row: LostRow) -> None:
        """Raise `UserError` for a row of another format, for the tenth bad one, and for too many one after another that are let pass."""
        if row.note.fate != "bad":
            return
        self._in_a_row = self._in_a_row + 1 if row.number == self._last + 1 else 1
        self._last = row.number
        if self._in_a_row > MOST_IN_A_ROW:
            what = f"more than {MOST_IN_A_ROW:,} rows one after another cannot be used, this one too: {row.note.reason}"
            raise UserError(what, where=row.note.origin, hint="take this part out of the file, or give another file")
        if not self._refused:
            return
        if row.mixed:
            raise UserError(row.note.reason, where=row.note.origin, hint=row.note.hint)
        self._notes.append(row.note)
        if len(self._notes) == SHOWN_BAD_ROWS:
            self.refuse()

    def refuse(self) -> None:
        """Raise `UserError` where there are any."""
        notes = self._notes
        if not notes:
            return
        go_on = "to go on past bad rows and have them reported: --skip-bad-rows"
        if len(notes) == 1:
            hint = f"{notes[0].hint}; {go_on}" if notes[0].hint else go_on
            raise UserError(notes[0].reason, where=notes[0].origin, hint=hint)
        count = f"at least {len(notes)}" if len(notes) == SHOWN_BAD_ROWS else str(len(notes))
        alike: dict[str, list[str]] = {}
        for note in notes:
            alike.setdefault(note.reason, []).append(note.origin)
        lines = "".join(f"\n  {_together(origins)}: {reason}" for reason, origins in alike.items())
        hints = list(dict.fromkeys(note.hint for note in notes if note.hint))
        raise UserError(
            f"{count} rows cannot be used:{lines}",
            where=self._source,
            hint="\n  ".join([*hints[:3], go_on]),
        )


def _together(origins: list[str]) -> str:
    """`a.jsonl:1, 2, b.jsonl:7` of `a.jsonl:1`, `a.jsonl:2` and `b.jsonl:7`."""
    files = [origin.rpartition(":")[0] for origin in origins]
    shown = [
        origin.removeprefix(f"{file}:") if file and file == before else origin
        for origin, file, before in zip(origins, files, ["", *files], strict=False)
    ]
    return ", ".join(shown)


def refuse_lost_data(sources: Sequence[SourceReport], max_length: int) -> None:
    """Raise `UserError` where more of the rows, or of the supervised tokens, are lost than are likely to be meant to."""
    _refuse_lost_rows(sources)
    lost = sum(source.tokens.supervised_lost for source in sources)
    whole = sum(source.tokens.supervised for source in sources)
    if lost <= MOST_LOST * whole:
        return
    raise UserError(
        f"more than half of the supervised tokens are lost, {lost:,} of {whole:,}, as their rows are longer than {max_length:,} tokens",
        where=", ".join(source.name for source in sources if source.tokens.supervised_lost),
        hint="raise --max-length, or train on the rest with --allow-lost-rows",
    )


def _refuse_lost_rows(sources: Sequence[SourceReport]) -> None:
    """Raise `UserError` where more of the rows are lost than are likely to be meant to."""
    rows = sum(source.rows for source in sources)
    lost = rows - sum(source.kept for source in sources)
    if lost <= MOST_LOST * rows:
        return
    notes = [note for source in sources for note in source.notes if note.fate != "truncated"]
    reason_of = {note.origin: note.reason for note in reversed(notes)}
    commonest = "".join(
        f"\n  {group['count']} such as {group['first']}: {reason_of[group['first']]}" for group in reasons(notes)[:3]
    )
    raise UserError(
        f"more than half of the rows are lost, {lost} of {rows}:{commonest}",
        where=", ".join(source.name for source in sources if source.kept < source.rows),
        hint="put them right, or train on the rest with --allow-lost-rows",
    )
