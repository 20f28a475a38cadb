"""Files on the user's disk: JSON and YAML read within bounds, files and folders written atomically, free space checked.

What is read may come from anyone, so size, depth and the expansion of YAML aliases are bounded before they cost anything.
What is written appears under its name only once it is complete.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
    text = _text(path, most, hint, FAILURE)
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
    return _yaml_mapping(_text(path, MOST_YAML_BYTES, _YAML_HINT, USAGE), path)


def read_front_matter(path: Path) -> dict[str, Any]:
    """The metadata that a Markdown file begins with, between two lines of `---`; raises `UserError` as `read_yaml` does."""
    found = _FRONT_MATTER.match(_text(path, MOST_YAML_BYTES, "", FAILURE))
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


def _text(path: Path, most: int, hint: str, exit_code: int) -> str:
    try:
        with path.open("rb") as file:
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
        path.exists()
    except RuntimeError:  # `~` of an unknown user
        return Path(name)
    except OSError as error:
        what, hint = f"cannot be read: {error.strerror}", "check the path"
        raise UserError(what, where=str(name), hint=hint, exit_code=USAGE) from error
    return path


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


def sync(descriptor: int) -> None:
    """Make what was written survive a loss of power."""
    os.fsync(descriptor)
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone leaves it in the drive's cache
        with suppress(OSError):  # which not every file system can empty
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)


def sync_path(path: Path) -> None:
    """`sync` for a file's content, or for the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically: at every instant its path holds the old content or the new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    write_file_with(path, lambda temporary: temporary.write_bytes(data))


def write_file_with(path: Path, write: Callable[[Path], object]) -> None:
    """As `write_file`, with the content written by `write(temporary_path)`.

    The temporary name keeps the suffix, because some writers choose their format by it.
    """
    temporary = path.with_name(f".writing-{path.name}")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            sync_path(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_path(path.parent)


def free_folder(to: str | Path) -> Path:
    """A folder that is to be written, as an absolute path; raises `UserError` where it already holds something."""
    target = user_path(to).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("this folder already holds something", where=str(to), hint="give another --to")
    return target


@contextmanager
def write_folder(path: Path, needed: int = 0) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; rename it to `path` when the block ends well, remove it when not.

    A folder already at `path` is replaced.

    Args:
        needed: Bytes that it will take; 0 where that is not known.
    """
    temporary = path.with_name(f".writing-{path.name}")
    with disk_errors(path, needed):
        recover_replaced_folder(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            yield temporary
            for written in [*temporary.rglob("*"), temporary]:
                sync_path(written)
            _replace_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            recover_replaced_folder(path)
            raise
        sync_path(path.parent)


def recover_replaced_folder(path: Path) -> None:
    """Where this folder was being replaced when the process was killed or the disk failed, move the old one back to its place."""
    old = path.with_name(f".replaced-{path.name}")
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.is_dir():
        old.rename(path)


def _replace_folder(new: Path, path: Path) -> None:
    """Where the file system cannot exchange folders, `path` is missing for an instant: `recover_replaced_folder` mends a kill there."""
    if not path.exists():
        new.rename(path)
    elif exchange(new, path):
        sync_path(path.parent)
        shutil.rmtree(new)
    else:
        old = path.rename(path.with_name(f".replaced-{path.name}"))
        new.rename(path)
        shutil.rmtree(old)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; whether this system and its file system can."""
    library = ctypes.CDLL(None)
    names = os.fsencode(one), os.fsencode(other)
    if hasattr(library, "renamex_np"):  # macOS: RENAME_SWAP
        return bool(library.renamex_np(*names, 2) == 0)
    if hasattr(library, "renameat2"):  # Linux: both from the current folder (AT_FDCWD), RENAME_EXCHANGE
        return bool(library.renameat2(-100, names[0], -100, names[1], 2) == 0)
    return False


def to_json(value: Any) -> str:
    """As the JSON files of a run and of an export are written: of half a character, as in a file's name, the escape."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace").decode() + "\n"


def sha256_line(path: Path) -> str:
    """A file's line in a list of checksums, as `sha256sum` writes it."""
    with path.open("rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n"


@contextmanager
def workplace(beside: Path, needed: int, who: str) -> Iterator[Path]:
    """A temporary folder with room for so many bytes: beside something, else where the system has such folders.

    Args:
        who: What needs it, for the error where no disk has the room.
    """
    places = [beside.resolve().parent, Path(tempfile.gettempdir())]
    place = next((place for place in places if os.access(place, os.W_OK) and free_bytes(place) >= needed), places[-1])
    refuse_full_disk(place, needed, who, "remove what is not needed, or set TMPDIR to a folder on another disk")
    with disk_errors(place):
        work = tempfile.TemporaryDirectory(prefix=".mlx-sft-", dir=place)
    with work as name:
        yield Path(name)


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
