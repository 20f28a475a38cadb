"""Files on the user's disk: JSON and YAML read within bounds, errors of the disk in words, free space checked.

What is read may come from anyone, so size, depth and the expansion of YAML aliases are bounded before they cost anything.
What is written goes through `writing`.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mlx_sft.console import size
from mlx_sft.errors import FAILURE, USAGE, UserError

MOST_JSON_BYTES = 64 * 2**20
"""The index of a model with a hundred thousand tensors has 10 MB."""
MOST_YAML_BYTES = 2**20
MOST_YAML_VALUES = 10_000
"""Values of a YAML file, with every alias written out."""
MOST_YAML_DEPTH = 20

_YAML_HINT = "write one `name: value` a line, as in configs/qwen3-0.6b-lora.yaml"

_FRONT_MATTER = re.compile(r"---[ \t]*\r?(\n.*?\n)---[ \t]*\r?(?:\n|$)", re.DOTALL)
"""The new line before the metadata is part of it, so that the lines of errors are the file's."""


def read_json(path: Path, *, hint: str = "", most: int = MOST_JSON_BYTES) -> dict[str, Any]:
    """The object that a JSON file of up to `most` bytes holds; raises `UserError` for anything else."""
    text = read_text(path, most=most, hint=hint)
    try:
        found = json.loads(text)
    except RecursionError as error:
        raise UserError("not JSON that can be read: nested too deep", where=str(path), hint=hint) from error
    except ValueError as error:
        raise UserError(f"not JSON: {error}", where=str(path), hint=hint) from error
    if not isinstance(found, dict):
        raise UserError("not a mapping of names to values", where=str(path), hint=hint)
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds; raises `UserError` for anything else."""
    return _yaml_mapping(read_text(path, most=MOST_YAML_BYTES, hint=_YAML_HINT, exit_code=USAGE), path)


def read_front_matter(path: Path) -> dict[str, Any]:
    """The metadata that a Markdown file begins with, between two lines of `---`; raises `UserError` as `read_yaml` does."""
    found = _FRONT_MATTER.match(read_text(path, most=MOST_YAML_BYTES))
    return _yaml_mapping(found[1], path) if found and found[1].strip() else {}


def _yaml_mapping(text: str, path: Path) -> dict[str, Any]:
    try:
        found = yaml.load(text, _BoundedLoader)  # noqa: S506 (a SafeLoader, with bounds)
    except (ValueError, RecursionError) as error:  # a date or a number that cannot be
        what = f"not a configuration: {str(error).partition(';')[0]}"
        raise UserError(what, where=str(path), hint=_YAML_HINT, exit_code=USAGE) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"not YAML: {problem}", where=where, hint=_YAML_HINT, exit_code=USAGE) from error
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError("not a mapping of names to values", where=str(path), hint=_YAML_HINT, exit_code=USAGE)
    return found


def open_regular(path: Path) -> io.BufferedReader:
    """A file opened for reading; raises `OSError` for a pipe, where reading could wait for ever, and for anything else that is none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(descriptor, "rb")  # noqa: PTH123 (there is no path any more)


def read_text(path: Path, *, most: int, hint: str = "", exit_code: int = FAILURE) -> str:
    """The UTF-8 text of a file of up to `most` bytes; raises `UserError` for anything else."""
    try:
        with open_regular(path) as file:
            content = file.read(most + 1)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        reason = getattr(error, "strerror", None) or error
        what, hint = f"cannot be read: {reason}", hint or "check the path"
        raise UserError(what, where=str(path), hint=hint, exit_code=exit_code) from error
    if len(content) > most:
        what = f"this file has more than {most // 2**20} MiB, which none of its kind has"
        raise UserError(what, where=str(path), hint=hint, exit_code=exit_code)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8 text", where=str(path), hint=hint, exit_code=exit_code) from error


class _BoundedLoader(yaml.SafeLoader):
    """Plain values only, each name given once, of a bounded number and depth."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._values_of: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if node not in self._values_of:
                raise yaml.composer.ComposerError(None, None, "an alias inside of what it stands for", mark)
            self._count(self._values_of[node], mark)
            return node
        if self._depth == MOST_YAML_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested deeper than {MOST_YAML_DEPTH} levels", mark)
        before = self._values
        self._count(1, mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None:
            self._values_of[node] = self._values - before
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[tuple[str, str]] = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in names:
                what = f"{key.value} is given twice"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)

    def _count(self, values: int, mark: Any) -> None:
        self._values += values
        if self._values > MOST_YAML_VALUES:
            what = f"more than {MOST_YAML_VALUES:,} values, with every alias written out"
            raise yaml.composer.ComposerError(None, None, what, mark)


def user_path(name: str | Path) -> Path:
    """A path as a person wrote it, with `~` expanded; raises `UserError` for one that no file system could have."""
    try:
        path = Path(name).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError, ValueError):
            path.stat()  # of links in a circle this says so, where `resolve` raises what it likes
    except RuntimeError:  # `~` of an unknown user
        return Path(name)
    except OSError as error:
        what, hint = f"cannot be read: {error.strerror}", "check the path"
        raise UserError(what, where=str(name), hint=hint, exit_code=USAGE) from error
    return path


def cache_folder() -> Path | None:
    """$MLX_SFT_CACHE, else mlx-sft in $XDG_CACHE_HOME, else in ~/.cache; None for a user without a home.

    A folder that any user could have made, such as one in /tmp, is none of these: whoever makes a cache decides what is trained on.
    """
    if own := os.environ.get("MLX_SFT_CACHE"):
        return user_path(own).absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return user_path((base if base.is_absolute() else Path.home() / ".cache") / "mlx-sft")
    except RuntimeError:  # a user without a home
        return None


def refuse_lost_folder() -> None:
    """Raise `UserError` where the working folder, by which other paths are understood, was removed."""
    try:
        Path.cwd()
    except OSError as error:
        raise UserError("the working folder is not there any more", hint="change to one that is (cd)") from error


@contextmanager
def disk_errors(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn a failed write into a `UserError` that names the place and a way out.

    Args:
        needed: Bytes that are to be written; 0 where that is not known.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            some = size(needed) if needed else "some space"
            hint = f"free {some}; what was written before is intact, and a run goes on with --resume"
            raise UserError("the disk is full", where=str(path), hint=hint) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "choose a folder that you may write to"
            raise UserError("no permission to write here", where=str(path), hint=hint) from error
        hint = "check the path and the disk; what was written before is intact"
        raise UserError(f"cannot write: {error.strerror or error}", where=str(path), hint=hint) from error


@contextmanager
def read_errors(where: str | Path, hint: str = "") -> Iterator[None]:
    """Turn a failed read into a `UserError` that names the place and a way out."""
    try:
        yield
    except OSError as error:
        hint = hint or ("check its permissions" if isinstance(error, PermissionError) else "check the path")
        raise UserError(f"cannot read: {error.strerror or error}", where=str(where), hint=hint) from error


def to_json(value: Any) -> str:
    """As the JSON files of a run and of an export are written: of half a character, as in a file's name, the escape."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def sha256_line(path: Path) -> str:
    """A file's line in a list of checksums, as `sha256sum` writes it."""
    with open_regular(path) as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n"


@cache
def code_digest(folder: Path) -> str:
    """SHA-256 of all Python code below a folder, with the files' names."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(f"{file.relative_to(folder)} ".encode() + file.read_bytes())
    return digest.hexdigest()


def free_bytes(path: Path) -> int:
    """Free space on the disk that holds `path`, or would hold it."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def folder_bytes(folder: Path) -> int:
    """The size of all files in a folder; 0 where there is no such folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def refuse_full_disk(path: Path, needed: int, who: str, hint: str) -> None:
    """Raise `UserError` where the disk of `path` has not so many free bytes; called before anything is written."""
    free = free_bytes(path)
    if needed > free:
        what = f"{who} takes up to {size(needed)} of disk, and {size(free)} is free here"
        raise UserError(what, where=str(path), hint=f"free {size(needed - free)}: {hint}" if hint else "")
