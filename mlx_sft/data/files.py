"""Path or dataset id → the sources of its rows, each row with its origin (`chats.jsonl:17`).

Knows folders, files and the Hugging Face Hub; the formats of files are `readers`', the meaning of rows is `formats`'.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Protocol

from mlx_sft.data.readers import INSTALL_HINT, READERS, Rows, as_row, first_line
from mlx_sft.errors import USAGE, UserError, did_you_mean
from mlx_sft.runs import user_path

HUB_PREFIX = "hf:"
SPLIT_FILES = {"train": ("train",), "valid": ("valid", "validation", "dev"), "test": ("test",)}
"""The parts of a dataset folder, and the names that a part's file may have."""


class Source(Protocol):
    """Something that rows come from."""

    @property
    def name(self) -> str:
        """As a person would name it."""

    def rows(self) -> Rows:
        """Its rows in order; raises `UserError` where the whole cannot be read."""

    def sha256(self) -> str | None:
        """The digest of its bytes, where it is a file."""


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file of rows; its suffix names its format."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def rows(self) -> Rows:
        read = READERS[self.path.suffix.lower()]
        empty = True
        try:
            if self.path.stat().st_size == 0:
                raise UserError("the file is empty", where=self.name, hint="put at least one row in it")
            for row in read(self.path):
                empty = False
                yield row
        except OSError as error:
            _cannot_read(self.name, error)
        if empty:
            raise UserError("the file holds no rows", where=self.name, hint="put at least one row in it")

    def sha256(self) -> str:
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            _cannot_read(self.name, error)


@dataclass(frozen=True, slots=True)
class HubSource:
    """A split of a Hugging Face dataset: `hf:owner/name`, `hf:owner/name:split`, `hf:owner/name/config:split`."""

    name: str

    def rows(self) -> Rows:
        try:
            import datasets
        except ImportError:
            raise UserError(
                "reading a Hugging Face dataset needs the package `datasets`",
                where=self.name,
                hint=INSTALL_HINT,
            ) from None
        identifier, _, split = self.name.removeprefix(HUB_PREFIX).partition(":")
        owner, _, rest = identifier.partition("/")
        name, _, config = rest.partition("/")
        try:
            dataset = datasets.load_dataset(f"{owner}/{name}", config or None, split=split or "train")
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot load this dataset: {first_line(error)}",
                where=self.name,
                hint="check its name (hf:owner/name[/config][:split]) and the network, "
                "or give a file that is on this machine",
            ) from error
        for index, value in enumerate(dataset):
            yield as_row(f"{self.name}[{index}]", value)

    def sha256(self) -> None:
        return None


def locate(data: str) -> dict[str, Source]:
    """The sources that `data` names, by the part of the data they are.

    Returns:
        `{"all": source}` for a file or a dataset id; for a folder, those of `train`, `valid` and `test` that it has.
    """
    if data.startswith(HUB_PREFIX):
        identifier = data.removeprefix(HUB_PREFIX).partition(":")[0]
        if identifier.count("/") not in (1, 2) or not all(identifier.split("/")):
            raise UserError("not a dataset id", where=data, hint="write hf:owner/name[:split]", exit_code=USAGE)
        return {"all": HubSource(data)}
    path = user_path(data)
    if path.is_dir():
        return _folder(path)
    return {"all": _file(path)}


def _file(path: Path) -> FileSource:
    known = ", ".join(READERS)
    if not path.exists():
        raise UserError("no such file or folder", where=str(path), hint=_missing_hint(path), exit_code=USAGE)
    if not path.is_file():
        raise UserError("not a regular file", where=str(path), hint=f"give a {known} file", exit_code=USAGE)
    if path.suffix.lower() not in READERS:
        kind = f"`{path.suffix}` is not a known kind of file" if path.suffix else "the file's name has no suffix"
        raise UserError(kind, where=str(path), hint=f"known are {known}", exit_code=USAGE)
    return FileSource(path)


def _missing_hint(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    if not path.suffix and len(path.parts) == 2 and not path.is_absolute():
        return f"for a dataset on the Hugging Face Hub write {HUB_PREFIX}{path}"
    return did_you_mean(path.name, siblings) or "check the path"


def _folder(folder: Path) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for part, stems in SPLIT_FILES.items():
        files = [folder / f"{stem}{suffix}" for stem in stems for suffix in READERS]
        files = [file for file in files if file.is_file()]
        if len(files) > 1:
            names = " and ".join(file.name for file in files)
            raise UserError(
                f"{names} are both the {part} part",
                where=str(folder),
                hint="keep one",
                exit_code=USAGE,
            )
        if files:
            found[part] = FileSource(files[0])
    if not found:
        raise UserError(
            "the folder holds no rows",
            where=str(folder),
            hint="put train.jsonl in it (and valid.jsonl, test.jsonl); .json, .csv and .parquet do as well",
            exit_code=USAGE,
        )
    return found


def _cannot_read(name: str, error: OSError) -> NoReturn:
    raise UserError(f"cannot read: {error.strerror or error}", where=name, hint="check the path") from error
