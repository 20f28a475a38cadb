"""How much a chat template may do for one conversation: seconds, characters, and what it handles on the way.

Everything is counted in characters; an item of a list or an object counts as `UNIT` of them, a step as `STEP`. Knows what has
been spent; knows nothing of what costs how much.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from time import thread_time
from typing import Any, NoReturn

from jinja2.utils import Namespace

from mlx_sft.errors import UserError

MOST_SOURCE = 1 << 17
"""Characters of a template's source; a real one has fewer than 50,000."""
MOST_SECONDS = 5.0
"""Of the processor, for all renderings of a conversation; what other programs do meanwhile does not count."""
MOST_TEXT = 1 << 22
"""Characters of the conversation as it is written, and of every text on the way."""
MOST_HANDLED = 1 << 28
"""Characters that are made, copied or searched for one rendering, all in all."""
MOST_BITS = 1 << 12
"""Of a whole number."""
LARGER_FROM = 1 << 20
"""A conversation of so many characters has twice these limits, one of twice as many three times, and so on."""
UNIT = 16
STEP = 4
SMALL = frozenset({bool, float, int, type(None)})
"""The types of what takes no time to read."""
_LISTS = (list, tuple, set, frozenset, type(dict[str, Any]().keys()), type(dict[str, Any]().values()))
_PAIRS = type(dict[str, Any]().items())
_AT_ONCE = 1 << 20
"""The clock is looked at when so much has been spent again."""

CLOCK = "bounded clock"
"""The variable under which renderings share a clock; no template can write this name."""
TOO_LARGE = "it computes a number or a text that is too large"


class TemplateStopped(UserError):
    """A template was stopped. This is the fault of the model and not of a row: no other row would fare better."""

    @classmethod
    def because(cls, owner: str, reason: str) -> TemplateStopped:
        """The error for a template of `owner` that did what `reason` says."""
        return cls(
            f"the chat template of {owner} was stopped: {reason}",
            hint="a template like this is broken or hostile; give another tokenizer, or rows of plain `text`",
        )

    def at(self, origin: str) -> TemplateStopped:
        """The same, with the row at which it happened."""
        return TemplateStopped(self.what, where=self.where or origin, hint=self.hint)


@dataclass(slots=True)
class Clock:
    """The seconds that renderings have taken together, as far as their meters looked."""

    seconds: float = 0.0


class Meter:
    """What one rendering may still spend.

    Args:
        owner: Whose template it is.
        variables: What the template is given; the limits grow with it. Their `CLOCK`, if there is one, goes on.
    """

    __slots__ = ("_allowance", "_clock", "_granted", "_owner", "_seen", "_variables", "left")

    def __init__(self, owner: str, variables: Mapping[str, Any]) -> None:
        self._owner = owner
        self._variables = variables
        self._allowance: float | None = None
        self._clock: Clock = variables.get(CLOCK) or Clock()
        self._seen: float | None = None
        self._granted = self.left = _AT_ONCE

    def spend(self, units: int) -> None:
        """Spend so much, before or after the work is done.

        Raises:
            TemplateStopped: where that is too much.
        """
        self.left -= units
        if self.left < 0:
            self.look()

    def look(self) -> None:
        """Compare what has been spent, and the time, with the limits.

        Raises:
            TemplateStopped: where they are passed.
        """
        spent = self._granted - self.left
        if spent > MOST_HANDLED and spent > MOST_HANDLED * self.allowance:
            self.stop(f"it handles more than {_millions(MOST_HANDLED * self.allowance)} million characters on the way")
        now = thread_time()
        if self._seen is not None:
            self._clock.seconds += now - self._seen
        self._seen = now
        if self._clock.seconds > MOST_SECONDS and self._clock.seconds > MOST_SECONDS * self.allowance:
            self.stop(f"it ran for more than {MOST_SECONDS * self.allowance:.0f} s")
        self._granted, self.left = spent + _AT_ONCE, _AT_ONCE

    def check_text(self, length: int) -> None:
        """Raise `TemplateStopped` where a text of so many characters is too long."""
        if length > MOST_TEXT and length > MOST_TEXT * self.allowance:
            self.stop(f"it writes a text of more than {_millions(MOST_TEXT * self.allowance)} million characters")

    def check_bits(self, bits: int) -> None:
        """Raise `TemplateStopped` where a number of so many bits is too large."""
        if bits > MOST_BITS:
            self.stop(TOO_LARGE)

    def weigh(self, value: Any) -> int:
        """What a value counts, written out.

        Raises:
            TemplateStopped: where it is too large for one text.
        """
        units = weight(value, MOST_TEXT)
        if units > MOST_TEXT:
            units = weight(value, MOST_TEXT * self.allowance)
            self.check_text(units)
        return units

    def stop(self, reason: str) -> NoReturn:
        raise TemplateStopped.because(self._owner, reason)

    @property
    def allowance(self) -> float:
        """How many times the limits this conversation has; worked out only where a limit is reached."""
        if self._allowance is None:
            given = weight(list(self._variables.values()), MOST_HANDLED)
            self._allowance = 1 + given / LARGER_FROM
        return self._allowance


def weight(value: Any, most: float) -> int:
    """What a value counts, written out: one list that stands in two places counts twice. Counting ends beyond `most`."""
    units, found = UNIT, [value]
    for value in found:  # and what is found in it, at the end
        kind = type(value)
        if kind is str:
            units += len(value)
        elif kind is dict:
            units += 2 * UNIT * len(value)
            # Counted before they are looked at: a small list can hold a large one many times.
            if units > most:
                break
            found += value.values()
            try:
                units += len("".join(value))
            except TypeError:
                found += value
        elif kind is range:
            units += UNIT * len(value)
        elif kind not in SMALL:
            inner = parts(value)
            units += len(value) if isinstance(value, str | bytes) else UNIT * len(inner)
            if units > most:
                break
            found += inner
    return units


def parts(value: Any) -> Collection[Any]:
    """The items of a list, the keys and values of an object; nothing of what has no parts."""
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, _PAIRS):
        return [part for pair in value for part in pair]
    return value if isinstance(value, _LISTS) else ()


def depth(value: Any) -> int:
    """How many levels a value has. Only for what has been weighed."""
    levels, level = 0, [value]
    while level:
        levels += 1
        level = [inner for item in level for inner in parts(item)]
    return levels


def _millions(characters: float) -> int:
    return round(characters / (1 << 20))
