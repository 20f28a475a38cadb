"""Values of single modules in PEFT's config, `rank_pattern` and `alpha_pattern`: by the ends of names, or by regular expressions."""

from __future__ import annotations

import re
from typing import TypeVar

from mlx_sft.errors import UserError
from mlx_sft.methods.lora_settings import is_named
from mlx_sft.model.names import split_expert

LONGEST_NAME, MOST_FEATURES = 300, 2**31
"""Of a module: more has none, and no adapter may make it look so."""

_MOST_REPETITIONS = 3
"""In a pattern of names that is a regular expression: more of them, or one of a group, could take longer than a life."""

T = TypeVar("T")


def of_modules(values: dict[str, T], name: str, modules: dict[str, str], where: str) -> dict[str, T]:
    """Values of single modules by the ends of their names; where PEFT has regular expressions, by the names that these fit.

    Args:
        values: As the config has them.
        name: The setting, for a message.
        modules: The modules, each expert's apart, and their names in the file.
        where: The file, for a message.
    """
    patterns = {compiled(key, name, where): value for key, value in values.items()}
    if all(re.fullmatch(r"[\w.-]+", key) for key in values):
        fitting = {key: [ours for ours, theirs in modules.items() if is_named(theirs, key)] for key in values}
        if all(is_named(together(module), key) for key, fit in fitting.items() for module in fit):
            return {key: value for key, value in values.items() if fitting[key]}
    found = (
        (ours, next((v for p, v in patterns.items() if p.fullmatch(theirs)), None)) for ours, theirs in modules.items()
    )
    return {together(module): value for module, value in found if value is not None}


def compiled(key: str, name: str, where: str, *, ends: bool = True) -> re.Pattern[str]:
    """As PEFT matches it: a regular expression for the end of a module's name, or for all of it; raises `UserError` for one that is not
    to be tried."""
    repetitions = len(re.findall(r"[*+?{]", key))
    if len(key) > LONGEST_NAME or repetitions > _MOST_REPETITIONS or re.search(r"\)[*+?{]", key):
        raise UserError(f"{name} has {key[:LONGEST_NAME]!r}, which may take too long to match", where=where)
    try:
        return re.compile(rf"(.*\.)?({key})" if ends else key)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"{name} has {key!r}, which is no regular expression ({error})", where=where) from error


def together(module: str) -> str:
    """The name of an expert's module without its number; any other as it is."""
    found = split_expert(module)
    return found[0] if found else module
