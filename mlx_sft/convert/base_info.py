"""What a run's folder says that others may know: its base, its settings, its data in numbers, how it did.

No row of the data is among it, and no path of this machine: of a file there is the name, of a folder nothing. The folder may be anyone's,
so that whatever is read of it has its kind checked. Knows nothing of Markdown, and asks no network.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlx_sft.config import TrainConfig
from mlx_sft.convert.hub import is_hub_id
from mlx_sft.data.files import HUB_PREFIX
from mlx_sft.errors import UserError
from mlx_sft.files import read_front_matter, read_json
from mlx_sft.model.load import CARD, checkpoint_fingerprint, local_checkpoint
from mlx_sft.model.translate import read_config
from mlx_sft.run_folder import RunFolder

_MOST_REPORT_BYTES = 256 * 2**20
"""A report has a line for each row that was not simply kept: room for a million of them."""
_LONGEST_LINE = 2**20
"""Bytes of a line of metrics, which names the rows of a step that was skipped."""

_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")
"""The end of a folder in the Hub's cache."""
_LICENCE = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)
_LINK = re.compile(r"https://[\w.~:/?#@!$&*+,;=%-]{1,300}", re.ASCII)
_FILE_LINK = re.compile(r"[\w.-]{1,100}", re.ASCII)

Count = Annotated[int, Field(ge=0, le=10**15)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Read(BaseModel):
    """Part of a file: what it must have; the rest of it is passed over."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class Totals(_Read):
    """Rows of all sources together; a truncated row is kept."""

    rows: Count
    kept: Count
    truncated: Count
    dropped: Count
    bad: Count


class Part(_Read):
    """The examples that are learnt from, or those that are held out."""

    rows: Count
    tokens: Count
    supervised_tokens: Count


class Source(_Read):
    """A file or a dataset, by the name that the run knows it by."""

    name: str
    rows: Count

    @property
    def public_name(self) -> str:
        """That of a file without its folder."""
        return self.name if self.name.startswith(HUB_PREFIX) else Path(self.name).name

    @property
    def dataset(self) -> str | None:
        """The Hub id of a dataset, where it is one."""
        parts = self.name.removeprefix(HUB_PREFIX).partition(":")[0].split("/")
        identifier = "/".join(parts[:2])
        return identifier if self.name.startswith(HUB_PREFIX) and is_hub_id(identifier) else None


class Data(_Read):
    """Of `data_report.json`, the numbers."""

    totals: Totals
    train: Part
    valid: Part
    sources: list[Source]


class Record(_Read):
    """Of a line of `metrics.jsonl`, what a card tells."""

    kind: str
    step: Count = 0
    epoch: Finite = 0.0
    loss: Finite | None = None
    perplexity: Finite | None = None
    token_accuracy: Finite | None = None
    best: bool = False


@dataclass(frozen=True, slots=True)
class Base:
    """The model that a run began with.

    Attributes:
        name: As others may know it: a Hub id, else the name of its folder.
        on_hub: Whether it is a Hub id.
        revision: The commit on the Hub, where the one that is on this disk is certainly the one that was trained on.
        family: The `model_type` of its config.json, where it is still on this disk.
        licence: The Hub's metadata of it (`license`, `license_name`, `license_link`); empty where it is not known.
    """

    name: str
    on_hub: bool
    revision: str | None
    family: str | None
    licence: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Outcome:
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
    evaluation: Record | None


@dataclass(frozen=True, slots=True)
class Facts:
    """All of it. `versions` are those of the packages with which the run began, by name."""

    config: TrainConfig
    base: Base
    data: Data
    outcome: Outcome
    versions: Mapping[str, str]


def read_facts(run: RunFolder) -> Facts:
    """The facts of a finished run; raises `UserError` naming the file that cannot be read."""
    return run_facts(run, TrainConfig.resolve(run.config), read_json(run.data_report, most=_MOST_REPORT_BYTES))


def run_facts(run: RunFolder, config: TrainConfig, report: Mapping[str, Any]) -> Facts:
    """As `read_facts`, where the configuration and the content of `data_report.json` are at hand."""
    environment = read_json(run.environment)
    return Facts(
        config=config,
        base=_base(config.model, _words(environment, "identity").get("model")),
        data=_data(report, run.data_report),
        outcome=_outcome(run.metrics),
        versions=_words(environment, "packages"),
    )


def base_revision(run: RunFolder, config: TrainConfig) -> str | None:
    """The commit of the base on the Hub, where the one that is on this disk is certainly the one that was trained on."""
    if not run.environment.is_file():
        return None
    return _base(config.model, _words(read_json(run.environment), "identity").get("model")).revision


def _words(content: Mapping[str, Any], key: str) -> dict[str, str]:
    """Of a mapping in a file, what is text."""
    found = content.get(key)
    return {name: value for name, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def _data(report: Mapping[str, Any], where: Path) -> Data:
    try:
        return Data.model_validate(report)
    except ValidationError as error:
        problem = error.errors()[0]
        what = f"{'.'.join(map(str, problem['loc']))} is not what a run writes there: {problem['msg']}"
        raise UserError(what, where=str(where), hint="put the file back as it was") from error


def _outcome(metrics: Path) -> Outcome:
    last = Record(kind="train")
    loss: float | None = None
    best: Record | None = None
    loss_at_best: float | None = None
    for line in _lines(metrics):
        if line.kind == "train":
            last, loss = line, loss if line.loss is None else line.loss
        elif line.kind == "evaluation" and line.best:
            best, loss_at_best = line, loss
    if best is None:
        return Outcome(last.step, last.epoch, last.step, loss, None)
    return Outcome(last.step, last.epoch, best.step, loss_at_best, best)


def _lines(metrics: Path) -> Iterator[Record]:
    try:
        with metrics.open("rb") as file:
            while content := file.readline(_LONGEST_LINE):
                with suppress(ValidationError):  # a damaged line is no reason to have no card
                    yield Record.model_validate_json(content)
    except OSError as error:
        what = f"cannot be read: {error.strerror or error}"
        raise UserError(what, where=str(metrics), hint="check the path") from error


def _base(name: str, fingerprint: str | None) -> Base:
    """The base by the name that the configuration has for it; `fingerprint` is that of the one that was trained on."""
    folder = local_checkpoint(name)
    if folder is None:
        on_hub = is_hub_id(name)
        return Base(name if on_hub else Path(name).name, on_hub, None, None, {})
    snapshot = _SNAPSHOT.search(folder.as_posix())
    hub_id = snapshot[1].replace("--", "/", 1) if snapshot else ""
    on_hub = is_hub_id(hub_id)
    unchanged = on_hub and checkpoint_fingerprint(folder) == fingerprint
    config = read_config(folder)
    return Base(
        name=hub_id if on_hub else Path(name).name,
        on_hub=on_hub,
        revision=snapshot[2] if snapshot and unchanged else None,
        family=config["model_type"],
        licence=_licence(folder, config, hub_id if on_hub else None),
    )


def _licence(folder: Path, config: Mapping[str, Any], hub_id: str | None) -> dict[str, str]:
    """What the base says of its licence, in its model card or else in its config.json."""
    said: dict[str, Any] = {}
    with suppress(UserError):  # there is none, or it is not written as one
        said = read_front_matter(folder / CARD)
    identifier = said.get("license") or config.get("license")
    if not _matches(_LICENCE, identifier):
        return {}
    licence = {"license": str(identifier)}
    if _matches(_LICENCE, name := said.get("license_name")):
        licence["license_name"] = str(name)
    link = said.get("license_link")
    if hub_id is not None and _matches(_FILE_LINK, link):  # a file beside the card
        link = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    if _matches(_LINK, link):
        licence["license_link"] = str(link)
    return licence


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
