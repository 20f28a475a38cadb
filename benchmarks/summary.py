"""Rounds of runs → medians, ratios pair by pair, and our share of the limit. Pure arithmetic on what was recorded."""

from __future__ import annotations

import statistics
from typing import Any

Run = dict[str, Any]
"""A `Result` as a mapping, or `{"failed": why, "highest_bytes": so far}`."""


def derived(result: Run) -> Run:
    """Speeds and the share of padding of a run that went well."""
    seconds, padded = result["seconds"], result["padded_tokens"]
    return result | {
        "tokens_per_second": result["tokens"] / seconds,
        "supervised_tokens_per_second": result["supervised_tokens"] / seconds,
        "padding_share": 1 - result["needed_tokens"] / padded if padded else None,
    }


def went_well(run: Run | None) -> bool:
    return run is not None and "failed" not in run


def summarize(rounds: list[dict[str, Run]]) -> dict[str, Any]:
    """Of a point: each trainer's medians, our ratios to each peer, and the limit with our share of it."""
    names = list(dict.fromkeys(name for one in rounds for name in one if name != "limit"))
    trainers = {name: medians([one[name] for one in rounds if went_well(one.get(name))]) for name in names}
    failures = {
        name: next(one[name] for one in rounds if name in one)
        for name in names
        if not any(went_well(one.get(name)) for one in rounds)
    }
    ratios = {name: ratio for name in names if name != "ours" and (ratio := ratios_to(rounds, name))}
    return {"trainers": trainers | failures, "ratios": ratios, "limit": limit_summary(rounds)}


def medians(runs: list[Run]) -> Run:
    """The median of everything that is a number."""
    if not runs:
        return {}
    keys = [key for key, value in runs[0].items() if isinstance(value, int | float) and not isinstance(value, bool)]
    found: Run = {key: statistics.median(run[key] for run in runs) for key in keys}
    return found | {"runs": len(runs), "memory_is": runs[0]["memory_is"], "notes": runs[-1]["notes"]}


def ratios_to(rounds: list[dict[str, Run]], peer: str) -> dict[str, Any]:
    """Ours divided by the peer's, round by round."""
    both = [one for one in rounds if went_well(one.get("ours")) and went_well(one.get(peer))]
    if not both:
        return {}
    ratios = {}
    for key in ("tokens_per_second", "peak_bytes", "loss"):
        pairs = [one["ours"][key] / one[peer][key] for one in both]
        ratios[key] = {"median": statistics.median(pairs), "pairs": pairs}
    return ratios


def limit_summary(rounds: list[dict[str, Run]]) -> dict[str, Any]:
    """The limit's seconds, and our share of it round by round."""
    both = [one for one in rounds if went_well(one.get("ours")) and went_well(one.get("limit"))]
    if not both:
        return {}
    shares = [one["limit"]["seconds"] / one["ours"]["seconds"] for one in both]
    return {
        "seconds": statistics.median(one["limit"]["seconds"] for one in both),
        "flops": both[0]["limit"]["flops"],
        "flops_per_second": statistics.median(one["limit"]["flops_per_second"] for one in both),
        "parts": {
            part: statistics.median(one["limit"]["parts"][part] for one in both) for part in both[0]["limit"]["parts"]
        },
        "share": {"median": statistics.median(shares), "pairs": shares},
    }
