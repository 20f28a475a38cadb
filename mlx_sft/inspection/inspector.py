"""`inspect`: a configuration's data as training would see it, to be shown in the terminal, as JSON or as a page."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from mlx_sft.config import TrainConfig
from mlx_sft.console import Console, many
from mlx_sft.data.pipeline import ReadingProgress
from mlx_sft.data.prepare import PreparedData, survey
from mlx_sft.data.sources import refuse_missing
from mlx_sft.data.template import with_todays_variables
from mlx_sft.errors import USAGE, UserError
from mlx_sft.inspection import terminal
from mlx_sft.inspection.page import page_html
from mlx_sft.inspection.rows import RowViewer, ShownRow
from mlx_sft.inspection.selection import ONLY, SurveyedRows, first_rows, notable_rows, row_named, rows_of_kind
from mlx_sft.inspection.table import table
from mlx_sft.writing import place_for_file, write_file

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
    progress: ReadingProgress | None = None,
) -> Inspection:
    """Look at the data that a configuration names, as training with it would see it. Whatever is wrong with rows is shown.

    Args:
        config: As for `train`.
        row: The one row to show: `17` (the line of a .jsonl, the index of a .json), or `chats.jsonl:17`.
        only: The kind of rows to show, one of `ONLY`; by default the first rows, whatever became of them.
        limit: How many rows are shown.
        tokenizer: The model's, where it is loaded already.
        progress: Is told how the reading goes.

    Raises:
        UserError: If the data or the model's tokenizer cannot be read at all, or there is no such row.
    """
    if row is not None and only is not None:
        raise UserError("--row and --only exclude each other", hint="give one", exit_code=USAGE)
    config, tokenizer = ready(config, tokenizer)
    prepared = survey(config, tokenizer, progress)
    config = config.model_copy(update={"valid_fraction": prepared.valid_fraction})
    untruncated = _untruncated(prepared, config, tokenizer, progress)
    surveyed = SurveyedRows.of(prepared, len(config.data))
    summary = table(prepared.report, [untruncated.train, untruncated.valid], config.max_length)
    viewer = RowViewer(config, tokenizer, surveyed)
    if row is None:
        selection = rows_of_kind(surveyed, only, limit) if only else first_rows(surveyed, limit)
        return Inspection(config, viewer, list(viewer.read(selection)), summary, whole_rows=False)
    found = list(islice(viewer.read(row_named(surveyed, row)), 1))
    if not found:
        counts = ", ".join(f"{source.name} has {many(source.rows, 'row')}" for source in surveyed.sources)
        raise UserError(f"there is no row {row}", hint=f"check its number; {counts}", exit_code=USAGE)
    return Inspection(config, viewer, found, summary, whole_rows=True)


def ready(config: TrainConfig, tokenizer: Any = None) -> tuple[TrainConfig, Any]:
    """The configuration with the template variables of this day, as `train` has it, and the tokenizer, loaded where it is None."""
    if tokenizer is None:
        refuse_missing(config)
        from mlx_sft.model.load import load_tokenizer, resolve_checkpoint  # imports MLX, which takes seconds

        tokenizer = load_tokenizer(
            resolve_checkpoint(config.model, weights=False), config.chat_template, config.add_tokens
        )
    return with_todays_variables(config, tokenizer), tokenizer


def without_limit(config: TrainConfig) -> TrainConfig:
    """The configuration without a longest length."""
    return config.model_copy(update={"max_length": _NO_LIMIT, "overlong": "truncate"})


def _untruncated(
    prepared: PreparedData, config: TrainConfig, tokenizer: Any, progress: ReadingProgress | None
) -> PreparedData:
    """The data without a longest length; it is the same where nothing was too long."""
    report = prepared.report
    refused = report.bad and config.overlong in ("error", "split")
    if not (report.truncated or report.dropped or report.split or refused):
        return prepared
    return survey(without_limit(config), tokenizer, progress)


class Inspection:
    """What there is to see.

    Attributes:
        rows: Those that were asked for, in order.
        table: The data as a whole; docs/data.md explains its keys.
    """

    def __init__(
        self, config: TrainConfig, viewer: RowViewer, rows: list[ShownRow], table: dict[str, Any], *, whole_rows: bool
    ) -> None:
        self._config = config
        self._viewer = viewer
        self._whole_rows = whole_rows
        self.rows = rows
        self.table = table

    def __repr__(self) -> str:
        return f"<Inspection of {', '.join(self._config.data)}: {len(self.rows)} of {many(self.table['rows']['rows'], 'row')}>"

    def show(self, console: Console) -> None:
        """Rows and table on stdout, for a person; of a row that was asked for, the row alone."""
        for row in self.rows:
            terminal.show_row(row, console, whole=self._whole_rows)
        if not self._whole_rows:
            console.data(terminal.table_pieces(self.table))

    def to_json(self) -> str:
        """Rows and table for a machine."""
        record = {
            "data": self._config.data,
            "model": self._config.model,
            "table": self.table,
            "rows": [row.to_json() for row in self.rows],
        }
        return json.dumps(record, allow_nan=False)  # ASCII: half of a surrogate pair could not be written otherwise

    def write_page(self, path: str | Path, most_rows: int = ROWS_ON_PAGE) -> Path:
        """One self-contained HTML page with up to so many rows, the notable ones first; it appears only once it is complete.

        Raises:
            UserError: If it cannot be written.
        """
        target = place_for_file(path)
        rows = list(self._viewer.read(notable_rows(self._viewer.surveyed, most_rows)))
        write_file(target, page_html(self._config.data, self._config.model, self.table, rows))
        return target
