"""The YAML file that `--config` names: where it is, and what the paths in it mean.

What a setting in it reads is looked for beside the file, wherever the command is run; what is written goes where it goes without a file.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_sft.common_settings import IN_MEMORY, option_name
from mlx_sft.errors import USAGE, UserError, nearest
from mlx_sft.files import read_yaml, user_path

PATHS = ("data", "valid", "init_adapter", "run_from", "resume", "resume_from_peft", "add_tokens")
"""Settings that name what is on the disk, ..."""
NAMES_OR_PATHS = ("model", "chat_template")
"""... and such as may name something else: what is not beside the file is left as it stands."""

_PACKAGE = Path(__file__).parent


def shipped() -> dict[str, Path]:
    """The configurations that come with this package, by their names: `tiny-lora`."""
    folder = next(place / "configs" for place in (_PACKAGE, _PACKAGE.parent) if (place / "configs").is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_config(name: str | Path) -> Path:
    """The file of this path, else the one that ships under this name; raises `UserError` where there is neither."""
    path = user_path(name)
    if path.is_dir():
        inside = path / "config.yaml"
        hint = f"did you mean {inside}?" if inside.is_file() else "name a YAML file"
        raise UserError("not a regular file, but a folder", where=str(name), hint=hint, exit_code=USAGE)
    if path.exists() or path.is_symlink():
        return path
    known = shipped()
    if path.name == str(name) and path.name.removesuffix(".yaml") in known:
        return known[path.name.removesuffix(".yaml")]
    near = nearest(path.stem, known)
    here = sorted(str(file) for file in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
    meant = nearest(str(path), here) or (f"{near}, which ships" if near else None)
    hint = f"did you mean {meant}?" if meant else f"{', '.join(known)} ship; `mlx-sft init` writes one to start from"
    raise UserError("no such configuration", where=str(name), hint=hint, exit_code=USAGE)


def read_settings(name: str | Path) -> dict[str, Any]:
    """The settings of a configuration, with the paths in it as they are from here.

    Raises:
        UserError: Where there is none, where it cannot be read, and for a path that leads somewhere from the working folder alone.
    """
    file = find_config(name)
    found = read_yaml(file)
    if file.parent == Path():  # its folder is the working folder
        return found
    for setting in (*PATHS, *NAMES_OR_PATHS):
        value = found.get(setting)
        if isinstance(value, str):
            found[setting] = _from_here(value, file, setting)
        elif isinstance(value, list) and setting == "data":
            found[setting] = [_from_here(one, file, setting) if isinstance(one, str) else one for one in value]
    return found


def as_in_file(settings: dict[str, Any], file: Path) -> dict[str, Any]:
    """Settings with the paths in them as a file has to name them; the inverse of what `read_settings` does to them."""

    def led(value: str, setting: str) -> str:
        return (
            value
            if _leads_from_anywhere(value) or (setting not in PATHS and not _is_there(value))
            else os.path.relpath(value, file.parent)
        )

    return settings | {
        name: led(value, name) if isinstance(value, str) else [led(one, name) for one in value]
        for name in (*PATHS, *NAMES_OR_PATHS)
        if (value := settings.get(name))
    }


def _from_here(value: str, file: Path, setting: str) -> str:
    """A value of a file's setting, as it is written in the working folder."""
    if _leads_from_anywhere(value):
        return value
    beside = os.path.normpath(file.parent / value)
    if _is_there(beside):
        return beside
    if setting not in PATHS:
        return value
    if _is_there(value):
        what = f"{setting}: {value} is not beside this file, from which its paths lead, but in the working folder"
        hint = f"write {setting}: {os.path.relpath(value, file.parent)}, or give {option_name(setting)} {value}"
        raise UserError(what, where=str(file), hint=hint, exit_code=USAGE)
    return beside


def _leads_from_anywhere(value: str) -> bool:
    return value in ("tiny", IN_MEMORY) or value.startswith(("hf:", "~")) or Path(value).is_absolute()


def _is_there(name: str) -> bool:
    """Whether something has this path, also with a share of a mixture behind it: `a.jsonl:0.7`."""
    with suppress(OSError, ValueError):  # no name that a file can have
        return Path(name).exists() or Path(name.rpartition(":")[0] or name).exists()
    return False
