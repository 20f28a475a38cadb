"""The data room's entrance: the configuration's data → examples to train and to validate on, and the report.

Here stands which sources there are, which rows are kept, what is too much to lose, and what is held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import merge
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_sft.common_settings import common_sections
from mlx_sft.config import TrainConfig
from mlx_sft.console import many
from mlx_sft.data.dataset import Examples
from mlx_sft.data.findings import FACT_FINDINGS, ORIGINS_NAMED
from mlx_sft.data.lost_rows import BadRows, refuse_lost_data
from mlx_sft.data.mismatched import with_mismatched
from mlx_sft.data.pairs import content_ids, counted
from mlx_sft.data.part_report import PartReport
from mlx_sft.data.pipeline import NoProgress, Pipeline, ReadingProgress
from mlx_sft.data.report import DataReport, SourceReport
from mlx_sft.data.screening import SIGNS
from mlx_sft.data.sources import MemorySource, Source, locate, split_weight
from mlx_sft.data.steps import shares
from mlx_sft.data.token_counts import EMPTY_COLUMN
from mlx_sft.data.tokenize import tokenized
from mlx_sft.data.truncation import Truncation, truncate
from mlx_sft.errors import USAGE, UserError
from mlx_sft.registry import OBJECTIVES

_SETTINGS = {*common_sections()["Data"], "seed"} - {"data", "valid", "data_workers", "data_cache"}
"""What of the configuration shapes the data, beside the data itself."""


@dataclass(frozen=True)
class PreparedData:
    """Examples in the order of their rows, and what became of every row.

    Attributes:
        sources: Where the rows are, those to train on before those to validate on; as in the report.
        mixture: Of each source to train on, in order: how many of the examples in `train` are its, and its weight beside the
            others; None for all where they are simply put together.
        valid_fraction: The share that was held out, for which the configuration may say `auto`.
        tokenizer: With which they were encoded.
    """

    train: Examples
    valid: Examples
    report: DataReport
    sources: list[Source]
    mixture: list[tuple[int, float | None]]
    valid_fraction: float
    tokenizer: Any


def prepare(
    config: TrainConfig,
    tokenizer: Any,
    progress: ReadingProgress | None = None,
    *,
    rows: Any = None,
    valid_rows: Any = None,
    strict: bool = True,
) -> PreparedData:
    """Read, encode and split the data that the configuration names.

    Validation rows are those of `config.valid`, else a share of the rows that the configuration names, else the folders' own valid parts,
    else by `auto` a small share of the rows where there are many, else none.

    Args:
        config: Names the data, and how it is split, cut and rendered.
        tokenizer: A fast tokenizer of transformers, or mlx-lm's wrapper of one.
        progress: Is told how the reading goes.
        rows: Rows in memory, in place of those that the configuration names.
        valid_rows: Validation rows in memory, likewise.
        strict: Whether what is wrong with rows is an error, as far as the configuration says so; else it is in the report alone.

    Raises:
        UserError: for data that cannot be read; naming up to ten bad rows at once, unless they are to be skipped; for a
            row that is too long where that is an error; where nothing is left to train on a source; and where more than
            half of the rows, or of the supervised tokens, are lost, unless that is allowed.
    """
    train_sources, weights, valid_sources = _sources(config, rows, valid_rows)
    pipeline = Pipeline.from_config(config, tokenizer)
    train_parts, valid_parts = (
        [_read(source, config, pipeline, progress, strict=strict) for source in some]
        for some in (train_sources, valid_sources)
    )
    sources = [report for _, report in (*train_parts, *valid_parts)]
    if strict and not config.allow_lost_rows:
        refuse_lost_data(sources, config.max_length)
    train = Examples.joined([examples for examples, _ in train_parts])
    valid = Examples.joined([examples for examples, _ in valid_parts])
    if valid_sources and config.valid_fraction == "auto":
        config = config.model_copy(update={"valid_fraction": 0.0})
    elif not valid_sources:
        config, train, valid = _with_held_out(config, train, weights, progress or NoProgress(), strict=strict)
    mixture = list(zip(train.counts(), weights, strict=True))
    for source, (number, weight) in zip(train_sources, mixture, strict=True):
        if strict and weight is not None and not number:
            hint = "give more rows, or a validation file with --valid"
            raise UserError("its rows are all held out: none is left for its share", where=source.name, hint=hint)
    if strict:
        _refuse_empty_shares(train_sources, [weight for weight in weights if weight is not None], len(train))
    compared = OBJECTIVES[config.objective].compares
    shared = np.isin(content_ids(valid, compared=compared), content_ids(train, compared=compared))
    report = DataReport(
        sources=_with_parts(sources, train, valid),
        train=PartReport.of(train, compared=compared),
        valid=PartReport.of(valid, compared=compared),
        shared=counted(valid, shared, compared=compared),
        settings=config.model_dump(mode="json", include=_SETTINGS),
        first_shared=valid.first_rows(shared, ORIGINS_NAMED),
    )
    if strict and pipeline.objective.mismatches:
        train, valid = (_mismatched(part, config) for part in (train, valid))
    fraction = float(config.valid_fraction)
    return PreparedData(train, valid, report, [*train_sources, *valid_sources], mixture, fraction, tokenizer)


def survey(config: TrainConfig, tokenizer: Any, progress: ReadingProgress | None = None) -> PreparedData:
    """As `prepare`, for a look: whatever is wrong with rows is in the report, and nothing of it is an error.

    Raises:
        UserError: for data that cannot be read at all.
    """
    return prepare(config, tokenizer, progress, strict=False)


def prepare_file(
    data: str, config: TrainConfig, tokenizer: Any, progress: ReadingProgress | None = None
) -> tuple[Examples, SourceReport]:
    """The examples of one source as the configuration's settings make them; of a folder, its test or else valid part.

    Raises:
        UserError: as `prepare` does, but for rows that are lost.
    """
    source = _named_part(locate(data), data, "test", "valid")
    pipeline = Pipeline.from_config(config, tokenizer)
    examples, report = _read(source, config, pipeline, progress, strict=True)
    return _mismatched(examples, config) if pipeline.objective.mismatches else examples, report


def _mismatched(examples: Examples, config: TrainConfig) -> Examples:
    return with_mismatched(examples, config.batch_size, config.max_length) if examples else examples


def _with_parts(sources: Sequence[SourceReport], train: Examples, valid: Examples) -> list[SourceReport]:
    """The reports, with the tokens that are held out told from those that are trained on.

    Validation examples are of sources of their own, which are the last ones, or held out of those to train on.
    """
    trained, held_out = train.tokens(), valid.tokens()
    trained += [EMPTY_COLUMN] * (len(sources) - len(trained))
    held_out = [EMPTY_COLUMN] * (len(sources) - len(held_out)) + held_out if len(sources) > len(held_out) else held_out
    return [
        replace(source, tokens=replace(source.tokens, trained_on=one, held_out=other))
        for source, one, other in zip(sources, trained, held_out, strict=True)
    ]


def _refuse_empty_shares(sources: Sequence[Source], weights: Sequence[float], examples: int) -> None:
    """Raise `UserError` for a source of which no epoch of so many examples would have one."""
    for source, share in zip(sources, shares(examples, weights), strict=False):  # without weights there are no shares
        if not share:
            hint = "give it a larger share, or leave it out"
            raise UserError(f"its share of {many(examples, 'example')} is less than one", where=source.name, hint=hint)


# Which sources


def _sources(config: TrainConfig, rows: Any, valid_rows: Any) -> tuple[list[Source], list[float | None], list[Source]]:
    """The sources to train on, the weight of each, and those to validate on."""
    if rows is not None:
        valid: list[Source] = [_valid_source(config.valid, valid_rows)] if config.valid else []
        return [MemorySource("data", rows)], [None], valid
    if not config.data:
        raise UserError("no data", hint="give --data FILE", exit_code=USAGE)
    specs = [split_weight(spec) for spec in config.data]
    weights = [weight for _, weight in specs]
    if None in weights and any(weight is not None for weight in weights):
        without = next(data for data, weight in specs if weight is None)
        hint = f"give each its share, as {without}:0.5, or none"
        raise UserError(
            "some data has a share of the mixture, and this has none", where=without, hint=hint, exit_code=USAGE
        )
    train: list[Source] = []
    valid = []
    for data, _ in specs:
        parts = locate(data)
        train.append(_named_part(parts, data, "train"))
        if "valid" in parts:
            if config.valid_fraction not in ("auto", 0):
                raise UserError(
                    "the folder has a valid part, and valid_fraction asks for another",
                    where=data,
                    hint="leave out --valid-fraction, or give --data the train file itself",
                    exit_code=USAGE,
                )
            valid.append(parts["valid"])
    if config.valid:
        valid = [_valid_source(config.valid, valid_rows)]
    return train, weights, valid


def _valid_source(valid: str, rows: Any) -> Source:
    return MemorySource("valid", rows) if rows is not None else _named_part(locate(valid), valid, "valid")


def _named_part(parts: dict[str, Source], data: str, *wanted: str) -> Source:
    """The wanted part of the data, which a file is as a whole."""
    for name in ("all", *wanted):
        if name in parts:
            return parts[name]
    raise UserError(
        f"the folder has no {wanted[0]} part",
        where=data,
        hint=f"put {wanted[0]}.jsonl in it, or name one of its files",
        exit_code=USAGE,
    )


# What is kept of them


def _read(
    source: Source, config: TrainConfig, pipeline: Pipeline, progress: ReadingProgress | None, *, strict: bool
) -> tuple[Examples, SourceReport]:
    """A source's examples, each cut, dropped or refused as the configuration says, and what became of every row.

    Args:
        strict: Whether what is wrong with rows is an error, as far as the configuration says so, or a note.
    """
    bad = BadRows(source.name, refused=strict and not config.skip_bad_rows)
    workers, keep = config.data_workers, config.data_cache
    result = tokenized(source, pipeline, progress or NoProgress(), workers=workers, keep=keep, on_lost=bad.add)
    bad.refuse()
    compared = bool(pipeline.objective and pipeline.objective.compares)
    examples = Examples([result.store])
    truncation = truncate(examples, config.max_length, config.overlong, compared=compared, strict=strict)
    examples = truncation.examples
    lost = ((row.number, row.note) for row in result.store.lost)
    notes = [note for _, note in merge(lost, truncation.notes, key=lambda numbered: numbered[0])]
    report = SourceReport(
        source.name,
        result.sha256,
        result.store.row_format,
        kept=len(np.unique(examples.rows)),
        examples=len(examples),
        split=truncation.split,
        tokens=truncation.tokens,
        facts=examples.facts(),
        first=_first(examples, truncation),
        signs=examples.sign_counts(SIGNS),
        notes=notes,
        keys=result.store.keys,
    )
    if not examples and strict:
        are_bad, are_dropped = (f"{number} {'is' if number == 1 else 'are'}" for number in (report.bad, report.dropped))
        raise UserError(
            f"nothing to train on: of {many(report.rows, 'row')} {are_bad} bad and {are_dropped} dropped",
            where=source.name,
            hint=f"the first: {notes[0].origin}: {notes[0].reason}",
        )
    return examples, report


def _first(examples: Examples, truncation: Truncation) -> dict[str, list[str]]:
    """The origins of the first rows of each finding."""
    found = {one.fact: examples.first_rows(examples.fact(one.fact) > 0, ORIGINS_NAMED) for one in FACT_FINDINGS}
    too_long = [note.origin for _, note in truncation.notes[:ORIGINS_NAMED]]
    return {name: origins for name, origins in (found | {"too_long": too_long}).items() if origins}


# What is held out

AUTO_FROM = 100
"""Rows from which on some are held out where nothing is said of it: of fewer, none can be spared."""
_AUTO_SHARE, _AUTO_LEAST, _AUTO_MOST = 0.05, 10, 200
"""So many of them, in rows; docs/decisions.md says why."""


def _with_held_out(
    config: TrainConfig,
    examples: Examples,
    weights: Sequence[float | None],
    progress: ReadingProgress,
    *,
    strict: bool,
) -> tuple[TrainConfig, Examples, Examples]:
    """The configuration with the share that is held out, as a number, and the examples to train and to validate on.

    What `auto` would hold out is trained on where that would leave a source of a mixture without rows, or nothing to train on.
    """
    fraction, automatic, rows = config.valid_fraction, config.valid_fraction == "auto", len(np.unique(examples.rows))
    if fraction == "auto":
        wanted = min(_AUTO_MOST, max(_AUTO_LEAST, round(_AUTO_SHARE * rows)))
        fraction = wanted / rows if rows >= AUTO_FROM else 0.0
    train, valid = examples, Examples.joined([])
    if fraction:
        try:
            train, valid = split(examples, fraction, config.seed)
        except UserError:
            if strict and not automatic:
                raise
    emptied = any(weight is not None and not number for number, weight in zip(train.counts(), weights, strict=True))
    if automatic and (emptied or not valid):
        fraction, train, valid = 0.0, examples, Examples.joined([])
    if automatic and valid:
        held_out = len(np.unique(valid.rows))
        progress.note(
            f"{held_out:,} of {rows:,} rows are held out, to tell which step's result is the best; --valid-fraction 0 trains on all"
        )
    return config.model_copy(update={"valid_fraction": fraction}), train, valid


def split(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Training and validation examples, drawn by the seed; the order is kept.

    Equal rows stay together, so do the turns of one row, and rows that have a turn in common.

    Raises:
        UserError: where the two cannot both have an example.
    """
    groups, sizes = _groups(examples)
    if len(sizes) < 2:
        raise UserError(
            f"cannot hold out a part of {len(sizes)} different conversation",
            hint="give more rows, or a validation file with --valid",
        )
    order = np.random.default_rng(seed).permutation(len(sizes))
    wanted = max(1, round(fraction * len(examples)))
    held_out = np.zeros(len(sizes), bool)
    taken = 0
    for group, size in zip(order[:-1].tolist(), sizes[order[:-1]].tolist(), strict=True):
        if taken + size <= wanted:
            held_out[group] = True
            taken += size
            if taken == wanted:
                break
    if not taken:
        held_out[order[np.argmin(sizes[order])]] = True
    chosen = held_out[groups]
    return examples.select(np.flatnonzero(~chosen)), examples.select(np.flatnonzero(chosen))


def _groups(examples: Examples) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which group each example is of, groups numbered as they first appear; and the groups' sizes in examples.

    Rows are of one group where an example of the one equals an example of the other: conversations with the same first turns
    have these in common where each turn is an example.
    """
    _, content_of = np.unique(examples.content_ids(), return_inverse=True)
    _, row_of = np.unique(examples.rows, return_inverse=True)
    group_of_row = np.arange(row_of.max(initial=-1) + 1)  # the first row that each is known to be with
    while True:
        first = np.full(content_of.max(initial=-1) + 1, len(group_of_row))
        np.minimum.at(first, content_of, group_of_row[row_of])
        nearer = group_of_row.copy()
        np.minimum.at(nearer, group_of_row[row_of], first[content_of])  # the whole group goes over, not a row at a time
        nearer = nearer[nearer]
        if np.array_equal(nearer, group_of_row):
            break
        group_of_row = nearer
    _, groups = np.unique(group_of_row[row_of], return_inverse=True)
    return groups, np.bincount(groups)
