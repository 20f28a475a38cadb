"""`eval` on several models: each on the same rows, one in memory at a time; a table of what was found."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_sft.console import columns
from mlx_sft.data.dataset import Examples
from mlx_sft.data.report import SourceReport
from mlx_sft.data.sources import locate
from mlx_sft.errors import USAGE, UserError
from mlx_sft.evaluate import EvaluationResult, evaluate_examples, examples_of
from mlx_sft.load import Trained, config_of, load_named
from mlx_sft.methods import method_in
from mlx_sft.methods.results import adapter_folder
from mlx_sft.model.load import LoadedModel
from mlx_sft.objectives import make_objective
from mlx_sft.run_folder import RunFolder
from mlx_sft.short_answers import answered

_COLUMNS = ("", "loss", "perplexity", "token accuracy", "exact match", "F1", "supervised tokens", "rows")


@dataclass(frozen=True)
class Named:
    """A model as a person named it.

    Attributes:
        label: In words.
        named: What `load_named` takes.
    """

    label: str
    named: dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """What was found of a model.

    Attributes:
        label: The model, in words.
        objective: What its loss is the loss of.
        whole: On all rows.
        by_source: On those of each source, where there are several.
    """

    label: str
    objective: str
    whole: EvaluationResult
    by_source: dict[str, EvaluationResult]

    def to_json(self) -> str:
        """A line of JSON."""
        sources = {name: result.record() for name, result in self.by_source.items()}
        record = {"name": self.label, **self.whole.record(), **({"sources": sources} if sources else {})}
        return json.dumps(record, allow_nan=False)


def each_named(
    runs: Sequence[str], models: Sequence[str], adapters: Sequence[str], *, base: bool = False, **of_run: Any
) -> list[Named]:
    """The models that are named by runs, models and adapters.

    One model and one adapter alone are the adapter on that model. Otherwise each is a model of its own, and an adapter is on the model
    where there is one, else on the base that it names.

    Args:
        base: Each run's model as it was before training.
        of_run: `step`, `base_model` and `strength` of `load_run`, for every run.

    Raises:
        UserError: If nothing is named, what is named does not go together, or a run or an adapter is not there.
    """
    if not runs and not models and not adapters:
        hint = "mlx-sft eval runs/... --data held_out.jsonl"
        raise UserError("give a run (RUN or --run), --model or --adapter", hint=hint, exit_code=USAGE)
    of_run = {name: value for name, value in of_run.items() if value is not None}
    if not runs and (base or of_run):
        option = "--base" if base else "--" + next(iter(of_run)).replace("_", "-")
        raise UserError(f"{option} goes with --run (or RUN)", hint=f"leave {option} out", exit_code=USAGE)
    said = [f"{name} {of_run[name]}" for name in ("step", "strength") if name in of_run]
    step = f" ({', '.join(said)})" if said else ""
    found = [Named(run + (" (base)" if base else step), {"run": run, "base": base, **of_run}) for run in runs]
    of_adapters = {"model": models[0]} if len(models) == 1 else {}
    if (len(runs), len(models), len(adapters)) != (0, 1, 1):
        found += [Named(model, {"model": model}) for model in models]
    return found + [Named(adapter, {"adapter": adapter, **of_adapters}) for adapter in adapters]


def measure(models: Sequence[Named], data: Sequence[str], *, generate: bool = False) -> Iterator[Measured]:
    """Each model's figures on the same rows; the rows are read as its run reads them, or as training does by itself.

    Args:
        generate: Let it write short answers too, and compare their words with the rows'.

    Raises:
        UserError: If a run, an adapter or data are not there, before anything is measured; and as `evaluate_model`.
    """
    for model in models:
        _refuse_missing(**model.named)
    for one in data:
        locate(one)
    for model in models:
        found = _measured(model, load_named(**model.named), data, generate)
        gc.collect()  # a compiled model is in a circle of references, and goes before the next one comes
        mx.clear_cache()
        yield found


def _refuse_missing(run: str | None = None, adapter: str | None = None, base: bool = False, **others: Any) -> None:
    if run is not None:
        folder = RunFolder.open(run)
        config = config_of(folder, others.get("base_model"))
        if not base:
            Trained(folder, config, others.get("step"))
    if adapter is not None:
        place = adapter_folder(adapter)
        method_in(place).base_model(place)


def _measured(model: Named, loaded: LoadedModel, data: Sequence[str], generate: bool) -> Measured:
    parts: dict[str, tuple[Examples, SourceReport]] = {}
    for one in dict.fromkeys(data):
        examples, report, config = examples_of(loaded, one)
        parts[one] = examples, report
    if generate and make_objective(config).compares:
        what = f"--generate measures answers, and with --objective {config.objective} a row has several to compare"
        raise UserError(what, where=model.label, hint="leave --generate out", exit_code=USAGE)
    found = {
        name: EvaluationResult(
            evaluate_examples(loaded, examples, config), report, answered(loaded, examples) if generate else []
        )
        for name, (examples, report) in parts.items()
    }
    if len(parts) == 1:
        return Measured(model.label, config.objective, next(iter(found.values())), {})
    joined = Examples.joined([examples for examples, _ in parts.values()])
    reports = [report for _, report in parts.values()]
    together = SourceReport(
        "",
        None,
        kept=sum(report.kept for report in reports),
        notes=[note for report in reports for note in report.notes],
    )
    f1 = [one for result in found.values() for one in result.f1]
    return Measured(
        model.label, config.objective, EvaluationResult(evaluate_examples(loaded, joined, config), together, f1), found
    )


def table(measured: Sequence[Measured]) -> str:
    """Aligned columns: a line for each model, and below it one for each source where there are several."""
    lines = [[*_COLUMNS]]
    for one in measured:
        lines.append([one.label, *_cells(one.whole)])
        lines += [[f"  {name}", *_cells(result)] for name, result in one.by_source.items()]
    if not any(one.whole.f1 for one in measured):
        for line in lines:
            del line[_COLUMNS.index("F1")]
    return columns(lines[0], lines[1:], left=_COLUMNS[:1])


def _cells(found: EvaluationResult) -> list[str]:
    return [
        f"{found.loss:.4f}",
        "-" if found.perplexity is None else f"{found.perplexity:.2f}",
        f"{found.token_accuracy:.1%}",
        f"{found.exact_match:.1%}",
        f"{found.mean_f1:.1%} of {len(found.f1)}" if found.f1 else "-",
        f"{found.supervised_tokens:,}",
        found.fates(),
    ]


def difference(measured: Sequence[Measured]) -> str | None:
    """Why the losses cannot be compared as they stand; None where they can."""
    if len(objectives := dict.fromkeys(one.objective for one in measured)) > 1:
        return f"their losses are not of the same objective: {' and '.join(objectives)}"
    counts = {one.whole.supervised_tokens: one.label for one in measured}
    if len(counts) < 2:
        return None
    told = ", ".join(f"{tokens:,} of {label}" for tokens, label in counts.items())
    return (
        f"the models have different supervised tokens in these rows ({told}), by their tokenizers, chat templates or the runs' settings: "
        "their losses are not of the same things"
    )
