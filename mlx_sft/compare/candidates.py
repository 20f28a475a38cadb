"""What is compared: `lora:r=8,dora,full` → candidates, each a method with settings of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from mlx_sft.common_settings import CommonSettings
from mlx_sft.config import TrainConfig, owners_of
from mlx_sft.errors import USAGE, UserError, did_you_mean
from mlx_sft.methods import Method
from mlx_sft.registry import METHODS

_SETTING = re.compile(r":(?=[A-Za-z_-]+=)")
_HINT = "write METHOD or METHOD:setting=value:setting=value, such as lora:rank=8"


@dataclass(frozen=True)
class Candidate:
    """One of what is compared.

    Attributes:
        label: As it was written.
        method: Its class.
        settings: What its configuration has beside what all have.
        rates: The learning rates that are tried, rising.
    """

    label: str
    method: type[Method]
    settings: Mapping[str, Any]
    rates: tuple[float, ...]

    @property
    def folder(self) -> str:
        """A name for a folder, which no other label has."""
        return re.sub(r"[^\w.=+-]", lambda other: f"%{ord(other[0]):x}" if other[0] != ":" else "-", self.label)

    def config(self, common: Mapping[str, Any], **further: Any) -> TrainConfig:
        """The configuration of a run; of the settings of methods in `common`, those of its own method count.

        Raises:
            UserError: For settings that cannot be, with the candidate as the place.
        """
        stated = common.get("method", CommonSettings.model_fields["method"].default)
        own = {name: value for name, value in common.items() if stated == self.method.name or not _of_method(name)}
        try:
            return TrainConfig.resolve(**own | {"method": self.method.name, **self.settings} | further)
        except UserError as error:
            raise UserError(error.what, where=self.label, hint=error.hint, exit_code=USAGE) from error


def candidates_of(written: Sequence[str], rates: Sequence[float] = ()) -> list[Candidate]:
    """Candidates as they are written, several in one text separated by commas.

    Args:
        rates: The learning rates that each tries; those of its method where there are none.

    Raises:
        UserError: For a method or a setting that there is not, and for a candidate that is there twice.
    """
    variants = {name: (kind, dict(preset)) for _, kind in METHODS.items() for name, preset in kind.variants.items()}
    known = {name: (kind, {}) for name, kind in METHODS.items()} | variants
    labels: list[str] = []
    for part in (part.strip() for text in written for part in text.split(",")):
        if labels and "=" in labels[-1] and part.partition(":")[0] not in known:
            labels[-1] += f",{part}"  # of a value that is a list
        else:
            labels.append(part)
    found = []
    for label in labels:
        name, *settings = _SETTING.split(label)
        if name not in known:
            hint = did_you_mean(name, list(known)) or f"there is {', '.join(known)}; {_HINT}"
            raise UserError(f"--methods: no method is named {name or '(nothing)'}", hint=hint, exit_code=USAGE)
        kind, own = known[name]
        own = own | dict(_setting(text, kind, label) for text in settings)
        own_rates = [own.pop("lr")] if "lr" in own else rates or kind.learning_rates
        found.append(Candidate(label, kind, own, tuple(sorted({float(rate) for rate in own_rates}))))
    if twice := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"--methods: {twice} is there twice", hint="leave one out", exit_code=USAGE)
    return found


def _of_method(name: str) -> bool:
    return any(kind == "method" for kind, _ in owners_of(name))


def _setting(text: str, method: type[Method], label: str) -> tuple[str, Any]:
    """`r=8` → `("rank", 8)`: one of the method's settings, or of those that every run has."""
    written, _, value = text.partition("=")
    name = method.short_names.get(written, written.replace("-", "_"))
    own = list(method.Settings.model_fields)
    if name not in own and name not in CommonSettings.model_fields:
        hint = did_you_mean(name, own) or f"there is {', '.join(own)}"
        raise UserError(f"{written}: no such setting", where=label, hint=hint, exit_code=USAGE)
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"{written}: {value} cannot be read", where=label, hint=_HINT, exit_code=USAGE) from error
