"""The doors: the six kinds of things that can be added, each by one file and one line in its room, or by another package.

A room's `__init__` has `ENTRIES`, which says in which module each entry is, so that an entry is imported only when it is asked for.
Another package adds its own through an entry point of the group of the room's name:

    [project.entry-points."mlx_sft.methods"]
    ia3 = "my_package.ia3:IA3"

A script or a test adds one with `METHODS.register("ia3", IA3)`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from mlx_sft.errors import USAGE, UserError, did_you_mean
from mlx_sft.streams import printable

T = TypeVar("T")

_AT_IMPORT = (
    ImportError,
    AttributeError,
    SyntaxError,
    NameError,
    TypeError,
    ValueError,
    LookupError,
    RuntimeError,
    OSError,
)
"""What another's package may raise while it is imported."""


class Registry(Generic[T]):
    """The entries of one kind, by name, in the order in which they are listed and tried.

    Args:
        kind: What one entry is, in words, such as `row format`.
        room: The package that holds the built-in entries, such as `mlx_sft.methods`; also the group of entry points.
    """

    def __init__(self, kind: str, room: str) -> None:
        self.kind = kind
        self.room = room
        self._loaded: dict[str, T] = {}

    def names(self) -> list[str]:
        """Every entry's name: the built-in ones first, then those of other packages, then those that were registered."""
        return list(dict.fromkeys([*self._built_in(), *self._entry_points(), *self._loaded]))

    def built_in(self) -> list[str]:
        """The names of the entries that come with this package."""
        return list(self._built_in())

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __getitem__(self, name: str) -> T:
        """An entry; raises `UserError` for a name that there is not, and for an entry of another package that cannot be imported."""
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def items(self) -> Iterator[tuple[str, T]]:
        """Every entry that can be imported; what is wrong with another package's is said when its entry is chosen."""
        for name in self.names():
            try:
                yield name, self[name]
            except UserError:
                continue

    def register(self, name: str, entry: T) -> T:
        """Add an entry for this process; raises `ValueError` for a name that is taken."""
        if name in self:
            raise ValueError(f"there is a {self.kind} named {name!r} already")
        self._loaded[name] = entry
        return entry

    def unregister(self, name: str) -> None:
        """Take back what `register` added."""
        del self._loaded[name]

    @contextmanager
    def registered(self, name: str, entry: T) -> Iterator[T]:
        """Add an entry while the block runs."""
        try:
            yield self.register(name, entry)
        finally:
            self.unregister(name)

    def listed(self, value: Any, refusal: str) -> list[str]:
        """The names that a setting gives, as a list or as texts with commas.

        Raises:
            ValueError: With the refusal where these are no names, and for a name that no entry has.
        """
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
            raise ValueError(refusal)
        names = [part.strip() for name in given for part in name.split(",")]
        for name in names:
            if name not in self:
                unknown = self.unknown(name)
                raise ValueError(printable(f"{unknown.what}; {unknown.hint}"))
        return names

    def unknown(self, name: str) -> UserError:
        """The error for a name that no entry has."""
        known = self.names()
        hint = did_you_mean(name, known) or f"there is {', '.join(known)}"
        return UserError(f"no {self.kind} is named {name}", hint=hint, exit_code=USAGE)

    def _load(self, name: str) -> T:
        if place := self._built_in().get(name):
            module, _, attribute = place.partition(":")
            built_in: T = getattr(import_module(module), attribute)
            return built_in
        if found := self._entry_points().get(name):
            try:
                entry: T = found.load()
            except _AT_IMPORT as error:
                package = found.dist.name if found.dist else found.value
                raise UserError(
                    f"the {self.kind} {name} of the package {package} cannot be imported: {error}",
                    hint=f"install a version of {package} that fits, or remove it",
                ) from error
            return entry
        raise self.unknown(name)

    def _built_in(self) -> dict[str, str]:
        entries: dict[str, str] = import_module(self.room).ENTRIES
        return entries

    def _entry_points(self) -> dict[str, EntryPoint]:
        return _entry_points_on(tuple(sys.path), self.room)


@cache
def _entry_points_on(path: tuple[str, ...], group: str) -> dict[str, EntryPoint]:
    """Those of a group in the packages on the path; to read what all of them declare takes 8 ms, and each row asks for it."""
    return {point.name: point for point in entry_points(group=group)}


FORMATS: Registry[Any] = Registry("row format", "mlx_sft.data.formats")
METHODS: Registry[Any] = Registry("method", "mlx_sft.methods")
OBJECTIVES: Registry[Any] = Registry("objective", "mlx_sft.objectives")
OPTIMIZERS: Registry[Any] = Registry("optimizer", "mlx_sft.optimizers")
CALLBACKS: Registry[Any] = Registry("callback", "mlx_sft.training.callbacks")
TARGETS: Registry[Any] = Registry("export format", "mlx_sft.convert.targets")
