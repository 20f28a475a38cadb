"""What a parser is here: how a broken input for it is made, and what may come of one.

Knows no parser by name.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

Files = dict[str, bytes]
"""The files of a folder by their paths in it; what is no file is one of `NO_FILES`."""

NO_FILES: dict[bytes, Callable[[Path], object]] = {
    b"@pipe@": os.mkfifo,
    b"@device@": lambda path: path.symlink_to("/dev/zero"),
    b"@loop@": lambda path: path.symlink_to(path.name),
    b"@link to a pipe@": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")),
    b"@link to nothing@": lambda path: path.symlink_to("nothing"),
    b"@folder@": Path.mkdir,
}
"""What may lie in the place of a file, and how it is made."""


class Wrong(Exception):
    """An input was taken for something else than it is."""


@dataclass(frozen=True)
class Materials:
    """The good inputs that broken ones are made of: a lab of `tests.faults`."""

    folder: Path

    @cached_property
    def model(self) -> Files:
        return _files(self.folder / "model")

    @cached_property
    def run(self) -> Files:
        """A finished run of twelve steps with a checkpoint after every second."""
        return _files(self.folder / "lora" / "disk" / "run")

    @cached_property
    def adapter(self) -> Files:
        return {name.removeprefix("adapter/"): content for name, content in self.run.items() if "adapter/" in name}


def _files(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass(frozen=True, slots=True)
class Parser:
    """A parser.

    Attributes:
        make: A broken input, which `chance` decides over.
        attempt: Have the product read what lies in a folder. It returns where that was read and means what a plain reader says, raises
            `UserError` where it was refused, and `Wrong` where it was taken for something else; whatever else it raises is a bug.
        inputs: How many unless asked otherwise.
    """

    name: str
    make: Callable[[random.Random, Materials], Files]
    attempt: Callable[[Path, Materials], None]
    inputs: int


def write(files: Files, folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        NO_FILES.get(content, lambda path, content=content: path.write_bytes(content))(path)
