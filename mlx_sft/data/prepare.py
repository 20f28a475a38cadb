"""The data room's entrance: the configuration's data → examples to train and to validate on, and the report.

Knows which rows are kept and how they are split; knows nothing of how a row is read, rendered or tokenized.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_sft.config import TrainConfig
from mlx_sft.data.encode import Encoder, Example
from mlx_sft.data.files import Source, locate
from mlx_sft.data.formats import read_item
from mlx_sft.data.readers import Row
from mlx_sft.data.report import DataReport, Note, PartReport, SourceReport, length_summary
from mlx_sft.errors import USAGE, UserError

SHOWN_BAD_ROWS = 10
"""So many bad rows are named in one error."""
ROWS_BETWEEN_CALLS = 1_000
"""Progress is told after so many rows."""
Progress = Callable[[int], None]
_SETTINGS = {
    *("max_length", "overlong", "train_on", "skip_bad_rows"),
    *("valid_fraction", "seed", "chat_template_kwargs"),
}


@dataclass(frozen=True)
class PreparedData:
    """Examples in the order of their rows, and what became of every row."""

    train: list[Example]
    valid: list[Example]
    report: DataReport


def prepare(config: TrainConfig, tokenizer: Any, progress: Progress | None = None) -> PreparedData:
    """Read, encode and split the data that the configuration names.

    Validation rows are those of `config.valid`, else a share of the rows, else the folder's own valid part, else none.

    Args:
        config: Names the data, and how it is split, cut and rendered.
        tokenizer: A fast tokenizer of transformers, or mlx-lm's wrapper of one.
        progress: Called every `ROWS_BETWEEN_CALLS` rows with the number of rows read of the present source.

    Raises:
        UserError: for data that cannot be read; naming up to ten bad rows at once, unless they are to be skipped; for a
            row that is too long where that is an error; and where nothing is left to learn from.
    """
    if config.data is None:
        raise UserError("no data", hint="give --data FILE", exit_code=USAGE)
    encoder = Encoder(tokenizer, config.train_on, config.chat_template_kwargs)
    parts = locate(config.data)
    examples, source = _read(_part(parts, config.data, "train"), config, encoder, progress)
    sources = [source]
    if config.valid_fraction > 0:
        if "valid" in parts:
            raise UserError(
                "the folder has a valid part, and valid_fraction asks for another",
                where=config.data,
                hint="leave out --valid-fraction, or give --data the train file itself",
                exit_code=USAGE,
            )
        train, valid = split(examples, config.valid_fraction, config.seed)
    else:
        train, valid = examples, []
        source_of_valid = _part(locate(config.valid), config.valid, "valid") if config.valid else parts.get("valid")
        if source_of_valid:
            valid, source = _read(source_of_valid, config, encoder, progress)
            sources.append(source)
    known = {example.digest() for example in train}
    report = DataReport(
        sources=sources,
        train=_part_report(train),
        valid=_part_report(valid),
        shared=sum(example.digest() in known for example in valid),
        settings=config.model_dump(mode="json", include=_SETTINGS),
    )
    return PreparedData(train, valid, report)


def prepare_file(
    data: str, config: TrainConfig, tokenizer: Any, progress: Progress | None = None
) -> tuple[list[Example], SourceReport]:
    """The examples of one source as the configuration's settings make them; of a folder, its test or else valid part.

    Raises:
        UserError: as `prepare` does.
    """
    source = _part(locate(data), data, "test", "valid")
    return _read(source, config, Encoder(tokenizer, config.train_on, config.chat_template_kwargs), progress)


def split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and validation examples, drawn by the seed; equal examples stay together, the order is kept.

    Raises:
        UserError: where the two cannot both have an example.
    """
    groups: dict[bytes, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(example.digest(), []).append(index)
    if len(groups) < 2:
        raise UserError(
            f"cannot hold out a part of {len(groups)} different conversation",
            hint="give more rows, or a validation file with --valid",
        )
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    members = list(groups.values())
    drawn: list[list[int]] = [members[index] for index in order]
    wanted = max(1, round(fraction * len(examples)))
    held_out: set[int] = set()
    for group in drawn[:-1]:
        if len(held_out) + len(group) <= wanted:
            held_out.update(group)
    if not held_out:
        smallest = min(drawn, key=len)
        held_out.update(smallest)
    train = [example for index, example in enumerate(examples) if index not in held_out]
    valid = [example for index, example in enumerate(examples) if index in held_out]
    return train, valid


def fingerprint(examples: Sequence[Example]) -> str:
    """SHA-256 over the examples' tokens and labels, in order; the same on every machine."""
    return hashlib.sha256(b"".join(example.digest() for example in examples)).hexdigest()


def _part(parts: dict[str, Source], data: str, *wanted: str) -> Source:
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


def _read(
    source: Source, config: TrainConfig, encoder: Encoder, progress: Progress | None
) -> tuple[list[Example], SourceReport]:
    """A source's examples, each cut, dropped or refused as the configuration says, and what became of every row."""
    examples: list[Example] = []
    report = SourceReport(source.name, source.sha256())
    bad: list[UserError] = []
    for number, row in enumerate(source.rows(), 1):
        if progress and number % ROWS_BETWEEN_CALLS == 0:
            progress(number)
        try:
            example = _encode(row, encoder)
        except UserError as error:
            report.notes.append(Note(error.where, "bad", error.what))
            bad.append(error)
            if len(bad) == SHOWN_BAD_ROWS and not config.skip_bad_rows:
                break
            continue
        kept, note = _fit(example, config)
        if note:
            report.notes.append(note)
        if kept:
            report.kept += 1
            report.turns_with_text_left_out += kept.facts.turns_with_text_left_out
            examples.append(kept)
    if bad and not config.skip_bad_rows:
        raise _bad_rows(source, bad)
    if not examples:
        raise UserError(
            f"nothing to learn: of {report.rows} rows {report.bad} are bad and {report.dropped} are dropped",
            where=source.name,
            hint=f"the first: {report.notes[0].origin}: {report.notes[0].reason}",
        )
    return examples, report


def _encode(row: Row | UserError, encoder: Encoder) -> Example:
    if isinstance(row, UserError):
        raise row
    example = encoder.encode(read_item(row))
    if not example.supervised_tokens:
        raise UserError(
            "a conversation with nothing to learn: no token of it is the model's to write",
            where=row.origin,
            hint="give it an assistant turn that the chat template writes",
        )
    return example


def _fit(example: Example, config: TrainConfig) -> tuple[Example | None, Note | None]:
    """The example within `max_length`, or none; with a note where it is not as it was."""
    length, longest = len(example), config.max_length
    if length <= longest:
        return example, None
    if config.overlong == "error":
        raise UserError(
            f"{length} tokens, where max_length is {longest}",
            where=example.origin,
            hint="raise --max-length, or choose --overlong truncate or drop",
        )
    if config.overlong == "drop":
        return None, Note(example.origin, "dropped", f"{length} tokens, more than {longest}")
    cut = example.truncated(longest)
    if not cut.supervised_tokens:
        return None, Note(example.origin, "dropped", f"none of its first {longest} tokens (of {length}) is learnt")
    return cut, Note(example.origin, "truncated", f"{length} tokens, cut to {longest}")


def _bad_rows(source: Source, bad: list[UserError]) -> UserError:
    go_on = "to go on past bad rows and have them reported: --skip-bad-rows"
    if len(bad) == 1:
        hint = f"{bad[0].hint}; {go_on}" if bad[0].hint else go_on
        return UserError(bad[0].what, where=bad[0].where, hint=hint)
    count = f"at least {len(bad)}" if len(bad) == SHOWN_BAD_ROWS else str(len(bad))
    lines = "".join(f"\n  {error.where}: {error.what}" for error in bad)
    hints = list(dict.fromkeys(error.hint for error in bad if error.hint))
    return UserError(
        f"{count} rows cannot be used:{lines}",
        where=source.name,
        hint="\n  ".join([*hints[:3], go_on]),
    )


def _part_report(examples: Sequence[Example]) -> PartReport:
    return PartReport(
        rows=len(examples),
        tokens=sum(len(example) for example in examples),
        supervised_tokens=sum(example.supervised_tokens for example in examples),
        duplicates=len(examples) - len({example.digest() for example in examples}),
        lengths=length_summary(examples),
        fingerprint=fingerprint(examples),
    )
