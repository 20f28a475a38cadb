"""What came out, in words and columns: for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_sft.compare.comparison import Comparison, Figures
from mlx_sft.compare.trials import Trial
from mlx_sft.console import columns, count, duration, many, size

COLUMNS = (
    "method", "trained", "share", "memory", "time", "learning rate", "loss", "exact match", "forgetting", "on disk", "mergeable",
)  # fmt: skip
_NEAR = 1.02
"""Times the lowest loss: what is no worse is as good, within what another seed would change."""


def rows(comparison: Comparison) -> list[list[str]]:
    """A row of text for the base, and for each candidate in the order in which they were named."""
    record = comparison.record
    found = [["base", *["-"] * 5, *_measured(record.base), "-", "-"]] if record.base else []
    for candidate in comparison.candidates:
        trial = record.finals.get(candidate.label)
        if trial is None:
            found.append([candidate.label, *["-"] * 4, "failed", *["-"] * 5])
            continue
        result = record.results.get(candidate.label)
        share = f"{trial.parameters / record.base_parameters:.2%}" if record.base_parameters else "-"
        found.append(
            [
                candidate.label, count(trial.parameters), share, size(trial.peak_memory_bytes), duration(trial.seconds),
                f"{trial.rate:g}", *_measured(result, trial), size(result.bytes) if result else "-",
                "yes" if candidate.method.mergeable else "no",
            ]
        )  # fmt: skip
    return found


def _measured(result: Figures | None, trial: Trial | None = None) -> list[str]:
    if result is None:
        return ["-"] * 3
    return [f"{result.loss:.4f}", f"{result.exact_match:.1%}", f"{result.forgetting:.4f}" if trial else "0"]


def text(comparison: Comparison) -> str:
    """Aligned columns, and what they say."""
    table = columns(COLUMNS, rows(comparison), left=COLUMNS[:1])
    return "\n".join([table, *verdict(comparison), ""])


def markdown(comparison: Comparison) -> str:
    """The same as a table for a page of Markdown."""
    table = [list(COLUMNS), ["---", *["---:"] * (len(COLUMNS) - 1)], *rows(comparison)]
    return "".join(f"| {' | '.join(row)} |\n" for row in table)


def verdict(comparison: Comparison) -> list[str]:
    """Sentences: which had the lowest loss, which is the smallest of those that are as good, and what is to be known of the search."""
    record = comparison.record
    if not record.results:
        return []
    best = min(record.results, key=lambda label: record.results[label].loss)
    lowest = record.results[best].loss
    near = [label for label, result in record.results.items() if result.loss <= _NEAR * lowest]
    smallest = min(near, key=lambda label: record.finals[label].parameters)
    rows_of = f"{many(record.tested, 'row')} that no run was trained on"
    found = [f"{best} has the lowest loss, {lowest:.4f}, on {rows_of}."]
    if smallest != best:
        found.append(f"{smallest} trains the fewest parameters of those within {_NEAR - 1:.0%} of it.")
    found += _edges(comparison, list(record.finals.values()))
    found += [
        f"{candidate.label} failed: {_why(comparison, candidate.label)}"
        for candidate in comparison.candidates
        if candidate.label not in record.finals
    ]
    return found


def _edges(comparison: Comparison, finals: Sequence[Trial]) -> list[str]:
    """Whose best learning rate was the lowest or the highest that was tried, so that a better one may lie outside."""
    found = []
    tried = {candidate.label: candidate.rates for candidate in comparison.candidates}
    for trial in finals:
        rates = tried[trial.candidate]
        if len(rates) > 1 and trial.rate in (rates[0], rates[-1]):
            edge, way = ("lowest", "lower") if trial.rate == rates[0] else ("highest", "higher")
            found.append(
                f"{trial.candidate} was best at the {edge} learning rate that was tried, {trial.rate:g}: a {way} one may be better "
                "(--learning-rates)."
            )
    return found


def _why(comparison: Comparison, label: str) -> str:
    reasons = [trial.failed for trial in comparison.record.trials if trial.candidate == label and trial.failed]
    return reasons[0] if reasons else "none of its runs had a finite validation loss"
