"""Options as a shell completes them, kept for the next time that Tab is pressed.

To make them, every method, objective and export format is imported, with MLX and transformers: seconds, in which the shell stands still.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import click

from mlx_sft.config_files import NAMES_OR_PATHS, PATHS
from mlx_sft.errors import UserError
from mlx_sft.files import cache_folder, read_json, to_json
from mlx_sft.grammar import COMPLETE, a_path
from mlx_sft.registry import CALLBACKS, METHODS, OBJECTIVES, OPTIMIZERS, TARGETS
from mlx_sft.writing import write_file

_PACKAGE = Path(__file__).parent
_KINDS = (METHODS, OBJECTIVES, OPTIMIZERS, CALLBACKS, TARGETS)


def is_completing() -> bool:
    """Whether a shell asks how a command goes on."""
    return COMPLETE in os.environ


def kept(name: str, make: Callable[[], Sequence[click.Option]]) -> Sequence[click.Option]:
    """The options that go by this name, as they were made last by this code; else made now, and kept where there is a cache."""
    cache = cache_folder()
    if cache is None:
        return make()
    file = cache / "completion" / f"{name.replace(' ', '-')}-{_code()}.json"
    with suppress(UserError, ValueError, KeyError, TypeError):  # not there, or no longer what it was
        return [_option(**told) for told in read_json(file)["options"]]
    made = make()
    with suppress(UserError, OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        for old in file.parent.glob(f"{file.name.rpartition('-')[0]}-*.json"):
            old.unlink()
        write_file(file, to_json({"options": [_told(option) for option in made]}))
    return made


def _code() -> str:
    """What of this package, and of those that add to it, the options depend on."""
    newest = max(file.stat().st_mtime_ns for file in _PACKAGE.rglob("*.py"))
    added = [(kind.room, one.name, one.value) for kind in _KINDS for one in entry_points(group=kind.room)]
    return hashlib.sha256(repr((version("mlx-sft"), newest, sorted(added))).encode()).hexdigest()[:16]


def _told(option: click.Option) -> dict[str, Any]:
    """An option as far as a shell needs it; the inverse of `_option`."""
    first, *others = option.opts
    return {
        "words": [f"{first}/{option.secondary_opts[0]}" if option.secondary_opts else first, *others, option.name],
        "choices": list(option.type.choices) if isinstance(option.type, click.Choice) else None,
        "is_flag": option.is_flag,
        "nargs": option.nargs,
        "multiple": option.multiple,
        "help": option.help,
    }


def _option(
    words: list[str], choices: list[str] | None, is_flag: bool, nargs: int, multiple: bool, help: str
) -> click.Option:
    is_path = words[-1] in (*PATHS, *NAMES_OR_PATHS, "out")
    kind = (
        {"is_flag": True}
        if is_flag
        else {"nargs": nargs, "multiple": multiple, "type": click.Choice(choices) if choices else str}
    )
    return click.Option(words, help=help, shell_complete=a_path if is_path else None, **kind)
