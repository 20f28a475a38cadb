"""What makes a run the run that it is: its settings, data and model. A continuation with others is refused by name.

Whether a setting may be given anew with `--resume` stands on its field (`OnResume`).
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_sft.common_settings import IN_MEMORY, option_name, public_name
from mlx_sft.config import TrainConfig, owners_of
from mlx_sft.data.chat_template import template_text
from mlx_sft.data.new_tokens import read_tokens
from mlx_sft.data.prepare import PreparedData
from mlx_sft.data.sources import full_path, full_place, split_weight
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import read_json, to_json, user_path
from mlx_sft.load import refuse_other_base
from mlx_sft.model.load import checkpoint_fingerprint
from mlx_sft.run_folder import RunFolder
from mlx_sft.settings import OnResume, on_resume
from mlx_sft.writing import write_file

_PACKAGES = ("mlx-sft", "mlx", "mlx-lm", "transformers", "numpy", "safetensors")
NEW_RUN = "start a new run with `mlx-sft train --config` on its config.yaml"

_SHORTER = "a run can be given more of them, not fewer, and not one instead of the other; leave it out to resume"

_MOST_SHOWN = 100
"""Characters of a setting that a message shows."""

CONFIG_HEADER = "# mlx-sft train --config config.yaml\n"


def resumed_config(given: TrainConfig, run: RunFolder) -> TrainConfig:
    """The run's own configuration; whatever else was given must agree with it."""
    saved = TrainConfig.resolve(run.config)
    full = with_full_paths(given)
    anew = _marked(given, OnResume.FREE)
    for field in sorted(given.model_fields_set - anew - _marked(given, OnResume.COMPUTED)):
        if field not in type(saved).model_fields:
            owners = " and ".join(f"{option_name(kind)} {name}" for kind, name in owners_of(field))
            what = f"{option_name(field)} is a setting of {owners}, which this run does not have"
            raise UserError(what, where=str(run.config), hint="leave it out to resume", exit_code=USAGE)
        before, now = getattr(saved, field), getattr(full, field)
        if field == "chat_template_kwargs":
            now = before | now  # the run added the day on which it began
        if now is True and isinstance(before, list | dict):
            continue  # what the run found it to mean
        if now not in ("auto", None) and not _agrees(saved, field, before, now):
            raise UserError(
                f"{option_name(field)} {_shortened(now)} differs from the run's {_shortened(before)}",
                where=str(run.config),
                hint=_SHORTER
                if field in _marked(saved, OnResume.GROWS)
                else "leave it out to resume, or start a new run",
                exit_code=USAGE,
            )
    if given.out is not None and user_path(given.out).resolve() != run.path.resolve():
        what = "--out names another folder than --resume"
        raise UserError(what, where=given.out, hint="leave it out to resume", exit_code=USAGE)
    names = {"quiet", "json_lines", "resume"} | (given.model_fields_set & anew - {"out"})
    revised = {name: getattr(full, name) for name in given.model_fields_set & _revised(given)}
    if revised.get("model", saved.model) != saved.model:
        refuse_other_base(run, full.model)
    revised = {name: value for name, value in revised.items() if value is not None}
    return saved.model_copy(update={name: getattr(given, name) for name in names} | revised | computed_anew(given))


def refuse_missing(run: RunFolder, config: TrainConfig) -> None:
    """Raise `UserError` for data or a model of the run that is no longer where it was, before anything is read."""
    data = [(spec, "--data") for spec, _ in map(split_weight, config.data)]
    for place, option in (*data, (config.valid, "--valid"), (config.model, "--model")):
        if place is not None and Path(place).is_absolute() and not user_path(place).exists():
            hint = f"where it lies elsewhere now: mlx-sft train --resume {run.path} {option} PLACE"
            raise UserError("it is no longer where this run found it", where=place, hint=hint)


def _shortened(value: Any) -> str:
    """As a message shows it: the text of a chat template by its first words."""
    text = " ".join(str(value).split())
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def continued_config(given: TrainConfig, trl: RunFolder) -> TrainConfig:
    """The configuration of a new run that goes on where a TRL export stopped; as for a resumed one, others given must agree with it."""
    asked = given.model_copy(update={"out": None, "resume_from_peft": None})
    place = {"out": given.out, "resume_from_peft": str(trl.path), "init_adapter": None}
    return resumed_config(asked, trl).model_copy(update=place)


def record_revision(run: RunFolder, config: TrainConfig, total_steps: int) -> None:
    """Have the run folder say what was given anew, and how many steps that plans, so that the next continuation need not be told.

    `config.yaml` comes first: where a crash left it alone with the news, they are as if they had been given once more.
    """
    saved = TrainConfig.resolve(run.config)
    news = {name: getattr(config, name) for name in sorted(_revised(config))}
    if any(getattr(saved, name) != value for name, value in news.items()):
        write_file(run.config, saved.model_copy(update=news).to_yaml(CONFIG_HEADER))
    began = read_json(run.environment, hint=NEW_RUN)
    now = began | {"settings": began.get("settings", {}) | news, "total_steps": total_steps}
    if now != began:
        write_file(run.environment, to_json(now))


def computed_anew(given: TrainConfig) -> dict[str, Any]:
    """How a continuation is to be computed, where that is given with it; under another limit all of that is chosen anew."""
    anew = {name: getattr(given, name) for name in _marked(given, OnResume.COMPUTED) & given.model_fields_set}
    chosen = {"micro_batch_tokens": None, "grad_checkpoint": "auto", "head_chunk": None}
    return chosen | anew if "memory_limit" in anew else anew


def with_full_paths(config: TrainConfig) -> TrainConfig:
    """What lies on disk by its full path, so that the run folder can be used from anywhere."""
    names = ("valid", "model", "init_adapter", "resume_from_peft", "general_data")
    given = {name: getattr(config, name) for name in names}
    full: dict[str, Any] = {
        name: full_path(value) for name, value in given.items() if value is not None and value != "tiny"
    }
    if config.chat_template is not None:
        full["chat_template"] = template_text(config.chat_template)
    full["add_tokens"] = read_tokens(config.add_tokens)
    full["data"] = [full_place(spec) for spec in config.data]
    return config.model_copy(update=full)


def identity_of(config: TrainConfig, data: PreparedData, path: Path) -> dict[str, str]:
    """Hashes of what decides the result."""
    lasting = {name: value for name, value in _result_settings(config).items() if name not in _revised(config)}
    settings = json.dumps(lasting, sort_keys=True)
    return {
        "config": hashlib.sha256(settings.encode()).hexdigest(),
        "data": data.report.fingerprint,
        "model": checkpoint_fingerprint(path),
    }


def refuse_changes(run: RunFolder, config: TrainConfig, data: PreparedData, identity: dict[str, str]) -> None:
    """Raise `UserError` naming what is not as it was when the run began."""
    before, known = _as_it_began(run)
    settings = _result_settings(config)
    changed = [public_name(name) for name in settings if not _agrees(config, name, before.get(name), settings[name])]
    if changed:
        hint = "put it back as it was, or start a new run with `mlx-sft train --config`"
        what = f"{', '.join(changed)} changed since the run began"
        raise UserError(what, where=str(run.config), hint=hint)
    if known.get("data") != identity["data"]:
        sources = read_json(run.data_report, hint=NEW_RUN).get("sources")
        reported = [source for source in (sources if isinstance(sources, list) else []) if isinstance(source, dict)]
        hashes = {source.get("name"): source.get("sha256") for source in reported}
        files = [s.name for s in data.report.sources if hashes.get(s.name) != s.sha256]
        what = "the data changed since the run began: " + (", ".join(files) or "it reads differently")
        raise UserError(what, where=str(run.path), hint="put it back as it was, or start a new run")
    if known.get("model") != identity["model"]:
        what = f"the model {config.model} changed since the run began"
        raise UserError(what, where=str(run.path), hint="put it back as it was, or start a new run")


def _as_it_began(run: RunFolder) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and the identity with which a run began."""
    began = read_json(run.environment, hint=NEW_RUN)
    settings, identity = began.get("settings"), began.get("identity")
    if not isinstance(settings, dict) or not isinstance(identity, dict):
        raise UserError("it does not say with what the run began", where=str(run.environment), hint=NEW_RUN)
    return settings, identity


def _marked(config: TrainConfig, *marks: OnResume) -> set[str]:
    """The settings of a configuration that a continuation may give anew in one of these ways."""
    return {name for name, info in type(config).model_fields.items() if on_resume(info) in marks}


def _revised(config: TrainConfig) -> set[str]:
    """The settings that a continuation may give anew and that hold from then on; they change nothing of what was done before."""
    return _marked(config, OnResume.GROWS, OnResume.REVISED, OnResume.MOVED)


def _agrees(config: TrainConfig, name: str, before: Any, now: Any) -> bool:
    """Whether a setting is as it was, or is one that may have been given anew."""
    mark = on_resume(type(config).model_fields[name])
    if mark is OnResume.GROWS and isinstance(before, int) and isinstance(now, int):
        return now >= before
    if mark is OnResume.MOVED and IN_MEMORY not in (now, *(now if isinstance(now, list) else ())):
        return bool(_shares(before) == _shares(now))
    return mark is OnResume.REVISED or now == before


def _shares(places: Any) -> Any:
    """What is said of places beside where they are: how many there are, and the share of each in a mixture."""
    if not isinstance(places, list):
        return places is None
    return [split_weight(place)[1] if isinstance(place, str) else place for place in places]


def differences(run: RunFolder, config: TrainConfig) -> list[str]:
    """What of this machine, and of how the run is computed, is not as it was when it began, in words; the last bits may differ."""
    began, now = read_json(run.environment, hint=NEW_RUN), _machine()
    packages = began.get("packages")
    before = packages if isinstance(packages, dict) else {}
    changed = [f"{name} {before.get(name)} → {new}" for name, new in now["packages"].items() if before.get(name) != new]
    if began.get("device") != now["device"]:
        changed.append("the device")
    saved = TrainConfig.resolve(run.config)
    for field in sorted(_marked(config, OnResume.COMPUTED)):
        if getattr(config, field) != getattr(saved, field):
            changed.append(f"{option_name(field)} {getattr(saved, field)} → {getattr(config, field)}")
    return changed


def describe_environment(config: TrainConfig, identity: dict[str, str], total_steps: int) -> dict[str, Any]:
    """`environment.json`: the machine, what the run is, and the steps that are planned."""
    return _machine() | {"identity": identity, "settings": _result_settings(config), "total_steps": total_steps}


def _machine() -> dict[str, Any]:
    return {
        "packages": {name: version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": {"default": str(mx.default_device()), **mx.device_info()},
    }


def _result_settings(config: TrainConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=_marked(config, OnResume.FREE, OnResume.COMPUTED))
