"""The modules inside of a layer, split into products with weights and the computation between them (the core).

    x ─► gate_proj, up_proj ─► core ─► down_proj ─►          x ─► q_proj, k_proj, v_proj ─► core ─► o_proj ─►

The parts are not found by names: one call of the model's own code is watched. The core is that code too, run with the products
replaced by their results; no class is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.model.linears import SPLIT
from mlx_sft.model.sharding import of_one_input

Call = Callable[..., Any]

_ATTENTION = "scaled_dot_product_attention"
_NO_CODE = (lambda: None).__code__


@dataclass
class Block:
    """A module as `last(core(*[child(x) for child in first]))`.

    Attributes:
        first: Names of the children that multiply the input with weights, in the order in which they are called.
        last: Name of the child that computes the result.
        positionwise: Whether the module was called with its input alone, so that no position sees another.
        run: The module's code, where it is not run as it is.
    """

    module: nn.Module
    first: tuple[str, ...]
    last: str
    positionwise: bool
    run: Call | None = None

    def projected(self, x: mx.array) -> list[mx.array]:
        return of_one_input([getattr(self.module, name) for name in self.first], x)

    def core(self, projected: list[mx.array], x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """What the module computes from the first products, before the last."""
        results: dict[str, Call] = {
            name: (lambda _, result=result: result) for name, result in zip(self.first, projected, strict=True)
        }
        with replaced_children(self.module, results | {self.last: lambda hidden: hidden}):
            result: mx.array = (self.run or self.module)(x, *args, **kwargs)
        return result


def find_blocks(layers: list[nn.Module], run: Callable[[], object]) -> list[dict[str, Block]]:
    """The children that are blocks, by name, for each layer.

    Args:
        run: Calls every layer once as training does; its result is never computed.
    """
    watches = [
        _Watch(layer, name) for layer in layers for name, child in layer.children().items() if _has_linears(child)
    ]
    undo = [watch.start() for watch in watches]
    try:
        run()
    finally:
        for stop in undo:
            stop()
    found: list[dict[str, Block]] = [{} for _ in layers]
    places = {id(layer): index for index, layer in enumerate(layers)}
    for watch in watches:
        block = watch.block()
        if block is not None:
            found[places[id(watch.layer)]][watch.name] = block
    return found


def names_in(module: nn.Module, name: str) -> bool:
    """Whether a module's own code has this name in it, of a function of MLX's or of mlx-lm's."""
    return name in getattr(type(module).__call__, "__code__", _NO_CODE).co_names


def calls_attention(module: nn.Module) -> bool:
    """Whether a module's own code calls MLX's attention."""
    return names_in(module, _ATTENTION)


def with_names(module: nn.Module, names: Mapping[str, Any]) -> Call:
    """A module's own code with other things where it has these global names; the module and its class stay as they are."""
    function: Any = type(module).__call__
    known = function.__globals__ | names
    copy = FunctionType(function.__code__, known, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return partial(copy, module)


def attention_names(attention: Call) -> dict[str, Any]:
    """The global names by which code calls MLX's attention, for another function with its arguments."""

    def of_mlx_lm(queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, **named: Any) -> Any:
        return attention(queries, keys, values, scale=scale, **named)

    return {"mx": _With(mx, fast=_With(mx.fast, **{_ATTENTION: attention})), _ATTENTION: of_mlx_lm}


class _With:
    """A namespace with some names of its own before another's."""

    def __init__(self, other: Any, **own: Any) -> None:
        self._other = other
        vars(self).update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._other, name)


class InPlaceOf:
    """What takes a module's place among its parent's children, and has its attributes: calls of it go to another function."""

    def __init__(self, module: Any, call: Callable[..., Any]) -> None:
        self._module = module
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@contextmanager
def replaced_children(module: nn.Module, replacements: Mapping[str, Call]) -> Iterator[None]:
    """Within the `with` block, calls of these children go to the replacements, which may stand before others."""
    before = {name: vars(module)[name] for name in replacements if name in vars(module)}
    for name, replacement in replacements.items():
        # An instance attribute comes before a Module's children, which live in its dictionary.
        object.__setattr__(module, name, replacement)
    try:
        yield
    finally:
        for name in replacements:
            object.__delattr__(module, name)
        vars(module).update(before)


@dataclass
class _Watch:
    """Takes the place of a layer's child, and notes the calls of it and of its linear children."""

    layer: nn.Module
    name: str
    calls: list[tuple[str, bool, Any]] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    positionwise: bool = True

    def start(self) -> Call:
        object.__setattr__(self.layer, self.name, self)
        return lambda: object.__delattr__(self.layer, self.name)

    @property
    def module(self) -> nn.Module:
        module: nn.Module = self.layer[self.name]
        return module

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        self.positionwise &= not args and not kwargs

        def noting(name: str, child: nn.Module) -> Call:
            def call(argument: mx.array) -> mx.array:
                result: mx.array = child(argument)
                self.calls.append((name, argument is x, result))
                return result

            return call

        children = {name: noting(name, child) for name, child in self.module.children().items() if is_linear(child)}
        with replaced_children(self.module, children):
            self.results.append(self.module(x, *args, **kwargs))
        return self.results[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def block(self) -> Block | None:
        """The module's parts; None unless every product was computed once, from the input or as the result."""
        names = [name for name, _, _ in self.calls]
        if len(self.results) != 1 or len(set(names)) < len(names) or len(names) < 2:
            return None
        *first, (last, _, result) = self.calls
        if result is not self.results[0] or not all(of_input for _, of_input, _ in first):
            return None
        linears = {name for name, child in self.module.children().items() if is_linear(child)}
        if linears != set(names):
            return None
        return Block(self.module, tuple(names[:-1]), last, self.positionwise)


def is_linear(module: Any) -> bool:
    """Whether a module multiplies with a matrix of weights, alone or as the `linear` of a module with an adapter."""
    return isinstance(getattr(module, "linear", module), (nn.Linear, nn.QuantizedLinear, *SPLIT))


def _has_linears(child: Any) -> bool:
    return isinstance(child, nn.Module) and any(is_linear(part) for part in child.children().values())
