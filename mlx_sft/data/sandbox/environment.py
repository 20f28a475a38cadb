"""transformers' environment of chat templates, with limits: the same text, or `TemplateStopped`.

    compiled(source, "Qwen/Qwen3-0.6B").render(messages=..., ...)

Filters, tests, globals and extensions are transformers' own. The limits need no signal and no second thread. Knows how Jinja
compiles and calls; knows nothing of conversations.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, MutableMapping
from functools import lru_cache
from types import BuiltinMethodType, CodeType, FunctionType, MethodType
from typing import Any, NoReturn, cast

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mlx_sft.data.sandbox import limits
from mlx_sft.data.sandbox.filters import COUNTING, checked, priced_filter, reading_test
from mlx_sft.data.sandbox.limits import MOST_SOURCE, STEP, TOO_LARGE, Meter, TemplateStopped
from mlx_sft.data.sandbox.prices import FREE_FILTERS, READING_TESTS, paid, spend_on, spend_on_repeating
from mlx_sft.data.sandbox.rewriting import rewritten

_COMPILER_LIMITS = (RecursionError, MemoryError, SyntaxError, ValueError)
"""Of Python: it takes twenty loops one in another, and numbers of 4,300 digits."""
_NOT_COMPILED = "it is nested too deeply, or holds a number that is too large"
_MOST_PYTHON = 1 << 21
"""Characters of the Python code that a template becomes."""
_MOST_WORDS = 100_000
_MOST_FORMAT = 1000
_WIDTH = re.compile(r"%[^A-Za-z%]*\d{3}")

_getattr = ImmutableSandboxedEnvironment.getattr
_METHODS_OF_OBJECTS = frozenset(dir(dict))
_PLAIN = frozenset({bool, dict, float, int, list, str, tuple})
"""Their methods need nothing of the environment."""
_CHEAP = frozenset({BlockReference, LoopContext, Macro})
"""What they do is counted where they do it."""
_READING_METHODS = frozenset({"changed", "fromkeys"})
_METHODS = (BuiltinMethodType, MethodType)
_LOOKED_UP = (dict, range)
_TEXTS = (str, bytes)
_SAFE_TEXTS = (str, type)
"""Whose methods are written in Python: text that is marked as safe, and its class."""


@lru_cache(maxsize=32)
def compiled(source: str, owner: str = "this tokenizer") -> BoundedTemplate:
    """A template that writes what transformers' own would write, within limits; the result is kept.

    Args:
        source: Compiled by nothing else before.
        owner: The model or tokenizer, for messages.

    Raises:
        TemplateStopped: where it is too long, or nested too deeply, to be compiled.
        jinja2.TemplateSyntaxError: where it is no template.
    """
    return cast("BoundedTemplate", _environment(owner).from_string(source))


def parsed(source: str) -> nodes.Template:
    """A template's syntax tree as transformers would parse it.

    Raises:
        TemplateStopped: where it is too long or nested too deeply.
        jinja2.TemplateSyntaxError: where it is no template.
    """
    return _environment("this tokenizer").parse(source)


def _environment(owner: str) -> BoundedEnvironment:
    from transformers.utils.chat_template_utils import _compile_jinja_template  # slow to import

    original = _compile_jinja_template("").environment
    environment = BoundedEnvironment(
        trim_blocks=original.trim_blocks,
        lstrip_blocks=original.lstrip_blocks,
        keep_trailing_newline=original.keep_trailing_newline,
        extensions=[type(extension) for extension in original.iter_extensions()],
        # Folding runs operators and filters on constants while it compiles, where nothing counts.
        optimized=False,
    )
    environment.owner = owner
    environment.tests = {
        name: reading_test(test) if name in READING_TESTS else test for name, test in original.tests.items()
    }
    for name, function in original.filters.items():
        environment.add_filter(name, function)
    environment.filters |= COUNTING
    environment.globals = dict(original.globals)
    environment.globals["strftime_now"] = _bounded_strftime(environment, original.globals["strftime_now"])
    environment.globals["lipsum"] = _bounded_lipsum(environment, original.globals["lipsum"])
    return environment


class _CodeGenerator(CodeGenerator):
    """A few words of a template can become much code: a block that is scoped names every variable."""

    environment: BoundedEnvironment
    written = 0

    def write(self, x: str) -> None:
        self.written += len(x)
        if self.written > _MOST_PYTHON:
            self.environment.stop("it is too long")
        super().write(x)


class BoundedContext(Context):
    """A rendering's variables, and its meter."""

    environment: BoundedEnvironment

    def __init__(
        self,
        environment: BoundedEnvironment,
        parent: dict[str, Any],
        name: str | None,
        blocks: dict[str, Callable[[Context], Iterator[str]]],
        globals: MutableMapping[str, Any] | None = None,
    ) -> None:
        super().__init__(environment, parent, name, blocks, globals)
        self.meter = Meter(environment.owner, parent)

    def derived(self, locals: dict[str, Any] | None = None) -> BoundedContext:
        context = cast("BoundedContext", super().derived(locals))
        context.meter = self.meter
        return context


class BoundedTemplate(Template):
    """A template of a `BoundedEnvironment`."""

    environment: BoundedEnvironment

    def render(self, *args: Any, **kwargs: Any) -> str:
        text = super().render(*args, **kwargs)
        if len(text) > limits.MOST_TEXT:
            Meter(self.environment.owner, dict(*args, **kwargs)).check_text(len(text))
        return text


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which everything that a template does is counted.

    Attributes:
        owner: Whose templates these are.
    """

    code_generator_class = _CodeGenerator
    context_class = BoundedContext
    template_class = BoundedTemplate
    intercepted_binops = frozenset({"*", "**", "%"})
    owner = "this tokenizer"

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Add a filter, or replace one; what it does is counted by its name."""
        self.filters = {**self.filters, name: function if name in FREE_FILTERS else priced_filter(name, function)}

    def stop(self, reason: str) -> NoReturn:
        raise TemplateStopped.because(self.owner, reason)

    # Compiling

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > MOST_SOURCE:
            self.stop(f"it is longer than {MOST_SOURCE:,} characters")
        try:
            return super()._parse(source, name, filename)
        except _COMPILER_LIMITS:
            self.stop(_NOT_COMPILED)

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        try:
            return super()._generate(rewritten(source), name, filename, defer_init)
        except _COMPILER_LIMITS:
            self.stop(_NOT_COMPILED)

    def _compile(self, source: str, filename: str) -> CodeType:
        try:
            return super()._compile(source, filename)
        except _COMPILER_LIMITS:
            self.stop(_NOT_COMPILED)

    # Running

    def getattr(self, obj: Any, attribute: str) -> Any:
        # The same of an object from JSON, without an exception for each of its keys: this is what pays for counting.
        if type(obj) is dict and attribute not in _METHODS_OF_OBJECTS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return _getattr(self, obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter: Meter = context.meter
        if operator == "%":
            if type(left) is int and type(right) is int:
                return left % right
            if isinstance(left, str | bytes):
                spend_on(meter, "format", (left, right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            bits = bits + right.bit_length() if operator == "*" else bits * right
            meter.check_bits(bits)
            meter.spend(STEP + abs(bits))
        elif operator == "*":
            spend_on_repeating(meter, left, right)
        return checked(meter, self.binop_table[operator](left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        meter: Meter = __context.meter
        kind = type(__obj)
        owner = getattr(__obj, "__self__", None)
        if kind is BuiltinMethodType:
            kwargs.pop("_loop_vars", None)
            kwargs.pop("_block_vars", None)
            name = __obj.__name__
            if isinstance(owner, _LOOKED_UP):
                spend_on(meter, "", (*args, *kwargs.values()))
            else:
                spend_on(meter, name, (owner, *args, *kwargs.values()))
            if type(owner) is not str or name == "join":
                args = paid(meter, args, len(owner) + 1 if isinstance(owner, _TEXTS) else 1)
            if type(owner) in _PLAIN:
                return checked(meter, __obj(*args, **kwargs))
        elif isinstance(owner, _SAFE_TEXTS):
            spend_on(meter, __obj.__name__, (owner, *args, *_own(kwargs).values()))
            args = paid(meter, args, len(owner) + 1 if isinstance(owner, str) else 1)
        elif kind is FunctionType and isinstance(method := getattr(__obj, "__wrapped__", None), _METHODS):
            # The sandbox's own `format`.
            spend_on(meter, method.__name__, (method.__self__, *args, *_own(kwargs).values()))
        elif isinstance(owner, Extension):
            meter.look()  # transformers' puts together all that is written so far
        elif kind in _CHEAP or (kind is MethodType and __obj.__name__ not in _READING_METHODS):
            meter.spend(STEP * (1 + len(args) + len(kwargs)))
        else:
            spend_on(meter, "", args if kind is type else (*args, *_own(kwargs).values()))
            args = paid(meter, args)
        return checked(meter, super().call(__context, __obj, *args, **kwargs))


def _bounded_strftime(environment: BoundedEnvironment, function: Callable[[str], str]) -> Callable[[str], str]:
    """The C library pads a date to whatever width it is told."""

    def strftime_now(format: str) -> str:
        if len(format) > _MOST_FORMAT or _WIDTH.search(format):
            environment.stop(TOO_LARGE)
        return function(format)

    return strftime_now


def _bounded_lipsum(environment: BoundedEnvironment, function: Callable[..., str]) -> Callable[..., str]:
    def lipsum(n: int = 5, html: bool = True, min: int = 20, max: int = 100) -> str:
        if n * max > _MOST_WORDS:
            environment.stop(TOO_LARGE)
        return function(n, html, min, max)

    return lipsum


def _own(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without what Jinja hands on to its own functions."""
    return {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
