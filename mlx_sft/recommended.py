"""Settings that suit a model, a method and an objective, in place of the settings' own defaults.

    what was typed > the file of --config > what the model recommends > what suits the method and the objective > the setting's default

A model recommends with a file beside its config.json, `recommended.yaml`. Of its entries, those count that are for the chosen method,
objective and optimizer; where two give the same setting, the later one.

    recommended:
      - {method: lora, objective: sft, lr: 3.0e-3}

The learning rate of an objective, or else the setting's default, is one for LoRA; that of another method stands to it in a proportion.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mlx_sft.common_settings import CHOOSING, DEFAULT_MODEL, CommonSettings
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import read_yaml, user_path
from mlx_sft.registry import METHODS, OBJECTIVES
from mlx_sft.settings import first_problem

FILE = "recommended.yaml"
TINY = Path(__file__).parent / "model" / "tiny"
"""The model that comes with the package, and is called `tiny`."""

SETTINGS = ("valid_fraction", "epochs", "batch_size", "lr", "scheduler", "warmup", "max_grad_norm")
"""What a model may recommend: nothing that names files, runs code or changes what is trained."""


@dataclass(frozen=True)
class Recommendation:
    """A setting, its recommended value, and for what that is: `for this model`."""

    name: str
    value: Any
    reason: str


def recommendations(chosen: Mapping[str, str], model: Any = None) -> tuple[Recommendation, ...]:
    """What is recommended for the chosen method, objective and optimizer, and by the model.

    Args:
        model: As a run names it; what is no folder on the disk recommends nothing.

    Raises:
        UserError: If the model's file is not as it should be.
    """
    objective, factor = OBJECTIVES[chosen["objective"]], METHODS[chosen["method"]].usual_rate_factor
    found = {
        name: Recommendation(name, value, f"for --objective {chosen['objective']}")
        for name, value in objective.defaults.items()
    }
    if factor != 1:
        default = CommonSettings.model_fields["lr"].default
        rate = float(f"{factor * (found['lr'].value if 'lr' in found else default):.3g}")
        also = f" and --objective {chosen['objective']}" if "lr" in found else ""
        found["lr"] = Recommendation("lr", rate, f"for --method {chosen['method']}{also}")
    for name, value in _of_model(DEFAULT_MODEL if model is None else model, chosen).items():
        found[name] = Recommendation(name, value, "for this model")
    return tuple(found.values())


def in_words(recommended: Iterable[Recommendation]) -> str:
    """`lr 0.003, batch_size 4 (recommended for this model)`; empty where nothing is."""
    by_reason: dict[str, list[str]] = {}
    for one in recommended:
        value = f"{one.value:g}" if isinstance(one.value, float) else one.value
        by_reason.setdefault(one.reason, []).append(f"{one.name} {value}")
    return "; ".join(f"{', '.join(settings)} (recommended {reason})" for reason, settings in by_reason.items())


def _of_model(model: Any, chosen: Mapping[str, str]) -> dict[str, Any]:
    """What the file of a model says for what is chosen."""
    if not isinstance(model, str):
        return {}
    try:
        file = (TINY if model == "tiny" else user_path(model)) / FILE
        if not file.is_file():
            return {}
    except (OSError, ValueError):  # no name that a folder can have; who opens the model says so
        return {}
    entries = read_yaml(file).get("recommended")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise _wrong("it has no list `recommended` of entries", file)
    settings: dict[str, Any] = {}
    for entry in entries:
        given = {name: value for name, value in entry.items() if name not in CHOOSING}
        if unknown := next((name for name in given if name not in SETTINGS), None):
            raise _wrong(f"{unknown}: a model recommends {', '.join(SETTINGS)}, and nothing else", file)
        try:
            checked = CommonSettings(**given)
        except ValidationError as error:
            raise _wrong(first_problem(error), file) from error
        if all(chosen[kind] in _several(entry[kind]) for kind in CHOOSING if kind in entry):
            settings |= {name: getattr(checked, name) for name in given}
    return settings


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _wrong(what: str, file: Path) -> UserError:
    return UserError(what, where=str(file), hint="put it right, or remove the file", exit_code=USAGE)
