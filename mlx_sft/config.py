"""Configuration: what every run has, joined with the settings of the method, objective and optimizer that it chooses.

    TrainConfig(method="lora", rank=8) ─► a configuration that is a `TrainConfig` and a `LoraSettings` at once

A setting is declared once, as a field of its owner, and is flat everywhere: `rank: 8` in YAML, `--rank 8`, `config.rank`. What can be
checked without a model or data is checked when a configuration is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import ValidationError, create_model
from pydantic.fields import FieldInfo

from mlx_sft.common_settings import (
    CHOOSING,
    CommonSettings,
    common_sections,
    option_name,
    public_name,
)
from mlx_sft.config_files import read_settings
from mlx_sft.errors import USAGE, UserError, did_you_mean
from mlx_sft.files import read_yaml
from mlx_sft.other_names import suggestion
from mlx_sft.recommended import Recommendation, recommendations
from mlx_sft.registry import CALLBACKS
from mlx_sft.settings import Settings

S = TypeVar("S", bound=Settings)


class TrainConfig(CommonSettings):
    """Everything that `mlx-sft train` can be told. Raises `UserError` that names every problem at once.

    An instance also has the settings of the method, objective and optimizer that it names, and those of the callbacks.

    Attributes:
        recommendations: The defaults that are not the settings' own, because they suit the model, the method or the objective.
    """

    recommendations: ClassVar[tuple[Recommendation, ...]] = ()

    def __new__(cls, /, **settings: Any) -> TrainConfig:
        """An instance of the class that has the settings of the chosen entries too."""
        chosen = {name: settings.get(name) for name in COMPOSING}
        return super().__new__(composed(chosen) if cls is TrainConfig else cls)

    def __init__(self, /, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise _as_user_error(error, settings) from error

    def __reduce__(self) -> Any:
        """Pickled by its settings, because the joined class has no name of its own."""
        return _rebuilt, ({name: getattr(self, name) for name in type(self).model_fields}, self.model_fields_set)

    @classmethod
    def resolve(cls, file: str | Path | None = None, **options: Any) -> TrainConfig:
        """The configuration from a YAML file, or one that ships, overlaid with options; raises `UserError` for what cannot be."""
        settings = (read_settings(file) if file else {}) | options
        settings = _choices_of(settings.get("resume")) | settings
        try:
            config = cls(**settings)
            config.require_data()
        except UserError as error:
            error.where = str(file) if file else ""
            raise UserError(error.what, where=error.where, hint=error.hint, exit_code=error.exit_code) from error
        return config

    def require_data(self) -> None:
        """Raise `UserError` where neither data nor a run that goes on is named."""
        if not self.data and self.resume is None and self.resume_from_peft is None:
            hint = "give rows, as DATA or --data FILE; to go on with a run, train --resume RUN; from Python, train(config, data=rows)"
            raise UserError("data: nothing to train on", hint=hint, exit_code=USAGE)

    def recommended(self) -> list[Recommendation]:
        """The recommendations that the configuration follows, whether by itself or because it was told to."""
        return [one for one in self.recommendations if getattr(self, one.name) == one.value]

    def settings(self, owner: type[S]) -> S:
        """The settings of one owner, which the configuration has because the owner was chosen."""
        return owner.model_construct(**{name: getattr(self, name) for name in owner.model_fields})

    def to_yaml(self, header: str = "") -> str:
        """The resolved configuration, in the order of the sections; behind what is recommended, for what."""
        settings = self.model_dump(mode="json", by_alias=True, exclude={"resume"})
        order = [public_name(name) for names in sections(self).values() for name in names]
        remarks = {public_name(one.name): f"  # recommended {one.reason}" for one in self.recommended()}
        lines = [
            yaml.safe_dump({name: settings[name]}, allow_unicode=True).rstrip("\n") + remarks.get(name, "")
            for name in order
            if name in settings
        ]
        return header + "".join(f"{line}\n" for line in lines)


COMPOSING = (*CHOOSING, "callbacks", "model")
"""The settings that decide which others a configuration has, and their defaults."""


def composed(chosen: dict[str, Any]) -> type[TrainConfig]:
    """`TrainConfig` joined with the settings of the chosen entries, with the defaults that suit these and the model.

    For the name of an entry that there is not, the default entry stands.
    """
    names = {
        kind: name if isinstance(name, str) and name in registry else str(TrainConfig.model_fields[kind].default)
        for kind, registry in CHOOSING.items()
        for name in [chosen.get(kind)]
    }
    given = chosen.get("callbacks") or []
    listed = given.split(",") if isinstance(given, str) else given if isinstance(given, list | tuple) else []
    further = [name.strip() for name in listed if isinstance(name, str) and name.strip() in CALLBACKS]
    entries = [registry[names[kind]] for kind, registry in CHOOSING.items()]
    entries += [CALLBACKS[name] for name in dict.fromkeys((*CALLBACKS.built_in(), *further))]
    owners = dict.fromkeys(entry.Settings for entry in entries if entry.Settings.model_fields)
    return _joined(*owners, recommended=recommendations(names, chosen.get("model")))


@cache
def _joined(*owners: type[Settings], recommended: tuple[Recommendation, ...] = ()) -> type[TrainConfig]:
    """`TrainConfig` with the settings of these owners, and with what is recommended in place of its own defaults."""
    taken: dict[str, type[Settings]] = dict.fromkeys(TrainConfig.model_fields, TrainConfig)
    validators = _validators(TrainConfig)
    for owner in owners:
        if clash := next((name for name in owner.model_fields if name in taken), None):
            what = f"{clash}: both {_place(owner)} and {_place(taken[clash])} have a setting of this name"
            raise UserError(what, hint="choose one of them only; who wrote them can rename it", exit_code=USAGE)
        if lost := _validators(owner) & validators:
            what = f"{lost.pop()}: a check of {_place(owner)} has the name of another's"
            raise UserError(what, hint="who wrote it can rename it", exit_code=USAGE)
        taken |= dict.fromkeys(owner.model_fields, owner)
        validators |= _validators(owner)
    bases: Any = (TrainConfig, *owners)
    others: Any = {}
    for one in recommended:
        info = copy(TrainConfig.model_fields[one.name])
        info.default = one.value
        others[one.name] = (info.annotation, info)
    joined: type[TrainConfig] = create_model("TrainConfig", __base__=bases, __module__=__name__, **others)
    joined.recommendations = recommended
    return joined


def _place(owner: type[Settings]) -> str:
    return f"{owner.__module__}.{owner.__qualname__}"


def _validators(owner: type[Settings]) -> set[str]:
    """The names of the validators that a class defines itself."""
    found = owner.__pydantic_decorators__
    return {*found.field_validators, *found.model_validators} & vars(owner).keys()


def _choices_of(run: Any) -> dict[str, Any]:
    """The entries that a resumed run has chosen, so that their settings can be given with it; empty for a folder that is no run."""
    if not isinstance(run, str):
        return {}
    file = Path(run) / "config.yaml"
    try:
        if not file.is_file():
            return {}
    except (OSError, ValueError):  # no name that a file can have; who opens the run says so
        return {}
    saved = read_yaml(file)
    return {name: saved[name] for name in (*CHOOSING, "callbacks") if name in saved}


def _rebuilt(settings: dict[str, Any], given: set[str]) -> TrainConfig:
    return composed(settings).model_construct(given, **settings)


def entry_settings() -> Iterator[tuple[str, str, type[Settings]]]:
    """The setting that chooses, the entry's name and its settings, for every entry that has some; callbacks come last."""
    for kind, registry in (*CHOOSING.items(), ("callbacks", CALLBACKS)):
        for name, entry in registry.items():
            if entry.Settings.model_fields:
                yield kind, name, entry.Settings


def all_fields() -> dict[str, FieldInfo]:
    """Every setting of a run by its name: the common ones, and those of every entry."""
    fields = dict(TrainConfig.model_fields)
    for _, _, owner in entry_settings():
        fields = dict(owner.model_fields) | fields
    return fields


def owners_of(field: str) -> list[tuple[str, str]]:
    """Whose a setting is: the choosing setting and the entry's name of each; empty for a common one."""
    return [(kind, name) for kind, name, owner in entry_settings() if field in owner.model_fields]


def sections(config: TrainConfig | None = None) -> dict[str, list[str]]:
    """The settings of each section, in order: those of a configuration, or all that there are.

    The settings of an entry follow the section of the setting that chooses it, under a title that names it (`--method lora`); those of
    callbacks are in the section of `callbacks`.
    """
    found: dict[str, list[str]] = {}
    listed: set[str] = set()
    owned = list(entry_settings())
    for title, fields in common_sections().items():
        found[title] = fields
        for kind, _, owner in owned:
            for own in owner.model_fields if kind in fields else ():
                if own in listed or (config is not None and own not in type(config).model_fields):
                    continue
                names = ", ".join(name for _, name, other in owned if own in other.model_fields)
                found.setdefault(title if kind == "callbacks" else f"{title}: {names}", []).append(own)
                listed.add(own)
    return found


def _as_user_error(error: ValidationError, settings: dict[str, Any]) -> UserError:
    hints: dict[str, str] = {}
    lines: list[str] = []
    wrong: dict[str, list[str]] = {}
    for problem in error.errors():
        key = str(problem["loc"][0]) if problem["loc"] else ""
        if problem["type"] == "extra_forbidden":
            what, hint = _stray(key, settings)
            lines.append(what)
            if hint:
                hints[key] = hint
        else:
            message = problem["msg"].removeprefix("Value error, ")
            wrong.setdefault(key, []).append(message[0].lower() + message[1:])
    for key, messages in wrong.items():
        told = any("not " in message or message.endswith("?") for message in messages)
        value = f", not {_shortened(settings[key])}" if key in settings and not told else ""
        place = f"{key}: " if key else ""
        lines.append(f"{place}{' or '.join(dict.fromkeys(messages))}{value}")
    hint = "; ".join(h if len(hints) == 1 else f"{key}: {h}" for key, h in hints.items())
    hint = hint or "`mlx-sft train --help` names every setting and its values"
    return UserError("; ".join(lines), hint=hint, exit_code=USAGE)


def _stray(key: str, settings: dict[str, Any]) -> tuple[str, str]:
    """What is wrong with a key that the configuration has no setting for, and the way out."""
    owners = owners_of(key)
    if not owners:
        fields = all_fields()
        elsewhere = suggestion(key, lambda field: public_name(field) if field in fields else None)
        return f"{key}: no such setting", elsewhere or did_you_mean(key, [public_name(name) for name in fields])
    kind = owners[0][0]
    *others, last = (name for _, name in owners)
    names, one = (f" {word} ".join(filter(None, (", ".join(others), last))) for word in ("and", "or"))
    chosen = settings.get(kind, TrainConfig.model_fields[kind].get_default(call_default_factory=True))
    has = f"this run has {option_name(kind)} {chosen}" if chosen else f"this run has no {option_name(kind)}"
    return f"{key}: a setting of {option_name(kind)} {names}, and {has}", f"leave {key} out, or choose {one}"


def _shortened(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."


_MOST_SHOWN = 200
"""Characters of a value that a message shows."""
