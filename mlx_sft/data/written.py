"""A row that notes which of its keys are read, and the objects in it as the person wrote them, beside what was made of them.

So every key is counted where it stands, and none that nothing reads is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mlx_sft.data.key_counts import Owner


class Written(NamedTuple):
    """One object of a row: a message, a call, a content part or a tool.

    Attributes:
        of: What it is.
        place: Where it stands in the row, such as `messages[2].tool_calls[0]`.
        value: Itself, with all of its keys.
        read: The keys that its reader takes, whatever the chat template does.
        made: What was made of it: a name that is in it was not left out, though it may have been written otherwise.
    """

    of: Owner
    place: str
    value: Mapping[str, Any]
    read: Collection[str]
    made: Mapping[str, Any]


class Read(dict[str, Any]):
    """A message or a call as chat templates take it, which knows where it comes from; what is derived from it is a plain dictionary.

    Attributes:
        place: Where it stands in the row; of a turn in several messages, where the first of them does.
        written: The objects that it was made of; none where its row format has put it together from something else.
    """

    __slots__ = ("place", "written")

    def __init__(self, value: Mapping[str, Any], place: str, written: Sequence[Written] = ()) -> None:
        super().__init__(value)
        self.place = place
        self.written = list(written)


def place_of(message: Mapping[str, Any], index: int) -> str:
    """Where a message stands in its row; by its index where that is not known."""
    return message.place if isinstance(message, Read) else f"messages[{index}]"


class WatchedRow(dict[str, Any]):
    """The value of a row, for a row format to read as any dictionary.

    A key counts as read once it is asked for, whether it is there or not; whoever goes through all of them has read them all.

    Attributes:
        asked: The keys that were asked for.
        parts: Objects in the row that are read by their keys as the row is, each with the key under which it stands.
        written: The objects inside of it that were read; the conversations that are made of one row may have some in common.
    """

    def __init__(self, value: dict[str, Any]) -> None:
        super().__init__(value)
        self.asked: set[Any] = set()
        self.parts: list[tuple[str, WatchedRow]] = []
        self.written: list[Written] = []

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        self.asked.add(key)
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

    def _all(self) -> None:
        self.asked.update(super().keys())


def watched_part(row: dict[str, Any], part: dict[str, Any], key: str) -> WatchedRow:
    """An object that stands under a key of a row, to be read as the row is: what is not read of it is counted among the row's keys."""
    watched = WatchedRow(part)
    if isinstance(row, WatchedRow):
        row.parts.append((key, watched))
    return watched
