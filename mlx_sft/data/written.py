"""The objects of a row as the person wrote them, kept beside what was made of them, so that every key is counted where it stands."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
