"""What a filter or a method costs at the most, spent before it is done.

Knows what decides how long a call takes and how much it makes: its text, a number, or both together. A price is a bound and not
an estimate: `"a".center(n)` costs n. Knows nothing of templates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

from mlx_sft.data.sandbox.limits import MOST_TEXT, SMALL, STEP, TOO_LARGE, UNIT, Meter, depth

FREE_FILTERS = frozenset({"abs", "attr", "count", "d", "default", "first", "length"})
"""They look at one thing, whatever they are given."""
LAZY_FILTERS = frozenset({"map", "reject", "rejectattr", "select", "selectattr"})
"""They look at an item when one is asked for, and may pass over all."""
ITEM_FILTERS = frozenset({"groupby", "join", "max", "min", "sort", "sum", "unique"})
"""They read the items that they are given."""
READING_TESTS = frozenset(
    {
        *("!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt"),
        *("in", "le", "lessthan", "lower", "lt", "ne", "upper"),
    }
)
"""The tests that read what they are given."""

_KNOWN = SMALL | {dict, list, str, tuple}
_MOST_ODD = 1000
"""Characters for what takes the square of its length, which no template needs."""
_MOST_SLOW = 1 << 17
_SLOW = 16
_MOST_PRECISION = 1000
_MOST_LEVELS = 1000
"""Python goes no deeper."""
_PLAIN_ENCODINGS = frozenset({"ascii", "ignore", "latin-1", "replace", "strict", "utf-8", "utf8"})

_PERCENT_SPEC = re.compile(r"%(?:\([^)]*\))?[^%A-Za-z]*")
_BRACE_SPEC = re.compile(r"\{[^{}]*")
_NESTED_SPEC = re.compile(r"\{[^{}]+\{")
_NUMBER = re.compile(r"\d+")


def spend_on(meter: Meter, name: str, values: Sequence[Any]) -> None:
    """Spend what a filter or a method of this name costs.

    Args:
        values: What it is applied to, and all its arguments.

    Raises:
        TemplateStopped: where that is too much.
    """
    _RULES.get(name, _read)(meter, values)


def paid(meter: Meter, values: tuple[Any, ...], each: int = 1, adds: bool = False) -> tuple[Any, ...]:
    """The values; of those whose items come one after another, each item is paid for when it comes.

    Args:
        each: How many times its size.
        adds: Whether with the sizes of all before.
    """
    return tuple(
        _paid(meter, value, each, adds) if type(value) not in _KNOWN and isinstance(value, Iterator) else value
        for value in values
    )


def _paid(meter: Meter, items: Iterator[Any], each: int, adds: bool) -> Iterator[Any]:
    before = 0
    for item in items:
        size = _size(meter, item)
        meter.spend(STEP + max(1, size) * each + before)
        before += size if adds else 0
        yield item


def spend_on_repeating(meter: Meter, left: Any, right: Any) -> None:
    """Spend what `left * right` costs where one is a text or a list.

    Raises:
        TemplateStopped: where that is too much.
    """
    sequence, times = (right, left) if isinstance(left, int) else (left, right)
    if isinstance(sequence, str | bytes | list | tuple) and isinstance(times, int):
        length = len(sequence) * max(times, 0)
        meter.check_text(length)
        meter.spend(length if isinstance(sequence, str | bytes) else UNIT * length)


def _read(meter: Meter, values: Sequence[Any]) -> None:
    units = STEP * (1 + len(values))
    for value in values:
        units += len(value) if type(value) is str else _size(meter, value)
    meter.spend(units)


def _items(meter: Meter, values: Sequence[Any]) -> None:
    """As many items as there are, and as its numbers say."""
    items = len(values[0]) if isinstance(values[0], Sized) else 1
    meter.spend(UNIT * (1 + items + sum(abs(value) for value in values[1:] if isinstance(value, int))))


def _times(meter: Meter, values: Sequence[Any]) -> None:
    """Each character of the one for each of the others, or as often as a number says."""
    size, times = _size(meter, values[0]), amount(meter, values[1:]) if len(values) > 1 else 1
    meter.spend(UNIT + max(1, size) * max(1, times))


def _sum(meter: Meter, values: Sequence[Any]) -> None:
    """Lists are joined one after another."""
    _times(meter, values)
    if any(isinstance(value, list | tuple) for value in values[1:]):
        meter.spend(_size(meter, values[0]) ** 2 // UNIT)


def _split(meter: Meter, values: Sequence[Any]) -> None:
    """Into as many pieces as there can be."""
    separator = max((len(value) for value in values[1:] if isinstance(value, str)), default=1)
    meter.spend(UNIT + _size(meter, values[0]) * (1 + UNIT // max(1, separator)))


def _slow(meter: Meter, values: Sequence[Any], most: int = _MOST_SLOW) -> None:
    size = sum(_size(meter, value) for value in values)
    if size > most:
        meter.stop(TOO_LARGE)
    _times(meter, values)
    meter.spend(_SLOW * size)


def _odd(meter: Meter, values: Sequence[Any]) -> None:
    _slow(meter, values, _MOST_ODD)


def _encoded(meter: Meter, values: Sequence[Any]) -> None:
    (_read if _PLAIN_ENCODINGS.issuperset(values[1:]) else _odd)(meter, values)


def _rounded(meter: Meter, values: Sequence[Any]) -> None:
    if amount(meter, values[1:]) > _MOST_PRECISION:
        meter.stop(TOO_LARGE)


def _json(meter: Meter, values: Sequence[Any]) -> None:
    """Separators and indentation for each value in it."""
    size, options = _size(meter, values[0]), amount(meter, values[1:])
    meter.spend(UNIT + size)
    most = size // UNIT * options
    if most * _MOST_LEVELS > MOST_TEXT:
        meter.spend(most * depth(values[0]))


def _formatted(meter: Meter, values: Sequence[Any]) -> None:
    """The text, the widths that it names or takes from the arguments, and each argument in each place."""
    text, arguments = values[0], values[1:]
    if not isinstance(text, str | bytes):
        return _read(meter, values)
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    specs = [*_PERCENT_SPEC.findall(text), *_BRACE_SPEC.findall(text)]
    widths = sum(int(digits[:12]) for spec in specs for digits in _NUMBER.findall(spec))
    if any("*" in spec for spec in specs) or _NESTED_SPEC.search(text):
        widths += len(specs) * max((abs(number) for number in _numbers(arguments)), default=0)
    written = UNIT + sum(_size(meter, argument) for argument in arguments)
    return meter.spend(UNIT + len(text) + widths + len(specs) * written)


def _numbers(arguments: Sequence[Any]) -> Iterable[int]:
    for argument in arguments:
        if isinstance(argument, int):
            yield argument
        elif isinstance(argument, dict):
            yield from _numbers(list(argument.values()))
        elif isinstance(argument, list | tuple):
            yield from _numbers(argument)


def _size(meter: Meter, value: Any) -> int:
    kind = type(value)
    if kind is str:
        return len(value)
    return 0 if kind in SMALL else meter.weigh(value)


def amount(meter: Meter, values: Sequence[Any]) -> int:
    """How much values say: characters, or numbers."""
    return sum(abs(value) if isinstance(value, int) else _size(meter, value) for value in values)


_Rule = Callable[[Meter, Sequence[Any]], None]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("batch", "items", "last", "list", "random", "reverse", "slice"), _items),
    **dict.fromkeys(
        ("center", "expandtabs", "indent", "join", "ljust", "replace", "rjust", "to_bytes", "zfill"), _times
    ),
    **dict.fromkeys(("groupby", "max", "min", "sort", "unique"), _times),
    **dict.fromkeys(("lstrip", "rstrip", "strip", "trim", "rfind", "rindex", "rpartition", "rsplit"), _times),
    **dict.fromkeys(("split", "splitlines"), _split),
    **dict.fromkeys(
        ("pprint", "title", "translate", "unescape", "urlencode", "wordcount", "wordwrap", "xmlattr"), _slow
    ),
    **dict.fromkeys(("striptags", "urlize"), _odd),
    **dict.fromkeys(("decode", "encode"), _encoded),
    **dict.fromkeys(("format", "format_map"), _formatted),
    "round": _rounded,
    "sum": _sum,
    "tojson": _json,
}
