"""The data in a few numbers: fates, lengths before anything is cut, what the cut takes away, duplicates and signs.

docs/data.md explains the keys of the dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mlx_sft.data.dataset import Examples
from mlx_sft.data.findings import ORIGINS_NAMED, first_of
from mlx_sft.data.key_counts import columns, unused_keys
from mlx_sft.data.part_report import PartReport, histogram, length_summary
from mlx_sft.data.report import DataReport, reasons
from mlx_sft.data.screening import SIGN_MEANINGS


def table(report: DataReport, whole: Sequence[Examples], max_length: int) -> dict[str, Any]:
    """What `inspect` says of the data as a whole.

    Args:
        report: Of the data within max_length.
        whole: The examples of each part before anything was cut or dropped for its length.
    """
    uncut = Examples.joined(whole)
    train, valid = report.train, report.valid
    both = PartReport.of(uncut, compared=bool(train.pairs or valid.pairs))
    return {
        "rows": report.fates,
        "sources": [{"name": source.name, "format": source.format} | source.fates for source in report.sources],
        "train": _part(train),
        "valid": _part(valid),
        "validation_rows_also_in_train": report.shared,
        **_part(both),
        "lengths": both.lengths,
        "histogram": both.histogram,
        "supervised_lengths": length_summary(uncut.supervised_tokens),
        "supervised_histogram": histogram(uncut.supervised_tokens),
        "max_length": max_length,
        "too_long": {
            "examples": int((uncut.lengths > max_length).sum()),
            "split": report.split,
            "tokens_lost": report.tokens.cut_off.all + report.tokens.dropped.all,
            "supervised_tokens_lost": report.tokens.supervised_lost,
        },
        "token_columns": report.tokens.to_json(),
        "duplicates": {
            "count": train.duplicates + valid.duplicates,
            "origins": first_of([train.first_duplicates, valid.first_duplicates]),
        },
        "longest": both.longest,
        "signs": _signs([train, valid]),
        "keys": columns(report.keys),
        "unused_keys": [key.to_json() for key in unused_keys(report.keys)],
        "reasons": reasons(report.notes),
        "template": asdict(report.facts),
        "findings": [finding.to_json() for finding in report.findings()],
        "warnings": report.warnings(),
    }


def _part(part: PartReport) -> dict[str, Any]:
    return {
        **({"pairs": part.pairs} if part.pairs else {}),
        "examples": part.rows,
        "tokens": part.tokens,
        "supervised_tokens": part.supervised_tokens,
        "supervised_share": round(part.supervised_share, 4),
    }


def _signs(parts: Sequence[PartReport]) -> dict[str, dict[str, Any]]:
    signs = {}
    for name, meaning in SIGN_MEANINGS.items():
        found = [part.signs[name] for part in parts if name in part.signs]
        if found:
            origins = [origin for one in found for origin in one["origins"]][:ORIGINS_NAMED]
            signs[name] = {"count": sum(one["count"] for one in found), "meaning": meaning, "origins": origins}
    return signs
