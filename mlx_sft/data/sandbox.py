"""Chat templates with limits: they come with a downloaded model, and may be broken or hostile.

    compiled(source, "Qwen/Qwen3-0.6B").render(messages=..., ...)

writes what transformers' own environment writes, or raises `TemplateStopped`. The environment is Jinja's immutable sandbox. Each turn of
a loop, call, filter and operator looks at the clock, and at the size of what it reads and makes; what can multiply (`'a' * n`,
`separator.join(items)`) is refused before it is done. No signal and no second thread is needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from functools import lru_cache, wraps
from inspect import signature
from types import BuiltinMethodType
from typing import Any, NoReturn, cast

from jinja2 import Template, nodes, pass_context
from jinja2.compiler import CodeGenerator
from jinja2.runtime import Macro, markup_join, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import _PassArg
from jinja2.visitor import NodeTransformer

from mlx_sft.data.template_limits import (
    METER,
    ONE_THING,
    SHALLOW,
    TEXTS,
    TOO_LARGE,
    UNIT,
    Meter,
    TemplateStopped,
)

MOST_SOURCE = 1 << 17
"""Characters of a template's source; a real one has fewer than 50,000."""
MOST_PYTHON = 1 << 21
"""Characters of the Python code that a template becomes: a block that is scoped names every variable."""
_NOT_COMPILED = "it is nested too deeply, or holds a number that is too large"
_COMPILER_LIMITS = (RecursionError, MemoryError, SyntaxError, ValueError)
"""Of Python: it takes twenty loops one in another, and numbers of 4,300 digits."""

_TICK, _READ, _MADE, _CONCATENATED = "bounded tick", "bounded read", "bounded made", "bounded concatenated"
_WIDE_DATE = re.compile(r"%[^A-Za-z%]*\d{3}")
_MOST_DATE = 1000

_METHODS_OF_OBJECTS = frozenset(dir(dict))
_KEYS = (str, int)
_WITH_METHODS = (str, bytes, int, list, tuple)
_OF_JINJA = frozenset({"_loop_vars", "_block_vars"})


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
    """A template's syntax tree as transformers would parse it; raises as `compiled` does."""
    return _environment("this tokenizer").parse(source)


def _environment(owner: str) -> BoundedEnvironment:
    from transformers.utils.chat_template_utils import _compile_jinja_template  # slow to import

    original = _compile_jinja_template("").environment
    environment = BoundedEnvironment(
        trim_blocks=original.trim_blocks,
        lstrip_blocks=original.lstrip_blocks,
        keep_trailing_newline=original.keep_trailing_newline,
        extensions=[type(extension) for extension in original.iter_extensions()],
        optimized=False,  # folding runs operators and filters on constants while it compiles, where nothing counts
        finalize=_read,  # of all that is written
    )
    environment.owner = owner
    environment.filters = {name: _checked(function, name) for name, function in original.filters.items()}
    environment.filters |= {_TICK: _tick, _READ: _read, _MADE: _made, _CONCATENATED: _concatenated}
    environment.tests = {
        # A test of one value looks at its kind.
        name: _checked(function, "test") if len(signature(function).parameters) > 1 else function
        for name, function in original.tests.items()
    }
    environment.globals = dict(original.globals)
    environment.globals["strftime_now"] = _bounded_strftime(original.globals["strftime_now"])
    del environment.globals["lipsum"]  # placeholder text of any length, for which no conversation has a use
    return environment


# All with the context, so that none is called while a template is compiled.


@pass_context
def _tick(context: Any, size: int) -> bool:
    METER.get().spend(abs(size))
    return True


@pass_context
def _read(context: Any, value: Any) -> Any:
    return METER.get().read(value)


@pass_context
def _made(context: Any, value: Any) -> Any:
    return METER.get().made(value)


@pass_context
def _concatenated(context: Any, pieces: tuple[Any, ...]) -> Any:
    meter = METER.get()
    for piece in pieces:
        meter.read(piece)
    return meter.made(markup_join(pieces) if context.eval_ctx.autoescape else str_join(pieces))


def _checked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A filter or a test that is checked by its name before it is called."""
    passed = _PassArg.from_obj(function)

    @pass_context
    @wraps(function)
    def checked(context: Any, *values: Any, **named: Any) -> Any:
        meter = METER.get()
        if name in ONE_THING:
            meter.read((*values[1:], *named.values()))
        else:
            meter.check_call(name, values, named.values())
            if name not in SHALLOW:
                values = meter.read_later(values)
        if passed is _PassArg.context:
            values = (context, *values)
        elif passed is not None:
            values = (context.eval_ctx if passed is _PassArg.eval_context else context.environment, *values)
        return meter.made(function(*values, **named))

    return checked


def _bounded_strftime(function: Callable[[str], str]) -> Callable[[str], str]:
    """The C library pads a date to whatever width it is told."""

    def strftime_now(format: str) -> str:
        if len(format) > _MOST_DATE or _WIDE_DATE.search(format):
            METER.get().stop(TOO_LARGE)
        return function(format)

    return strftime_now


class _CodeGenerator(CodeGenerator):
    environment: BoundedEnvironment
    written = 0

    def write(self, x: str) -> None:
        self.written += len(x)
        if self.written > MOST_PYTHON:
            self.environment.stop("it is too long")
        super().write(x)


class BoundedTemplate(Template):
    """A template of a `BoundedEnvironment`."""

    environment: BoundedEnvironment

    def render(self, *args: Any, **kwargs: Any) -> str:
        meter = Meter(self.environment.owner, dict(*args, **kwargs))
        token = METER.set(meter)
        try:
            text = super().render(*args, **kwargs)
            meter.check_text(len(text))
            return text
        finally:
            METER.reset(token)
            meter.close()


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which everything that a template does is counted.

    Attributes:
        owner: Whose templates these are.
    """

    code_generator_class = _CodeGenerator
    template_class = BoundedTemplate
    intercepted_binops = frozenset({"+", "-", "*", "**", "%"})
    owner = "this tokenizer"

    def stop(self, reason: str) -> NoReturn:
        raise TemplateStopped.because(self.owner, reason)

    @contextmanager
    def _compiler_limits(self, source: Any) -> Iterator[None]:
        if isinstance(source, str) and len(source) > MOST_SOURCE:
            self.stop(f"it is longer than {MOST_SOURCE:,} characters")
        try:
            yield
        except _COMPILER_LIMITS:
            self.stop(_NOT_COMPILED)

    def parse(self, source: str, name: str | None = None, filename: str | None = None) -> nodes.Template:
        with self._compiler_limits(source):
            return super().parse(source, name, filename)

    def from_string(self, source: str | nodes.Template, *args: Any, **kwargs: Any) -> Template:
        with self._compiler_limits(source):
            return super().from_string(source, *args, **kwargs)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_InsertChecks().visit(source), *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        # The same of an object from JSON, without an exception for each of its keys.
        if type(obj) is dict and attribute not in _METHODS_OF_OBJECTS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, argument if type(argument) in _KEYS else METER.get().read(argument))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = METER.get()
        if operator == "+":
            return meter.made(left + right)
        if operator == "%" and isinstance(left, TEXTS):
            meter.check_call("format", (left, right))
        elif operator == "-":
            meter.read((left, right))
        elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            meter.check_number(bits + right.bit_length() if operator == "*" else bits * right)
        elif operator == "*":
            sequence, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(sequence, Sized) and isinstance(times, int):
                meter.check_text(len(sequence) * times)
        return meter.made(self.binop_table[operator](left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        meter = METER.get()
        if isinstance(__obj, Macro):
            meter.spend(UNIT * (1 + len(args) + len(kwargs)))
            return meter.made(super().call(__context, __obj, *args, **kwargs))
        own = {name: value for name, value in kwargs.items() if name not in _OF_JINJA}
        method = getattr(__obj, "__wrapped__", __obj)  # of the sandbox's own `format`
        owner = getattr(method, "__self__", None)
        if isinstance(owner, _WITH_METHODS):
            meter.check_call(method.__name__, (owner, *args), own.values())
        else:
            meter.read((*args, *own.values()))
        args = meter.read_later(args)
        if type(__obj) is BuiltinMethodType:  # nothing of Jinja's, and nothing that it would refuse
            return meter.made(__obj(*args, **own))
        return meter.made(super().call(__context, __obj, *args, **kwargs))


class _InsertChecks(NodeTransformer):
    """Put filters into a syntax tree where Jinja has no hook: loops, comparisons, `~`, slices and keys of objects.

    {% for message in messages %}     →     {% for message in messages %}{% do 16 | tick %}
      {{ text ~ message.content }}            {{ (text, message.content) | concatenated }}
    {% endfor %}                            {% endfor %}
    """

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (the visitor's name for it)
        size = UNIT + sum(len(data.data) for part in node.body for data in _data(part))
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(_filtered(nodes.Const(UNIT), _TICK), node.test)
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(size), _TICK)).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.Tuple(node.nodes, "load"), _CONCATENATED, node.lineno)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        sides: list[nodes.Compare | nodes.Operand] = [node, *node.ops]
        constant = [isinstance(side.expr, nodes.Const) for side in sides]
        for index in range(len(node.ops)):
            if not (constant[index] or constant[index + 1]):  # comparing with a constant is quick
                for side in sides[index : index + 2]:
                    side.expr = _filtered(side.expr, _READ)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(node, _MADE) if isinstance(node.arg, nodes.Slice) else node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.key = _filtered(node.key, _READ)
        return node


def _filtered(node: nodes.Expr, name: str, line: int | None = None) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno if line is None else line)


def _data(node: nodes.Node) -> list[nodes.TemplateData]:
    return [node] if isinstance(node, nodes.TemplateData) else list(node.find_all(nodes.TemplateData))
