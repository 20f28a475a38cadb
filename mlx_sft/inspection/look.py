"""The verb: a configuration's data → what there is to see of it. Knows where things are found, not how they look."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console
from mlx_sft.data.files import locate
from mlx_sft.data.formats import Conversation, RowReader
from mlx_sft.data.pipeline import Pipeline, Progress
from mlx_sft.data.prepare import PreparedData, survey
from mlx_sft.data.reading.readers import Row
from mlx_sft.data.report import SourceReport
from mlx_sft.data.screening import SIGNS, SPECIAL_SIGN, signs_of
from mlx_sft.data.template import todays_variables
from mlx_sft.errors import USAGE, UserError
from mlx_sft.inspection import terminal
from mlx_sft.inspection.choice import ONLY, Group, Wanted, first_rows, notable_rows, row_named, rows_of_kind
from mlx_sft.inspection.page import Page
from mlx_sft.inspection.rows import Fate, ShownExample, ShownRow, raw_json
from mlx_sft.inspection.table import table
from mlx_sft.runs import user_path, write_file

__all__ = ["ONLY", "Inspection", "inspect"]

ROWS_SHOWN = 3
ROWS_ON_PAGE = 500
_NO_LIMIT = 2**31 - 1


def inspect(
    config: TrainConfig,
    *,
    row: str | None = None,
    only: str | None = None,
    limit: int = ROWS_SHOWN,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> Inspection:
    """Look at the data that a configuration names, as training with it would see it. Whatever is wrong with rows is shown.

    Args:
        config: As for `train`.
        row: The one row to show: `17` (the line of a .jsonl, the index of a .json), or `chats.jsonl:17`.
        only: The kind of rows to show, one of `ONLY`; by default the first rows, whatever became of them.
        limit: So many rows are shown.
        tokenizer: The model's, where it is loaded already.
        progress: Is told how the reading goes.

    Raises:
        UserError: where the data or the model's tokenizer cannot be read at all, and for a row that there is not.
    """
    if row is not None and only is not None:
        raise UserError("--row and --only exclude each other", hint="give one", exit_code=USAGE)
    if tokenizer is None:
        from mlx_sft.model.load import load_tokenizer, resolve_checkpoint  # imports MLX, which takes seconds

        tokenizer = load_tokenizer(resolve_checkpoint(config.model, weights=False))
    variables = todays_variables(tokenizer) | config.chat_template_kwargs  # as `train` does
    config = config.model_copy(update={"chat_template_kwargs": variables})
    look = _Look(config, tokenizer, progress)
    if row is not None:
        return Inspection(look, [look.row(row)], whole_rows=True)
    wanted = rows_of_kind(look.groups, only, limit) if only else first_rows(look.groups, limit)
    return Inspection(look, list(look.rows(wanted)), whole_rows=False)


class Inspection:
    """What there is to see.

    Attributes:
        rows: Those that were asked for, in order.
        table: The data as a whole; docs/data.md explains its keys.
    """

    def __init__(self, look: _Look, rows: list[ShownRow], *, whole_rows: bool) -> None:
        self._look = look
        self._whole_rows = whole_rows
        self.rows = rows
        self.table: dict[str, Any] = look.table()

    def show(self, console: Console) -> None:
        """Rows and table on stdout, for a person; of a row that was asked for, the row alone."""
        for row in self.rows:
            console.data(terminal.row_pieces(row, whole=self._whole_rows))
        if not self._whole_rows:
            console.data(terminal.table_pieces(self.table))

    def to_json(self) -> str:
        """Rows and table for a machine."""
        config = self._look.config
        record = {
            "data": config.data,
            "model": config.model,
            "table": self.table,
            "rows": [row.to_json() for row in self.rows],
        }
        return json.dumps(record, allow_nan=False)  # ASCII: half of a surrogate pair could not be written otherwise

    def write_page(self, path: str | Path, most_rows: int = ROWS_ON_PAGE) -> Path:
        """One self-contained HTML page with up to so many rows, the notable ones first; it is whole or absent.

        Raises:
            UserError: where it cannot be written.
        """
        look = self._look
        rows = list(look.rows(notable_rows(look.groups, most_rows)))
        page = Page(look.config.data, look.config.model, self.table, rows)
        target = user_path(path)
        if target.is_dir():
            raise UserError(
                "this is a folder", where=str(target), hint="name a file, such as data.html", exit_code=USAGE
            )
        write_file(target, page.html())
        return target


class _Look:
    """The surveyed data, and the means to read its rows again."""

    def __init__(self, config: TrainConfig, tokenizer: Any, progress: Progress | None) -> None:
        self.config = config
        self._prepared = survey(config, tokenizer, progress)
        self._whole = self._before_fitting(tokenizer, progress)
        self._pipeline = Pipeline.from_config(config, tokenizer)
        added = tokenizer.added_tokens_decoder.items()
        self._special_ids = frozenset(token_id for token_id, token in added if token.content.strip())
        self.groups = self._groups()

    def _before_fitting(self, tokenizer: Any, progress: Progress | None) -> PreparedData:
        """The data without a longest length; it is the same where nothing was too long."""
        report, config = self._prepared.report, self.config
        if not (report.truncated or report.dropped or (report.bad and config.overlong == "error")):
            return self._prepared
        return survey(config.model_copy(update={"max_length": _NO_LIMIT, "overlong": "truncate"}), tokenizer, progress)

    def _groups(self) -> list[Group]:
        prepared, trained = self._prepared, len(self.config.data)
        train, valid = prepared.report.sources[:trained], prepared.report.sources[trained:]
        if not valid:
            return [Group.of(train, {"train": prepared.train, "valid": prepared.valid})]
        return [Group.of(train, {"train": prepared.train}), Group.of(valid, {"valid": prepared.valid})]

    def table(self) -> dict[str, Any]:
        whole, parts = self._whole, self._prepared
        return table(parts.report, [whole.train, whole.valid], [parts.train, parts.valid], self.config.max_length)

    def row(self, name: str) -> ShownRow:
        """The first row of this name; raises `UserError` where there is none."""
        found = next(self.rows(row_named(self.groups, name)), None)
        if found is None:
            rows = ", ".join(
                f"{source.name} has {source.rows:,} rows" for group in self.groups for source in group.sources
            )
            raise UserError(f"there is no row {name}", hint=f"check its number; {rows}", exit_code=USAGE)
        return found

    def rows(self, wanted: list[Wanted]) -> Iterator[ShownRow]:
        """These rows, read again, in their order."""
        for group, rows in zip(self.groups, wanted, strict=True):
            for number, source, row in _read_again(group, rows):
                yield self._shown(group, number, source, row)

    def _shown(self, group: Group, number: int, source: SourceReport, row: Row | UserError) -> ShownRow:
        origin = row.where if isinstance(row, UserError) else row.origin
        part, indices = group.examples_of(number)
        note = group.notes.get(origin)
        fate: Fate = note.fate if note else "kept"
        examples, signs = self._examples(row, source, fate)
        left_out = sum(group.parts[part][index].facts.turns_with_text_left_out for index in indices)
        equals = (group.duplicate_of(part, index) for index in indices)
        return ShownRow(
            origin,
            number,
            source.name,
            part,
            fate,
            note.reason if note else "",
            note.hint if note else "",
            tuple(sign for sign in SIGNS if sign in signs),
            next(filter(None, equals), None),
            left_out,
            examples,
            raw_json(row.value) if isinstance(row, Row) else "",
        )

    def _examples(
        self, row: Row | UserError, source: SourceReport, fate: Fate
    ) -> tuple[list[ShownExample], frozenset[str]]:
        if isinstance(row, UserError) or fate == "bad":
            return [], frozenset()
        pipeline = self._pipeline
        try:
            item = RowReader(source.format or "auto", self.config.columns).read(row)
            views = pipeline.encoder.view(item)
        except UserError:
            return [], frozenset()
        shown = [ShownExample.of(view, item, self._special_ids, self.config.max_length) for view in views]
        signs = signs_of(item, pipeline.special.user_header)
        if pipeline.special_in_content == "keep" and isinstance(item, Conversation) and pipeline.special.found_in(item):
            signs |= {SPECIAL_SIGN}
        return shown, signs


def _read_again(group: Group, wanted: Wanted) -> Iterator[tuple[int, SourceReport, Row | UserError]]:
    """The wanted rows with their numbers and sources; reading ends with the last of them."""
    left, before = len(wanted), 0
    for source in group.sources:
        after = before + source.rows
        numbered = any(before <= number < after for number in wanted.numbers)
        if left and (numbered or any(origin.startswith(source.name) for origin in wanted.origins)):
            for number, row in enumerate(locate(source.name)["all"].rows(), before):
                origin = row.where if isinstance(row, UserError) else row.origin
                if number in wanted.numbers or origin in wanted.origins:
                    left -= 1
                    yield number, source, row
                    if not left:
                        return
        before = after
