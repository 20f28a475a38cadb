"""What the files of a run folder say of it, beside its metrics: settings, machine and data.

The folder may be anyone's: whatever is not of the kind that a run writes there counts as not said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from mlx_sft.common_settings import public_name
from mlx_sft.config import COMPOSING, composed
from mlx_sft.console import size
from mlx_sft.errors import UserError
from mlx_sft.files import read_json, read_yaml
from mlx_sft.report.metrics import Metrics
from mlx_sft.run_folder import RunFolder
from mlx_sft.settings import OnResume, on_resume

T = TypeVar("T")

State = Literal["running", "finished", "stopped"]

_MOST_REPORT_BYTES = 64 * 2**20
"""A data report has a line for each row that was not simply kept; one that is larger would take too much memory beside a model."""
_LONGEST_SHOWN = 400


def found(value: Any, kind: type[T], *path: str) -> T | None:
    """What lies at a path of names in nested mappings, where it is of a kind; a truth is no number."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) else None


def integer(value: Any, *path: str) -> int:
    """As `found`, of numbers below 2⁵³; 0 where there is none."""
    number = found(value, int, *path) or 0
    return number if 0 <= number < 2**53 else 0


def texts(value: Any, *path: str) -> list[str]:
    """As `found`, of a list of texts."""
    return [text for text in found(value, list, *path) or [] if isinstance(text, str)]


@dataclass(frozen=True)
class Setting:
    """A setting as a run has it.

    Attributes:
        name: As it is written.
        value, default: As a person reads them.
        differs: Whether it is not as it is by itself.
        chosen: Whether the program may have chosen it for the machine.
        recommended: For what the value is recommended, such as `for this model`; empty where it is not.
    """

    name: str
    value: str
    default: str
    differs: bool
    chosen: bool
    recommended: str = ""


@dataclass
class RunFiles:
    """A run folder, read.

    Attributes:
        settings: `config.yaml`, by the written names.
        environment: The content of the file; empty where it is not there.
        data: What is shown of `data_report.json`.
        metrics: Of `metrics.jsonl`, as far as it was read.
    """

    run: RunFolder
    settings: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    metrics: Metrics

    @classmethod
    def of(cls, run: RunFolder) -> RunFiles:
        """Read all of it but the metrics; raises `UserError` naming the file that cannot be read."""
        environment = read_json(run.environment) if run.environment.is_file() else {}
        metrics = Metrics(run, integer(environment, "total_steps"))
        return cls(run, read_yaml(run.config), environment, _read_data(run), metrics)

    def follow(self) -> None:
        """Read what is new in the metrics; from their start where the run went back, which cuts them."""
        if self.metrics.is_cut:
            self.metrics = Metrics(self.run, self.metrics.planned)
        self.metrics.follow()

    @property
    def state(self) -> State:
        if self.run.is_training:
            return "running"
        return "finished" if self.run.is_finished else "stopped"

    @property
    def planned(self) -> int:
        return self.metrics.planned

    @property
    def model(self) -> str:
        """Its name without the folder that it lies in."""
        return short_name(self.settings.get("model"))

    @property
    def method(self) -> str:
        return shown(self.settings.get("method") or "")

    @property
    def rows(self) -> int:
        """Rows, or pieces of them, that are trained on."""
        return integer(self.data, "train", "rows")

    @property
    def data_names(self) -> list[str]:
        given = self.settings.get("data")
        return [short_name(name) for name in (given if isinstance(given, list) else [given]) if name]

    def all_settings(self) -> list[Setting]:
        """Those of `config.yaml`, in its order."""
        names = {name: self.settings.get(name) for name in COMPOSING}
        try:
            kind = composed(names)
        except UserError:  # the model's recommendations cannot be read any more
            kind = composed(names | {"model": None})
        fields = {public_name(name): info for name, info in kind.model_fields.items()}
        reasons = {public_name(one.name): one.reason for one in kind.recommendations}
        listed = []
        for name, value in self.settings.items():
            info = fields.get(name)
            if info is None:
                listed.append(Setting(name, shown(value), "", differs=True, chosen=False))
                continue
            default = _as_written(info.get_default(call_default_factory=True))
            by_machine = on_resume(info) is OnResume.COMPUTED or name in _SETTLED
            reason = reasons.get(name, "")
            if reason and value == default:
                listed.append(Setting(name, shown(value), "", differs=True, chosen=False, recommended=reason))
                continue
            by_itself = by_machine and default in (None, "auto")
            listed.append(Setting(name, shown(value), shown(default), value != default, by_itself))
        return listed


def _read_data(run: RunFolder) -> dict[str, Any]:
    """The report without what it tells of single rows."""
    if not run.data_report.is_file():
        return {}
    if (taken := run.data_report.stat().st_size) > _MOST_REPORT_BYTES:
        return {"warnings": [f"data_report.json has {size(taken)}, too much to be read for this page"]}
    report = read_json(run.data_report)
    sources = [
        {"name": found(source, str, "name"), "rows": integer(source, "rows")}
        for source in found(report, list, "sources") or []
    ]
    return {name: report[name] for name in _OF_REPORT if name in report} | {"sources": sources}


_OF_REPORT = ("totals", "train", "valid", "warnings")
_SETTLED = ("dtype",)
"""What `auto` becomes, by the model."""


def short_name(name: Any) -> str:
    """The last part of a path; of what is on the Hub all of it."""
    text = shown(name)
    return Path(text).name or text if Path(text).is_absolute() else text


def shown(value: Any) -> str:
    """A value of a setting, for a person; not more than a line of it."""
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        value = ", ".join(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def _as_written(value: Any) -> Any:
    """As YAML gives it back."""
    return json.loads(json.dumps(value, default=str))


def differing(runs: Mapping[str, RunFiles]) -> dict[str, list[str]]:
    """The settings that several runs do not have alike, with the value of each in their order."""
    names = dict.fromkeys(name for run in runs.values() for name in run.settings)
    values = {
        name: [shown(run.settings[name]) if name in run.settings else "" for run in runs.values()] for name in names
    }
    return {name: of_runs for name, of_runs in values.items() if len(set(of_runs)) > 1}
