"""A row's value that notes which of its keys are read, so that a key that nothing reads is not dropped in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlx_sft.data.written import Written


class WatchedRow(dict[str, Any]):
    """The value of a row, for a row format to read as any dictionary.

    A key counts as read once it is asked for, whether it is there or not; whoever goes through all of them has read them all.

    Attributes:
        asked: The keys that were asked for.
        written: The objects inside of it that were read; the conversations that are made of one row may have some in common.
    """

    def __init__(self, value: dict[str, Any]) -> None:
        super().__init__(value)
        self.asked: set[Any] = set()
        self.written: list[Written] = []
        self._not_its_own: frozenset[str] = frozenset()

    def __getitem__(self, key: str) -> Any:
        self._ask(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self._ask(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._ask(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self._ask(key)
        return super().pop(key, *default)

    def __iter__(self) -> Iterator[str]:
        self._all()
        return super().__iter__()

    def keys(self) -> Any:
        self._all()
        return super().keys()

    def values(self) -> Any:
        self._all()
        return super().values()

    def items(self) -> Any:
        self._all()
        return super().items()

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)

    def _ask(self, key: Any) -> None:
        if key not in self._not_its_own:
            self.asked.add(key)

    def _all(self) -> None:
        self.asked.update(super().keys() - self._not_its_own)


def changed(row: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A row with other values for some keys, of which to ask is not to ask the row; whatever else is asked of it, the row is asked."""
    own = {key: dict.__getitem__(row, key) for key in dict.__iter__(row)}  # which asks the row nothing
    other = WatchedRow(own | values)
    if isinstance(row, WatchedRow):
        other.asked, other.written, other._not_its_own = row.asked, row.written, frozenset(values)
    return other
