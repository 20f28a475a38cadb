"""The data in a few numbers: fates, lengths before anything is cut, what the cut takes away, duplicates and signs.

Knows columns and counts; the dictionary is the machine form, whose keys docs/data.md explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from mlx_sft.data.lengths import histogram, length_summary
from mlx_sft.data.report import ORIGINS_NAMED, DataReport, PartReport, reasons
from mlx_sft.data.screening import SIGN_MEANINGS
from mlx_sft.data.store import Examples


def table(report: DataReport, whole: Sequence[Examples], parts: Sequence[Examples], max_length: int) -> dict[str, Any]:
    """What `inspect` says of the data as a whole.

    Args:
        report: Of the data within max_length.
        whole: The examples of each part before anything was cut or dropped for its length.
        parts: The examples of each part that are used.
    """
    lengths = np.concatenate([examples.lengths for examples in whole])
    supervised = np.concatenate([examples.supervised_tokens for examples in whole])
    too_long = lengths > max_length
    kept_tokens = sum(int(examples.lengths.sum(dtype=np.int64)) for examples in parts)
    kept_supervised = sum(int(examples.supervised_tokens.sum(dtype=np.int64)) for examples in parts)
    notes = [note for source in report.sources for note in source.notes]
    return {
        "rows": {fate: getattr(report, fate) for fate in ("rows", "kept", "truncated", "dropped", "bad")},
        "sources": [
            {"name": source.name, "format": source.format}
            | {fate: getattr(source, fate) for fate in ("rows", "kept", "truncated", "dropped", "bad")}
            for source in report.sources
        ],
        "train": _part(report.train),
        "valid": _part(report.valid),
        "validation_rows_also_in_train": report.shared,
        "examples": len(lengths),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "supervised_tokens": int(supervised.sum(dtype=np.int64)),
        "supervised_share": _share(int(supervised.sum(dtype=np.int64)), int(lengths.sum(dtype=np.int64))),
        "lengths": length_summary(lengths),
        "histogram": histogram(lengths),
        "supervised_lengths": length_summary(supervised),
        "supervised_histogram": histogram(supervised),
        "max_length": max_length,
        "too_long": {
            "examples": int(too_long.sum()),
            "tokens_lost": int(lengths.sum(dtype=np.int64)) - kept_tokens,
            "supervised_tokens_lost": int(supervised.sum(dtype=np.int64)) - kept_supervised,
        },
        "duplicates": _duplicates(parts),
        "longest": _longest(whole),
        "signs": _signs([report.train, report.valid]),
        "reasons": reasons(notes),
        "template": asdict(report.facts),
        "warnings": report.warnings(),
    }


def first_of_equals(examples: Examples) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The index of the first example that equals each; shape (examples,)."""
    _, first, inverse = np.unique(examples.content_ids(), return_index=True, return_inverse=True)
    return np.asarray(first[inverse], np.int64)


def _part(part: PartReport) -> dict[str, Any]:
    return {
        "examples": part.rows,
        "tokens": part.tokens,
        "supervised_tokens": part.supervised_tokens,
        "supervised_share": round(part.supervised_share, 4),
    }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _duplicates(parts: Sequence[Examples]) -> dict[str, Any]:
    count = 0
    origins: dict[str, None] = {}  # the turns of a row share its origin
    for examples in parts:
        later = np.flatnonzero(first_of_equals(examples) != np.arange(len(examples)))
        count += len(later)
        origins |= dict.fromkeys(examples.row_origin(index) for index in later[: 4 * ORIGINS_NAMED].tolist())
    return {"count": count, "origins": list(origins)[:ORIGINS_NAMED]}


def _longest(whole: Sequence[Examples]) -> list[dict[str, Any]]:
    found = []
    for examples in whole:
        order = np.argsort(-examples.lengths.astype(np.int64), kind="stable")[:ORIGINS_NAMED]
        found += [{"origin": examples[i].origin, "tokens": int(examples.lengths[i])} for i in order.tolist()]
    return sorted(found, key=lambda row: -row["tokens"])[:ORIGINS_NAMED]


def _signs(parts: Sequence[PartReport]) -> dict[str, dict[str, Any]]:
    signs = {}
    for name, meaning in SIGN_MEANINGS.items():
        found = [part.signs[name] for part in parts if name in part.signs]
        if found:
            origins = [origin for one in found for origin in one["origins"]][:ORIGINS_NAMED]
            signs[name] = {"count": sum(one["count"] for one in found), "meaning": meaning, "origins": origins}
    return signs
