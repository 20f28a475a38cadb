"""The filters and tests of a bounded environment: those that `rewriting` puts in, and transformers' own, paid for.

Knows what Jinja hands to a filter; what one costs, `prices` knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import GeneratorType
from typing import Any

from jinja2 import pass_context
from jinja2.runtime import markup_join, str_join
from jinja2.utils import _PassArg

from mlx_sft.data.sandbox.limits import SMALL, STEP, UNIT, Meter
from mlx_sft.data.sandbox.prices import ITEM_FILTERS, LAZY_FILTERS, amount, paid, spend_on
from mlx_sft.data.sandbox.rewriting import CONCATENATED, MADE, READ, SEARCHED, TICK

_LISTS = (dict, list, tuple, set, bytes)


@pass_context
def _tick(context: Any, cost: int) -> bool:
    context.meter.spend(abs(cost))
    return True


@pass_context
def _read(context: Any, value: Any) -> Any:
    kind = type(value)
    if kind is str:
        meter = context.meter
        meter.left -= STEP + len(value)
        if meter.left < 0:
            meter.look()
    elif kind not in SMALL:
        context.meter.spend(context.meter.weigh(value))
    return value


@pass_context
def _searched(context: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return value
    (value,) = paid(context.meter, (value,))
    return _read(context, value)


@pass_context
def _made(context: Any, value: Any) -> Any:
    return checked(context.meter, value)


@pass_context
def _concatenated(context: Any, pieces: tuple[Any, ...]) -> str:
    for piece in pieces:
        _read(context, piece)
    text: str = markup_join(pieces) if context.eval_ctx.autoescape else str_join(pieces)
    context.meter.check_text(len(text))
    return text


def checked(meter: Meter, value: Any) -> Any:
    """What has just been made, if it is not too large."""
    if isinstance(value, str):
        meter.left -= STEP + len(value)
        if meter.left < 0:
            meter.look()
            meter.check_text(len(value))
    elif isinstance(value, int):
        meter.check_bits(value.bit_length())
    elif isinstance(value, _LISTS):
        meter.spend(UNIT * len(value))
    elif isinstance(value, GeneratorType):
        return _ticking(meter, value, UNIT)
    return value


def priced_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is paid for, by its name and what it is given."""
    wants = _PassArg.from_obj(function)
    is_lazy, reads_items = name in LAZY_FILTERS, name in ITEM_FILTERS

    @pass_context
    def priced(context: Any, *args: Any, **kwargs: Any) -> Any:
        meter: Meter = context.meter
        values = (*args, *kwargs.values()) if kwargs else args
        if is_lazy:
            if args[0]:
                args = (_ticking(meter, args[0], UNIT + amount(meter, values[1:])), *args[1:])
        else:
            spend_on(meter, name, values)
        if reads_items:
            args = (*paid(meter, args[:1], amount(meter, values[1:]) + 1, adds=name == "sum"), *args[1:])
        if wants is _PassArg.context:
            args = (context, *args)
        elif wants is _PassArg.eval_context:
            args = (context.eval_ctx, *args)
        elif wants is _PassArg.environment:
            args = (context.environment, *args)
        result = function(*args, **kwargs)
        return result if is_lazy else checked(meter, result)

    return priced


def _ticking(meter: Meter, items: Iterable[Any], each: int) -> Iterator[Any]:
    for item in items:
        meter.spend(each)
        yield item


def reading_test(test: Callable[..., bool]) -> Callable[..., bool]:
    """A test that pays for what it reads."""

    @pass_context
    def reading(context: Any, *args: Any, **kwargs: Any) -> bool:
        spend_on(context.meter, "", (*args, *kwargs.values()))
        return test(*paid(context.meter, args), **kwargs)

    return reading


COUNTING = {TICK: _tick, READ: _read, SEARCHED: _searched, MADE: _made, CONCATENATED: _concatenated}
"""The filters that `rewriting` puts in."""
