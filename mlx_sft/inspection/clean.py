"""Data that was understood, written once: each row that training would keep as a line of messages, and what was changed.

    survey ─► rows again ─► clean rows ─► a file, surveyed too: its examples are the same ─► its name

A row's length plays no part: what is written is for every --max-length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console, many, write_text
from mlx_sft.data.call_forms import with_argument_objects
from mlx_sft.data.conversation import Conversation, Document, Item, Tokens, apart, items_of
from mlx_sft.data.formats import RowFormat, messages, pairs, prompt_completion, text, tokenized
from mlx_sft.data.keys import KeyRules, Reading
from mlx_sft.data.messages import Message, take_weights
from mlx_sft.data.pipeline import NoProgress, ReadingProgress
from mlx_sft.data.prepare import PreparedData, survey
from mlx_sft.data.readers import Row
from mlx_sft.data.report import reasons
from mlx_sft.data.row_reader import RowReader, with_roles
from mlx_sft.data.sources import locate, split_weight
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import user_path
from mlx_sft.inspection.changes import changes
from mlx_sft.inspection.inspector import ready, without_limit
from mlx_sft.inspection.selection import SurveyedRows
from mlx_sft.writing import new_file, place_for_file, write_file_with

_WRITERS: dict[type, tuple[RowFormat, Callable[[Any], dict[str, Any]]]] = {
    Conversation: (messages.FORMAT, messages.write),
    Document: (text.FORMAT, text.write),
    Tokens: (tokenized.FORMAT, tokenized.write),
    tuple: (pairs.FORMAT, pairs.write),
}
_MOST_CHANGES = 1_000
"""Different changes that are counted by name; a new key in every row must not fill the memory."""
_LONGEST_CHANGE = 160
"""Characters: a key may have as many as it likes."""
_OTHERS = "other changes"
_MOST_SHOWN = 40
_ROWS_BETWEEN_TELLING = 1_000


@dataclass
class CleanData:
    """What was written.

    Attributes:
        path: The file.
        format: The name of its row format.
        rows: How many rows there were.
        written: How many of them are in it.
        left_out: Why the others are not: `fate`, `reason`, `count` and the `first` origin.
        changes: What is different: how often, and the first origin, by what it is.
        duplicates: Examples that equal an earlier one, which are written all the same.
        valid: Validation rows that were named, which are not in it.
    """

    path: Path
    format: str = ""
    rows: int = 0
    written: int = 0
    left_out: list[dict[str, Any]] = field(default_factory=list)
    changes: dict[str, tuple[int, str]] = field(default_factory=dict)
    duplicates: int = 0
    valid: list[str] = field(default_factory=list)

    def add(self, origin: str, found: list[str]) -> None:
        """Count the changes of a row."""
        for change in (one[:_LONGEST_CHANGE] for one in found):
            name = change if change in self.changes or len(self.changes) < _MOST_CHANGES else _OTHERS
            count, first = self.changes.get(name, (0, origin))
            self.changes[name] = count + 1, first

    def to_json(self) -> str:
        """For a machine, a line of JSON."""
        changed = [{"change": name, "count": n, "first": first} for name, (n, first) in self.changes.items()]
        return json.dumps(vars(self) | {"path": str(self.path), "changes": changed})

    def show(self, console: Console, *, as_json: bool = False) -> None:
        """For a person what was done, on stderr, and the path on stdout; or all of it on stdout for a machine."""
        for line in () if as_json else self.describe():
            console.note(line)
        if 2 * self.written < self.rows:
            console.warn(f"more than half of the rows are left out, {self.rows - self.written:,} of {self.rows:,}")
        write_text(f"{self.to_json() if as_json else self.path}\n")

    def describe(self) -> Iterator[str]:
        """What was done, line by line."""
        yield f"{self.written:,} of {many(self.rows, 'row')} written, as {self.format}"
        for one in self.left_out:
            yield f"left out  {one['count']:>7,}  {one['fate']}: {one['reason']} (first {one['first']})"
        for name, (count, first) in list(self.changes.items())[:_MOST_SHOWN]:
            yield f"changed   {count:>7,}  {name} (first {first})"
        if len(self.changes) > _MOST_SHOWN:
            yield f"changed   and {len(self.changes) - _MOST_SHOWN:,} more kinds of changes, which --json has"
        if not self.changes:
            yield "changed   nothing"
        if self.duplicates:
            repeat = "repeats" if self.duplicates == 1 else "repeat"
            thing = "pair" if self.format == pairs.FORMAT.name else "example"
            yield f"{many(self.duplicates, thing)} that {repeat} an earlier one: written all the same"
        for name in self.valid:
            yield f"the validation rows of {name} are not in it: clean them by themselves, as --data"


def write_clean(
    config: TrainConfig,
    path: str | Path,
    *,
    overwrite: bool = False,
    tokenizer: Any = None,
    progress: ReadingProgress | None = None,
) -> CleanData:
    """Write the rows that training would keep as .jsonl, in the one form in which they were understood.

    Training on the file gives the same examples as training on those rows, which is seen to: it is read again before it gets its name.

    Args:
        config: As for `train`. Its lengths (`max_length`, `overlong`) play no part.
        path: Ends in `.jsonl`; it appears only once the file is complete.
        overwrite: Whether a file may be there already.
        tokenizer: The model's, where it is loaded already.
        progress: Is told how the reading goes.

    Raises:
        UserError: where the file is there or is one of the data, where the rows cannot be one file (shares of a mixture, several kinds),
            for data that cannot be read, none of which is kept, or that would be trained on otherwise, and for a failed write.
    """
    target = _target(config, path, overwrite)
    config, tokenizer = ready(config, tokenizer)
    progress = progress or NoProgress()
    config = without_limit(config).model_copy(update={"valid_fraction": 0.0})
    prepared = survey(config, tokenizer, progress)
    sources = prepared.report.sources[: len(config.data)]
    notes = [note for source in sources for note in source.notes]
    result = CleanData(user_path(path), rows=sum(source.rows for source in sources), left_out=reasons(notes))
    result.duplicates = prepared.report.train.duplicates
    result.valid = [source.name for source in prepared.report.sources[len(config.data) :]]
    if notes and len(notes) == result.rows:
        what = f"nothing to write: none of {many(result.rows, 'row')} is kept"
        hint = f"the first: {notes[0].origin}: {notes[0].reason}" + (f"; {notes[0].hint}" if notes[0].hint else "")
        raise UserError(what, where=", ".join(source.name for source in sources), hint=hint)

    rules = KeyRules.of(tokenizer.chat_template, ignore_unknown=config.ignore_unknown_keys)

    def write(temporary: Path) -> None:
        with new_file(temporary) as file:
            for row, reading, given_as_objects in _kept_rows(config, prepared, progress):
                file.writelines(_lines(reading, _Cleaner(rules, given_as_objects), result))
                if config.roles and with_roles(row.value, config.roles) != row.value:
                    result.add(row.origin, ["roles as --roles names them"])
        _check(temporary, config, tokenizer, prepared, progress)

    write_file_with(target, write)
    return result


def _target(config: TrainConfig, path: str | Path, overwrite: bool) -> Path:
    """Where to write; raises `UserError` where that cannot be, before anything is read."""
    target, where = place_for_file(path).absolute(), str(path)
    if target.suffix != ".jsonl":
        raise UserError("clean rows are written as .jsonl", where=where, hint="give it such a name", exit_code=USAGE)
    specs = [split_weight(data) for data in config.data]
    if any(weight is not None for _, weight in specs):
        hint = "clean each by itself, and give the shares to what is written"
        raise UserError("shares of a mixture would be lost in one file", where=where, hint=hint, exit_code=USAGE)
    if target.exists():
        named = [data for data, _ in specs] + ([config.valid] if config.valid else [])
        files = [file for data in named for source in locate(data).values() for file in source.files]
        if any(map(target.samefile, files)):
            hint = "give another name; the data itself stays as it is"
            raise UserError("this file is one of the data", where=where, hint=hint, exit_code=USAGE)
        if not overwrite:
            hint = "give another name, or replace it with --overwrite"
            raise UserError("this file is there already", where=where, hint=hint, exit_code=USAGE)
    return target


def _kept_rows(
    config: TrainConfig, prepared: PreparedData, progress: ReadingProgress
) -> Iterator[tuple[Row, Reading, bool]]:
    """Each row that is kept, what is read in it again, and whether the template is given the arguments of its calls as objects."""
    surveyed, number = SurveyedRows.of(prepared, len(config.data)), 0
    for source, report in zip(surveyed.located, surveyed.sources[: len(config.data)], strict=False):
        reader = replace(RowReader.from_config(config), format=report.format or "auto")
        for row in source.rows():
            part, indices = surveyed.examples_of(number)
            number += 1
            if part and isinstance(row, Row):
                reading = reader.reading(row)
                facts = [surveyed.parts[part][index].facts for index in indices if _has_text(reading)]
                yield row, reading, not facts or any(one.arguments_as_objects for one in facts)
            if number % _ROWS_BETWEEN_TELLING == 0:
                progress.reading(source.name, number, 0, None)
        progress.finished(source.name, number, cached=False)


def _has_text(reading: Reading) -> bool:
    """Whether the arguments of a call are text."""
    given = (item.messages for item in items_of(reading.taken()) if isinstance(item, Conversation))
    calls = (call for messages in given for message in messages for call in message.get("tool_calls", ()))
    return any(isinstance(call["function"]["arguments"], str) for call in calls)


@dataclass(frozen=True)
class _Cleaner:
    """Cleans what was read: without what nothing reads, and with arguments in the form in which the template is given them.

    Where that is text, it stays as it is: JSON has many ways to write an object, and the template writes this one.
    """

    rules: KeyRules
    arguments_as_objects: bool

    def item(self, item: Item) -> Item:
        if not isinstance(item, Conversation):
            return item
        read = replace(item, messages=list(map(self.rules.without_unread, item.messages)))
        return with_argument_objects(read) if self.arguments_as_objects else read

    def messages(self, given: list[Message]) -> list[Message]:
        """Messages by themselves, with their weights."""
        plain, weights = take_weights(given)
        _, write = _WRITERS[Conversation]
        written: list[Message] = write(self.item(Conversation("", plain, weights=weights)))["messages"]
        return written


def _lines(reading: Reading, cleaner: _Cleaner, result: CleanData) -> list[bytes]:
    """A row as a line of the file, or as several where it gives several examples; it is counted in the result."""
    items = reading.taken()
    if isinstance(items, tuple) and reading.row_format.compares != pairs.NAMES:
        what = f"a row of {len(items)} texts of the format {reading.row_format.name}, which cannot be written"
        raise UserError(what, where=reading.origin, hint="leave such rows as they are")
    rows = [_clean_row(item, cleaner, reading.origin, result) for item in apart(items)]
    try:
        lines = [json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n" for row in rows]
    except (TypeError, ValueError) as error:
        hint = "write it as text, a number or a list, or leave it out"
        raise UserError(f"it holds what JSON cannot write: {error}", where=reading.origin, hint=hint) from error
    result.written += 1
    found = changes(reading, items_of(items)[0], rows[0], result.format, cleaner.messages)
    result.add(reading.origin, [*found, *["an example of several → a row"] * (len(rows) if len(rows) > 1 else 0)])
    return lines


def _clean_row(item: Item | tuple[Item, ...], cleaner: _Cleaner, origin: str, result: CleanData) -> dict[str, Any]:
    row_format, write = _WRITERS[type(item)]
    if isinstance(item, Conversation) and item.desirable is not None:
        row_format, write = prompt_completion.FORMAT, prompt_completion.write_labelled
    if result.format not in ("", row_format.name):
        what = f"this row would be written as {row_format.name}, and those before it as {result.format}"
        raise UserError(what, where=origin, hint="a file has rows of one format: clean each file by itself")
    result.format = row_format.name
    return write(tuple(map(cleaner.item, item)) if isinstance(item, tuple) else cleaner.item(item))


def _check(
    written: Path, config: TrainConfig, tokenizer: Any, prepared: PreparedData, progress: ReadingProgress
) -> None:
    """Raise `UserError` unless the examples of what was written are those of the rows that it was made of."""
    read: dict[str, Any] = {"data": [str(written)], "valid": None, "format": "auto", "data_cache": False}
    read |= {"columns": {}, "roles": {}}
    again = survey(config.model_copy(update=read), tokenizer, progress)
    before, after = prepared.train, again.train
    if before.fingerprint() == after.fingerprint():
        return
    both = min(len(before), len(after))
    differ = before.content_ids()[:both] != after.content_ids()[:both]
    first = int(np.argmax(differ)) if differ.any() else min(both, len(before) - 1)
    reason, way_out = "", "the template may write a key of it that counts as read by nothing: take that out"
    for note in again.report.sources[0].notes[:1]:
        reason, way_out = f": {note.reason}", note.hint or "put this row right, or leave it out"
    what = f"its clean row would be trained on otherwise{reason}"
    raise UserError(what, where=before.row_origin(first), hint=f"nothing was written; {way_out}")
