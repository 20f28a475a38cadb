"""Path or dataset id → the sources of its rows, each row with its origin (`chats.jsonl:17`).

The formats of files are `readers`', the meaning of rows is `formats`'.
"""

from __future__ import annotations

import hashlib
import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_sft.common_settings import IN_MEMORY
from mlx_sft.data.readers import COMPRESSIONS, INSTALL_HINT, READERS, OnBytes, Reader, Rows, reader_of, table_row
from mlx_sft.errors import USAGE, UserError, did_you_mean
from mlx_sft.files import read_errors, user_path

HUB_PREFIX = "hf:"
SPLIT_FILES = {"train": ("train",), "valid": ("valid", "validation", "dev"), "test": ("test",)}
"""The parts of a dataset folder, and the names that a part's file may have."""
KNOWN = ", ".join(READERS) + f" (all but .parquet also with {' or '.join(COMPRESSIONS)} behind it)"
"""The suffixes of files of rows."""


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file of rows; its suffix names its format."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def reader(self) -> Reader:
        with read_errors(self.name):
            if not stat.S_ISREG(self.path.stat().st_mode):  # to open a pipe could wait for ever
                hint = f"give a {KNOWN} file"
                raise UserError("not a regular file", where=self.name, hint=hint, exit_code=USAGE)
        read, suffix = reader_of(self.path), self.path.suffix
        if read is None:
            what = f"`{suffix}` is not a known kind of file" if suffix else "the file's name has no suffix"
            raise UserError(what, where=self.name, hint=f"known are {KNOWN}", exit_code=USAGE)
        return read

    def rows(self, on_bytes: OnBytes | None = None) -> Rows:
        read, empty = self.reader(), True
        with read_errors(self.name):
            for row in read(self.path, on_bytes) if self.size() else ():
                empty = False
                yield row
        if empty:
            what = "the file holds no rows" if self.size() else "the file is empty"
            raise UserError(what, where=self.name, hint="put at least one row in it")

    def size(self) -> int:
        with read_errors(self.name):
            return self.path.stat().st_size

    def sha256(self) -> str:
        with read_errors(self.name), self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


class _NoFile:
    __slots__ = ()

    def size(self) -> None:
        """None, as there are no bytes to count, ..."""

    def sha256(self) -> None:
        """... or to take the digest of."""


@dataclass(frozen=True, slots=True)
class HubSource(_NoFile):
    """A split of a Hugging Face dataset: `hf:owner/name`, `hf:owner/name:split`, `hf:owner/name/config:split`."""

    name: str

    def rows(self, on_bytes: OnBytes | None = None) -> Rows:
        try:
            import datasets
        except ImportError:
            what = "reading a Hugging Face dataset needs the package `datasets`"
            raise UserError(what, where=self.name, hint=INSTALL_HINT) from None
        identifier, _, split = self.name.removeprefix(HUB_PREFIX).partition(":")
        owner, _, rest = identifier.partition("/")
        name, _, config = rest.partition("/")
        try:
            dataset = datasets.load_dataset(f"{owner}/{name}", config or None, split=split or "train")
        except (OSError, ValueError, RuntimeError) as error:
            what = f"cannot load this dataset: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
            hint = "check its name (hf:owner/name[/config][:split]) and the network, or give a file that is on this machine"
            raise UserError(what, where=self.name, hint=hint) from error
        for index, value in enumerate(dataset):
            yield table_row(f"{self.name}[{index}]", value)


@dataclass(frozen=True, slots=True)
class MemorySource(_NoFile):
    """Rows in memory: a list of dicts, a `datasets.Dataset`, or any sequence of mappings. A row is named by its index, `data[17]`."""

    name: str
    values: Sequence[Any]

    def rows(self, on_bytes: OnBytes | None = None) -> Rows:
        if isinstance(self.values, str | bytes | Mapping) or not hasattr(self.values, "__getitem__"):
            what = f"rows in memory are a sequence of mappings, not a {type(self.values).__name__}"
            raise UserError(what, where=self.name, hint="give a list of dicts, or a datasets.Dataset", exit_code=USAGE)
        if len(self.values) == 0:
            raise UserError("there are no rows", where=self.name, hint="give at least one")
        for index, value in enumerate(self.values):
            origin = f"{self.name}[{index}]"
            if isinstance(value, Mapping):
                yield table_row(origin, dict(value))
            else:
                yield UserError(f"the row is a {type(value).__name__}, not a mapping", where=origin)


Source = FileSource | HubSource | MemorySource
"""Something that rows come from, in order; it can be pickled, and the origins of its rows begin with its name. `rows` raises
`UserError` where the whole cannot be read, and calls `on_bytes` now and then with the bytes read so far, of `size()`."""


def locate(data: str) -> dict[str, Source]:
    """The sources that `data` names, by the part of the data they are.

    Returns:
        `{"all": source}` for a file or a dataset id; for a folder, those of `train`, `valid` and `test` that it has.
    """
    if data == IN_MEMORY:
        what = "the rows of this run were given in memory, and are not here now"
        raise UserError(what, hint="give them again from Python: train(config, data=rows)", exit_code=USAGE)
    if data.startswith(HUB_PREFIX):
        identifier = data.removeprefix(HUB_PREFIX).partition(":")[0]
        if identifier.count("/") not in (1, 2) or not all(identifier.split("/")):
            raise UserError("not a dataset id", where=data, hint="write hf:owner/name[:split]", exit_code=USAGE)
        return {"all": HubSource(data)}
    path = user_path(data)
    with read_errors(str(path)):
        return _folder(path) if path.is_dir() else {"all": _file(path)}


def split_weight(spec: str) -> tuple[str, float | None]:
    """`a.jsonl:0.7` → the data and its share of a mixture: `("a.jsonl", 0.7)`; None where no share is given.

    A path that exists as it stands is taken whole, and so is the split of a dataset id (`hf:owner/name:test`).

    Raises:
        UserError: for a share that is not a number above 0.
    """
    data, colon, text = spec.rpartition(":")
    if not colon or not data or data == HUB_PREFIX.rstrip(":") or _exists(spec):
        return spec, None
    try:
        weight = float(text)
    except ValueError:
        if data.startswith(HUB_PREFIX) or not _exists(data):
            return spec, None
        weight = math.nan
    if not 0 < weight < math.inf:
        what, hint = f"the share `{text}` is not a number above 0", f"write {data}:0.5"
        raise UserError(what, where=spec, hint=hint, exit_code=USAGE)
    return data, weight


def _exists(name: str) -> bool:
    try:
        return user_path(name).exists()
    except (UserError, OSError):  # too long for a name, or not to be looked into
        return False


def _file(path: Path) -> FileSource:
    if not path.exists():
        if path.is_symlink():
            hint = "give the file itself, or mend the link"
            raise UserError("a link that leads nowhere", where=str(path), hint=hint, exit_code=USAGE)
        raise UserError("no such file or folder", where=str(path), hint=_missing_hint(path), exit_code=USAGE)
    source = FileSource(path)
    source.reader()
    return source


def _missing_hint(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    if not path.suffix and len(path.parts) == 2 and not path.is_absolute():
        return f"for a dataset on the Hugging Face Hub write {HUB_PREFIX}{path}"
    return did_you_mean(path.name, siblings) or "check the path"


def _folder(folder: Path) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for part, stems in SPLIT_FILES.items():
        names = [f"{stem}{suffix}{packed}" for stem in stems for suffix in READERS for packed in ("", *COMPRESSIONS)]
        files = [folder / name for name in names if reader_of(Path(name)) and (folder / name).is_file()]
        if len(files) > 1:
            both = " and ".join(file.name for file in files)
            raise UserError(f"{both} are both the {part} part", where=str(folder), hint="keep one", exit_code=USAGE)
        if files:
            found[part] = FileSource(files[0])
    if not found:
        hint = "put train.jsonl in it (and valid.jsonl, test.jsonl); .json, .csv, .parquet and .txt do as well"
        raise UserError("the folder holds no rows", where=str(folder), hint=hint, exit_code=USAGE)
    return found
