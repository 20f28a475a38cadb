"""How much a chat template may do for one conversation: seconds, characters, and what it handles on the way.

Sizes are counted in characters; an item of a list or an object counts as `UNIT` of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from time import monotonic, thread_time
from types import GeneratorType
from typing import Any, NoReturn

from jinja2.utils import Namespace

from mlx_sft.errors import UserError

MOST_SECONDS = 5.0
"""Of the processor, for all renderings of a conversation; what other programs do meanwhile does not count."""
MOST_TEXT = 1 << 22
"""Characters of the conversation as it is written, and of every text on the way."""
MOST_HANDLED = 1 << 28
"""Characters that one rendering reads and makes, all in all; an item of a list counts as `UNIT` of them."""
MOST_MULTIPLIED = 1 << 26
"""The size of what one call is applied to, times the sizes and numbers that it is given."""
LARGER_FROM = 1 << 20
"""A conversation of so many characters has twice these limits, one of twice as many three times, and so on."""
MOST_BITS = 1 << 12
"""Of a whole number."""
UNIT = 16

CLOCK = "bounded clock"
"""The variable under which renderings share a clock; no template can write this name."""
TOO_LARGE = "it computes a number or a text that is too large"

ONE_THING = frozenset({"abs", "attr", "count", "d", "default", "first", "length"})
"""Filters that look at one thing, whatever they are given."""
_LAZY = frozenset({"map", "reject", "rejectattr", "select", "selectattr"})
"""Filters that look at an item when one is asked for."""
SHALLOW = _LAZY | {"batch", "items", "last", "list", "random", "reverse", "slice"}
"""Filters that look at no item's content."""
_LINEAR = frozenset(
    {"count", "endswith", "find", "float", "index", "int", "partition", "removeprefix", "removesuffix", "split"}
    | {"startswith", "test", "truncate"}
)
"""They take no longer than what they are given is long."""
_PADDING = frozenset({"batch", "center", "ljust", "rjust", "round", "slice", "to_bytes", "zfill"})
"""What they make may be as long as a number says; with all others, as the product of what they are given."""
_SQUARE = frozenset({"pprint", "striptags", "urlize", "wordwrap"})
_ENCODINGS = frozenset({"ascii", "ignore", "latin-1", "replace", "strict", "utf-8", "utf8"})
_MOST_SQUARED = 1 << 12
"""Characters for what may take the square of their number: these filters, odd encodings, sums of lists."""
_UNKNOWN_LENGTH = 100_000
"""Counted for items that come one after another; Jinja allows a range no more."""

_WIDE = re.compile(r"%[-# +]*[\d*]*\.?\d{3}|\{[^{}:]*:[^{}]*\d{3}")
"""A width or a precision of more than two digits."""
_GIVEN_WIDTH = re.compile(r"%[-# +]*[\d.]*\*|\{[^{}]+\{")
_WIDE_BEHIND_KEY = re.compile(r"\)[-# +]*[\d*]*\.?(?:\d{3}|\*)")
"""As `%(key)100d`, where the key may hold brackets itself."""
_TWO_GIVEN = re.compile(r"\{[^{}]*\{[^{}]*\}[^{}]*\{")
_MOST_GIVEN = 1000
"""Characters of a text that takes widths from its arguments."""
_SMALL = frozenset({bool, float, int, type(None)})
TEXTS = (str, bytes)
_LISTS: tuple[Any, ...] = (list, tuple, set, frozenset, range, type({}.keys()), type({}.values()), type({}.items()))
_HOLDERS = (bytes, dict, *_LISTS)


class NoTemplate(UserError):
    """The model has no template, or none that can be used: its fault and not that of a row, for no other row would fare better."""


class TemplateStopped(NoTemplate):
    """A template was stopped."""

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
    """The processor's seconds that renderings have taken together."""

    seconds: float = 0.0


class Meter:
    """What one rendering may still do; its limits grow with the variables that the template is given."""

    def __init__(self, owner: str, variables: Mapping[str, Any]) -> None:
        self._owner = owner
        self._variables = variables
        self._allowance: float | None = None
        self._handled = 0
        self._clock: Clock = variables.get(CLOCK) or Clock()
        self._start = thread_time()
        # Before that, no thread can have had so much of the processor's time.
        self._look_at = monotonic() + MOST_SECONDS - self._clock.seconds

    def close(self) -> None:
        self._clock.seconds += thread_time() - self._start

    def spend(self, size: int) -> None:
        """A step that handles so many characters; raises `TemplateStopped` where that is too much, or the time is over."""
        self._handled += size
        if self._handled > MOST_HANDLED and self._handled > (most := MOST_HANDLED * self.allowance):
            self.stop(f"it handles more than {_millions(most)} million characters on the way")
        if (now := monotonic()) > self._look_at:
            left = MOST_SECONDS - self._clock.seconds - (thread_time() - self._start)
            if left < 0 and (left := left + MOST_SECONDS * (self.allowance - 1)) < 0:
                self.stop(f"it ran for more than {MOST_SECONDS * self.allowance:.0f} s")
            self._look_at = now + left

    def check_text(self, length: int) -> None:
        """Raise `TemplateStopped` where a text of so many characters is too long."""
        if length > MOST_TEXT and length > (most := MOST_TEXT * self.allowance):
            self.stop(f"it writes a text of more than {_millions(most)} million characters")

    def check_number(self, bits: float) -> None:
        """Raise `TemplateStopped` where a whole number of so many bits is too large."""
        if bits > MOST_BITS:
            self.stop(TOO_LARGE)

    def weigh(self, value: Any) -> int:
        """The size of a value as it would be written out; raises `TemplateStopped` where that is too much for one text."""
        size = len(value) if type(value) is str else _size(value, MOST_TEXT)
        if size > MOST_TEXT:
            size = _size(value, MOST_TEXT * self.allowance)
            self.check_text(size)
        return size

    def read(self, value: Any) -> Any:
        """A value that is written out, compared or hashed as a whole."""
        self.spend(len(value) if type(value) is str and len(value) < MOST_TEXT else self.weigh(value))
        return value

    def made(self, value: Any) -> Any:
        """A value that is new."""
        if isinstance(value, str):
            return self.read(value)
        size = UNIT
        if isinstance(value, int):
            self.check_number(value.bit_length())
        elif isinstance(value, GeneratorType):
            return self._one_by_one(value, self.made)
        elif isinstance(value, _HOLDERS):
            size *= len(value)
        self.spend(size)
        return value

    def read_later(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """The values; of those whose items come one after another, each item is read when it comes."""
        return tuple([self._one_by_one(value, self.read) if _is_iterator(value) else value for value in values])

    def _one_by_one(self, items: Iterable[Any], count: Callable[[Any], Any]) -> Iterator[Any]:
        for item in items:
            yield count(item)

    def check_call(self, name: str, values: Sequence[Any], named: Iterable[Any] = ()) -> None:
        """Check a filter or a method before it is called.

        Args:
            values: What it is applied to, then its arguments in their order.
            named: Its other arguments.

        Raises:
            TemplateStopped: where it reads too much, or may make far more of it.
        """
        first, given = values[0], [*values[1:], *named]
        formats, is_lazy = name in ("format", "format_map"), name in _LAZY
        if name in SHALLOW or _is_iterator(first):
            size = len(first) if hasattr(type(first), "__len__") else _UNKNOWN_LENGTH
        else:
            size = self.weigh(first)
        squares = (
            name in _SQUARE
            or (name == "sum" and any(isinstance(value, list | tuple) for value in given))
            or (name in ("decode", "encode") and not _ENCODINGS.issuperset(given))
        )
        if squares and size > _MOST_SQUARED:
            self.stop(TOO_LARGE)
        if name == "replace" and len(values) > 2:
            size, given = size // max(1, self.weigh(values[1])), given[1:]
        is_size = not (formats or is_lazy or name in _LINEAR)
        amount = sum(abs(value) if is_size and isinstance(value, int) else self.weigh(value) for value in given)
        if formats:
            self._check_widths(first, given)
        if name == "tojson" and amount:
            amount *= _depth(first)
        times = UNIT if name in _PADDING else _places(first) if formats else size
        at_most = amount * times
        if at_most > MOST_MULTIPLIED and name not in _LINEAR and at_most > MOST_MULTIPLIED * self.allowance:
            self.stop(TOO_LARGE)
        self.spend(UNIT + size + amount)

    def _check_widths(self, text: Any, arguments: Sequence[Any]) -> None:
        text = text.decode("latin-1") if isinstance(text, bytes) else text
        if not isinstance(text, str):
            return
        text = text.replace("{{", "").replace("}}", "")  # braces that are written
        is_given = _GIVEN_WIDTH.search(text) and (
            len(text) > _MOST_GIVEN or _TWO_GIVEN.search(text) or any(map(_is_wide, _leaves(arguments)))
        )
        if is_given or _WIDE.search(text) or ("%(" in text and _WIDE_BEHIND_KEY.search(text)):
            self.stop(TOO_LARGE)

    def stop(self, reason: str) -> NoReturn:
        raise TemplateStopped.because(self._owner, reason)

    @property
    def allowance(self) -> float:
        """How many times the limits this conversation has; worked out only where a limit is reached."""
        if self._allowance is None:
            self._allowance = 1 + _size(list(self._variables.values()), MOST_HANDLED) / LARGER_FROM
        return self._allowance


METER: ContextVar[Meter] = ContextVar("the meter of the rendering under way")


def _size(value: Any, most: float) -> int:
    """What a value counts, written out: a list that stands in two places counts twice. Counting ends beyond `most`."""
    size, found = 0, [value]
    for value in found:  # and what is found in it, at the end
        if isinstance(value, TEXTS):
            size += len(value)
        elif type(value) in _SMALL:
            size += UNIT
        else:
            inner = _parts(value)
            size += UNIT * (1 + len(inner))
            # Counted before they are looked at: a small list can hold a large one many times.
            if size > most:
                break
            found += inner
    return size


def _parts(value: Any) -> Sequence[Any]:
    """The items of a list, the keys and values of an object; nothing of what has no parts."""
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, _LISTS) else ()


def _is_iterator(value: Any) -> bool:
    return hasattr(type(value), "__next__")


def _depth(value: Any) -> int:
    """How many levels a value has. Only for what has been weighed."""
    levels, level = 0, [value]
    while level:
        levels += 1
        level = [inner for item in level for inner in _parts(item)]
    return levels


def _places(text: Any) -> int:
    """How many places a format has for its arguments, at the most."""
    return text.count("%") + text.count("{") if isinstance(text, str) else len(text)


def _leaves(value: Any) -> Iterator[Any]:
    inner = _parts(value)
    return (leaf for part in inner for leaf in _leaves(part)) if inner else iter((value,))


def _is_wide(value: Any) -> bool:
    """Whether a width could be given by this: a number, or a short text with digits."""
    return len(str(value)) < 20 and bool(re.search(r"\d{3}", str(value)))


def _millions(characters: float) -> int:
    return round(characters / (1 << 20))
