"""Path or dataset id → the sources of its rows, each row with its origin (`chats.jsonl:17`).

The formats of files are `readers`', the meaning of rows is `formats`'.
"""

from __future__ import annotations

import hashlib
import math
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from mlx_sft.common_settings import IN_MEMORY
from mlx_sft.config import TrainConfig
from mlx_sft.data.file_text import COMPRESSIONS, INSTALL_HINT, OnBytes
from mlx_sft.data.folders import PartFiles, numbered_files, parts_of
from mlx_sft.data.readers import READERS, Reader, Rows, reader_of, table_row
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import open_regular, read_errors, user_path
from mlx_sft.near_paths import instead_of_data, kind_of

HUB_PREFIX = "hf:"
KNOWN = ", ".join(READERS) + f" (all but .parquet also with {' or '.join(COMPRESSIONS)} behind it)"
"""The suffixes of files of rows."""
_NO_ROWS_HINT = "put at least one row in it"


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file of rows, or several that are one part of the data, in order; each row is named by its own file, whose suffix names its format.

    Args:
        path: The file, or what names the several.
        several: These, where there are several.
    """

    path: Path
    several: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def files(self) -> tuple[Path, ...]:
        return self.several or (self.path,)

    def rows(self, on_bytes: OnBytes | None = None) -> Rows:
        before, empty = 0, True
        for file in self.files:
            read, size = reader_for(file), _size(file)
            with read_errors(str(file)):
                if not size:
                    raise UserError("the file is empty", where=str(file), hint=_NO_ROWS_HINT)
                for row in read(file, partial(_told_behind, on_bytes, before) if on_bytes else None):
                    empty = False
                    yield row
            before += size
        if empty:
            what = f"the {'files hold' if self.several else 'file holds'} no rows"
            raise UserError(what, where=self.name, hint=_NO_ROWS_HINT)

    def size(self) -> int:
        return sum(map(_size, self.files))

    def sha256(self) -> str:
        """Of the file; of several, of their names and digests."""
        digests = []
        for file in self.files:
            with read_errors(str(file)), open_regular(file) as opened:
                digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
        if not self.several:
            return digests[0]
        lines = "".join(f"{digest} {file.name}\n" for digest, file in zip(digests, self.files, strict=True))
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def reader_for(file: Path) -> Reader:
    """What reads the rows of a file; raises `UserError` for what is no regular file, or of no known kind."""
    with read_errors(str(file)):
        if not stat.S_ISREG(file.stat().st_mode):  # to open a pipe could wait for ever
            raise UserError("not a regular file", where=str(file), hint=f"give a {KNOWN} file", exit_code=USAGE)
    if read := reader_of(file):
        return read
    what = f"`{file.suffix}` is not a known kind of file" if file.suffix else "the file's name has no suffix"
    raise UserError(what, where=str(file), hint=instead_of_data(file) or f"known are {KNOWN}", exit_code=USAGE)


def _size(file: Path) -> int:
    with read_errors(str(file)):
        return file.stat().st_size


def _told_behind(on_bytes: OnBytes, before: int, position: int) -> None:
    on_bytes(before + position)


class _NoFile:
    __slots__ = ()
    files: ClassVar[tuple[Path, ...]] = ()

    def size(self) -> None:
        """There are no bytes to count, ..."""

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
"""Something that rows come from, in order; it can be pickled. The origins of its rows begin with its name, or with that of one of its
files. `rows` raises `UserError` where the whole cannot be read, and calls `on_bytes` now and then with the bytes read so far, of
`size()`."""


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
        if not path.is_dir():
            numbered = None if path.exists() else numbered_files(path)
            return {"all": _part(numbered) if numbered else _file(path)}
        if kind_of(path) == "run":
            raise UserError("a run, and no rows", where=str(path), hint=instead_of_data(path), exit_code=USAGE)
        return {name: _part(part) for name, part in parts_of(path).items()}


def refuse_missing(config: TrainConfig) -> None:
    """Raise `UserError` for rows that are not there, before anything is fetched for them."""
    for data in (*config.data, config.valid):
        if data is not None and data != IN_MEMORY:
            locate(split_weight(data)[0])


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


def full_place(spec: str) -> str:
    """Data as it is given, with the full path of what lies on disk, so that it is found from anywhere."""
    name, _ = split_weight(spec)
    return full_path(name) + spec[len(name) :]


def full_path(name: str) -> str:
    """The full path of what lies on disk, and every other name as it is."""
    path = user_path(name)
    return str(path.resolve()) if path.exists() or numbered_files(path) else name


def _exists(name: str) -> bool:
    try:
        return user_path(name).exists()
    except (UserError, OSError):  # too long for a name, or not to be looked into
        return False


def _part(part: PartFiles) -> Source:
    return FileSource(part.files[0]) if len(part.files) == 1 else FileSource(part.name, part.files)


def _file(path: Path) -> FileSource:
    if not path.exists():
        if path.is_symlink():
            hint = "give the file itself, or mend the link"
            raise UserError("a link that leads nowhere", where=str(path), hint=hint, exit_code=USAGE)
        raise UserError("no such file or folder", where=str(path), hint=_missing_hint(path), exit_code=USAGE)
    reader_for(path)
    return FileSource(path)


def _missing_hint(path: Path) -> str:
    if near := instead_of_data(path):
        return near
    if not path.suffix and len(path.parts) == 2 and not path.is_absolute():
        return f"for a dataset on the Hugging Face Hub write {HUB_PREFIX}{path}"
    return "check the path"
