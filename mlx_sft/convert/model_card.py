"""The model card of a run: what its folder says that others may know, filled into `model_card.md.jinja`.

No row of the data is in it and no path of this machine: of a file there is the name, of a folder nothing. The run folder may be
anyone's, so the kind of each value that is read is checked, and names stand in spans of code, where Markdown and HTML mean nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, ValidationError

from mlx_sft.config import TrainConfig
from mlx_sft.convert.base_info import BaseInfo, base_info
from mlx_sft.convert.hub import is_hub_id
from mlx_sft.data.new_tokens import text_of
from mlx_sft.data.sources import HUB_PREFIX
from mlx_sft.errors import UserError
from mlx_sft.files import read_json
from mlx_sft.methods import Method, make_method
from mlx_sft.objectives import Objective, make_objective
from mlx_sft.registry import OPTIMIZERS
from mlx_sft.run_folder import RunFolder
from mlx_sft.streams import printable

_TEMPLATE = str(Path(__file__).with_name("model_card.md.jinja"))
_MOST_REPORT_BYTES = 256 * 2**20
"""A report has a line for each row that was not simply kept: room for a million of them."""


# --- what a run folder says -------------------------------------------------------------------------------------------------------


class _Checked(BaseModel):
    """The fields that are needed of something in a file; others are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class RowTotals(_Checked):
    """Rows of all sources together; a truncated row is kept."""

    rows: NonNegativeInt
    kept: NonNegativeInt
    truncated: NonNegativeInt
    dropped: NonNegativeInt
    bad: NonNegativeInt


class ExampleTotals(_Checked):
    """The examples that are trained on, or those that are held out."""

    rows: NonNegativeInt
    tokens: NonNegativeInt
    supervised_tokens: NonNegativeInt


class DataSource(_Checked):
    """A file or a dataset, by the name that the run knows it by."""

    name: str
    rows: NonNegativeInt

    @property
    def public_name(self) -> str:
        """The name of a file without its folder; of a dataset all of it."""
        return self.name if self.name.startswith(HUB_PREFIX) else Path(self.name).name

    @property
    def dataset(self) -> str | None:
        """The Hub id of a dataset, where it is one."""
        parts = self.name.removeprefix(HUB_PREFIX).partition(":")[0].split("/")
        identifier = "/".join(parts[:2])
        return identifier if self.name.startswith(HUB_PREFIX) and is_hub_id(identifier) else None


class DataSummary(_Checked):
    """The numbers of `data_report.json`."""

    totals: RowTotals
    train: ExampleTotals
    valid: ExampleTotals
    sources: list[DataSource]


class MetricsRecord(_Checked):
    """The fields of a line of `metrics.jsonl` that a card shows."""

    kind: str
    step: NonNegativeInt = 0
    epoch: FiniteFloat = 0.0
    loss: FiniteFloat | None = None
    perplexity: FiniteFloat | None = None
    token_accuracy: FiniteFloat | None = None
    best: bool = False


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run went.

    Attributes:
        steps: Optimizer steps taken.
        epochs: Passes over the data that they make.
        step: The step after which the result was taken: the best by validation loss, else the last.
        loss: Training loss of that step, or of the last one before it that was not skipped.
        evaluation: The best evaluation; None without validation rows.
    """

    steps: int
    epochs: float
    step: int
    loss: float | None
    evaluation: MetricsRecord | None


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What others may know of a run. `versions` are those of the packages with which it began, by name."""

    config: TrainConfig
    base: BaseInfo
    data: DataSummary
    result: RunResult
    versions: Mapping[str, str]


def read_run_summary(run: RunFolder) -> RunSummary:
    """Summarize a finished run; raises `UserError` naming the file that cannot be read."""
    return run_summary(run, TrainConfig.resolve(run.config), read_json(run.data_report, most=_MOST_REPORT_BYTES))


def run_summary(run: RunFolder, config: TrainConfig, report: Mapping[str, Any]) -> RunSummary:
    """As `read_run_summary`, where the configuration and the content of `data_report.json` are at hand."""
    try:
        data = DataSummary.model_validate(report)
    except ValidationError as error:
        problem = error.errors()[0]
        what = f"{'.'.join(map(str, problem['loc']))} is not what a run writes there: {problem['msg']}"
        raise UserError(what, where=str(run.data_report), hint="put the file back as it was") from error
    packages = read_json(run.environment).get("packages")
    versions = packages.items() if isinstance(packages, dict) else ()
    return RunSummary(
        config=config,
        base=base_info(run, config),
        data=data,
        result=_run_result(run),
        versions={name: version for name, version in versions if isinstance(version, str)},
    )


def _run_result(run: RunFolder) -> RunResult:
    last = MetricsRecord(kind="train")
    best: MetricsRecord | None = None
    loss: float | None = None
    loss_at_best: float | None = None
    for line in run.metric_lines():
        with suppress(ValidationError):  # a damaged line is no reason to have no card
            record = MetricsRecord.model_validate_json(line)
            if record.kind == "train":
                last, loss = record, loss if record.loss is None else record.loss
            elif record.kind == "evaluation" and record.best:
                best, loss_at_best = record, loss
    if best is None:
        return RunResult(last.step, last.epoch, last.step, loss, None)
    return RunResult(last.step, last.epoch, best.step, loss_at_best, best)


# --- the card -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Published:
    """What lies beside a card on the Hub.

    Attributes:
        repository: `owner/name`.
        merged: A whole checkpoint; else the adapter in PEFT's files.
        mlx_lm: The folder that holds the adapter in mlx-lm's files; empty where there is none.
        strength: By which what was trained is scaled; None for as it is.
    """

    repository: str
    merged: bool
    mlx_lm: str = ""
    strength: float | None = None


def model_card(summary: RunSummary, published: Published | None = None) -> str:
    """The content of a `README.md`: of what is published, or of the run folder itself."""
    base, method, objective = summary.base, make_method(summary.config), make_objective(summary.config)
    whole = published.merged if published else not method.frozen_base
    named = f"[{base.name}](https://huggingface.co/{base.name})" if base.on_hub else _code(base.name)
    revision = f', revision="{base.revision}"' if base.revision else ""
    card = ModelCard.from_template(
        _metadata(summary, method, whole),
        template_path=_TEMPLATE,
        title=published.repository if published else f"A fine-tuned {_code(base.name)}",
        what_it_is=_what_it_is(method, objective, named, whole),
        peft=method.peft,
        adapters=method.alone == "adapters",
        in_peft_generate=method.in_peft_generate,
        keys_in_front=method.keys_in_front,
        mergeable=method.mergeable,
        base=base,
        named_base=named,
        base_arguments=f'"{base.name}"{revision}' if base.on_hub else '"path/to/the/base"',
        data=summary.data,
        config=summary.config,
        method=_marked(method.describe()),
        objective=_marked(objective.describe()),
        needs_reference=objective.needs_reference,
        new_tokens=_marked(", ".join(f"`{text_of(token)}`" for token in summary.config.add_tokens or [])),
        optimizer=OPTIMIZERS[summary.config.optimizer].__name__,
        result=summary.result,
        published=published,
        versions=summary.versions,
        code=_code,
        number="{:,}".format,
    )
    return f"{card}\n"


def _metadata(summary: RunSummary, method: Method, whole: bool) -> ModelCardData:
    """What the Hub reads of a card."""
    base = summary.base
    relation = "finetune" if whole else "adapter"
    datasets = dict.fromkeys(source.dataset for source in summary.data.sources if source.dataset)
    return ModelCardData(
        base_model=base.name if base.on_hub else None,
        base_model_relation=relation if base.on_hub else None,
        license=base.licence.get("license"),
        license_name=base.licence.get("license_name"),
        license_link=base.licence.get("license_link"),
        library_name="transformers" if whole else _library(method),
        pipeline_tag="text-generation",
        tags=["mlx-sft", summary.config.objective, summary.config.method],
        datasets=list(datasets) or None,
    )


def _library(method: Method) -> str:
    """The Hub's name of the library that opens what was trained alone."""
    return "adapter-transformers" if method.alone == "adapters" else "peft" if method.peft else "mlx"


def _what_it_is(method: Method, objective: Objective, base: str, whole: bool) -> str:
    """One sentence: what lies beside the card, a checkpoint (`whole`) or what was trained alone."""
    if not whole:
        return f"A {method.title} adapter for {base}, trained on {objective.trained_on}."
    if not method.frozen_base:
        return f"{base}, fine-tuned on {objective.trained_on}: {method.describe()} was trained."
    return f"{base}, fine-tuned on {objective.trained_on}: a {method.title} adapter, merged into its weights."


def _marked(text: str) -> str:
    """A line in which names stand between backticks; a name that has a backtick itself does no harm."""
    pieces = " ".join(printable(text).split()).split("`")
    return "".join(_code(piece) if number % 2 else _escaped(piece) for number, piece in enumerate(pieces))


def _escaped(text: str) -> str:
    """Text in which no character is Markdown or HTML."""
    return re.sub(r"([\\<>\[\]*_!|#&~])", r"\\\1", text)


def _code(text: str) -> str:
    """A span of code, also in a cell of a table, that nothing inside of it can end."""
    shown = " ".join(printable(text).split()).replace("`", "'").replace("|", "¦")
    return f"`{shown or '?'}`"
