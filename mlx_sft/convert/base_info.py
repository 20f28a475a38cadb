"""The base model of a run as others may know it: its name and commit on the Hub, its architecture, its licence.

Everything is read from this disk; no network is asked, and no path of this machine is given away.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_sft.config import TrainConfig
from mlx_sft.convert.hub import is_hub_id
from mlx_sft.errors import UserError
from mlx_sft.files import read_front_matter
from mlx_sft.model.load import CARD, checkpoint_fingerprint, extended_tokenizer, local_checkpoint
from mlx_sft.model.names import CAUSAL_LM, opening
from mlx_sft.model.translate import read_config
from mlx_sft.model.vocabulary import rows_needed
from mlx_sft.run_folder import RunFolder

_SNAPSHOT = re.compile(r"/models--([^/]+)/snapshots/([0-9a-f]{40})$")
"""The end of a snapshot's path in the Hub's cache."""
_LICENCE = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)
_LINK = re.compile(r"https://[\w.~:/?#@!$&*+,;=%-]{1,300}", re.ASCII)
_FILE_LINK = re.compile(r"[\w.-]{1,100}", re.ASCII)


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """The model that a run began with.

    Attributes:
        name: A Hub id, else the name of its folder without the path.
        on_hub: Whether the name is a Hub id.
        revision: The commit on the Hub; None where the checkpoint on this disk may differ from the one that was trained on.
        family: The `model_type` of its config.json; None where it is no longer on this disk.
        licence: What the Hub's metadata call `license`, `license_name` and `license_link`; empty where it is not known.
        auto_class: The class of transformers that opens it.
        rows: How many its embeddings need for the run's new tokens; None where they have them.
    """

    name: str
    on_hub: bool
    revision: str | None = None
    family: str | None = None
    licence: Mapping[str, str] = field(default_factory=dict)
    auto_class: str = CAUSAL_LM
    rows: int | None = None


def base_info(run: RunFolder, config: TrainConfig) -> BaseInfo:
    """What this disk tells of the base of a run."""
    folder = local_checkpoint(config.model)
    if folder is None:
        on_hub = is_hub_id(config.model)
        return BaseInfo(config.model if on_hub else Path(config.model).name, on_hub)
    snapshot = _SNAPSHOT.search(folder.as_posix())
    hub_id = snapshot[1].replace("--", "/", 1) if snapshot else ""
    on_hub = is_hub_id(hub_id)
    unchanged = on_hub and checkpoint_fingerprint(folder) == run.trained_on()
    settings = read_config(folder)
    opened = opening(settings)
    return BaseInfo(
        name=hub_id if on_hub else Path(config.model).name,
        on_hub=on_hub,
        revision=snapshot[2] if snapshot and unchanged else None,
        family=settings["model_type"],
        licence=_licence(folder, settings, hub_id if on_hub else None),
        auto_class=opened.auto_class if opened else CAUSAL_LM,
        rows=_rows(folder, config) if config.add_tokens else None,
    )


def _rows(folder: Path, config: TrainConfig) -> int | None:
    with suppress(UserError):  # its weights are not there
        return rows_needed(folder, extended_tokenizer(folder, None, config.add_tokens)[1])
    return None


def _licence(folder: Path, config: Mapping[str, Any], hub_id: str | None) -> dict[str, str]:
    """The licence that the base's model card names, or else its config.json."""
    card: dict[str, Any] = {}
    with suppress(UserError):  # there is none, or its metadata cannot be read
        card = read_front_matter(folder / CARD)
    identifier = card.get("license") or config.get("license")
    if not _matches(_LICENCE, identifier):
        return {}
    licence = {"license": str(identifier)}
    if _matches(_LICENCE, name := card.get("license_name")):
        licence["license_name"] = str(name)
    link = card.get("license_link")
    if hub_id is not None and _matches(_FILE_LINK, link):  # a file beside the card
        link = f"https://huggingface.co/{hub_id}/blob/main/{link}"
    if _matches(_LINK, link):
        licence["license_link"] = str(link)
    return licence


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None
