"""The part of Go's text/template that our Modelfiles are written in: a template's text and its data → what it writes.

Text, `if`, `range` over a list, variables, and the functions below. Anything else is an error: nothing else is ever written here.
Knows nothing of Ollama, nor of chats. The language: https://pkg.go.dev/text/template
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

_ACTION = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_WORD = re.compile(r'\s*("[^"\\]*"|:=|[=(),]|[$.\w]+)')

Expression = str | tuple["Expression", ...]
"""A word, or words in parentheses: a function and its arguments."""


def literal(text: str) -> str:
    """Text as a template writes it: a brace, which might begin an action, becomes a constant."""
    return text.replace("{", '{{ "{" }}')


def render(source: str, data: dict[str, Any]) -> str:
    """What a template writes.

    Raises:
        ValueError: Where the template has what is not known here.
    """
    nodes, end = _block(_items(source))
    if end:
        raise ValueError(f"{' '.join(end)} without a beginning")
    scope = _Scope(data, data, ChainMap())
    return "".join(text for node in nodes for text in node.write(scope))


@dataclass(frozen=True, slots=True)
class _Scope:
    """What a name means: `$` is the root, `.` the dot."""

    root: Any
    dot: Any
    variables: ChainMap[str, Any]

    def inner(self, dot: Any) -> _Scope:
        return _Scope(self.root, dot, self.variables.new_child())

    def value(self, expression: Expression) -> Any:
        if isinstance(expression, str):
            return self._word(expression)
        if len(expression) == 1:
            return self.value(expression[0])
        function, *operands = expression
        if not isinstance(function, str) or function not in _FUNCTIONS:
            raise ValueError(f"no function {function}")
        return _FUNCTIONS[function](*map(self.value, operands))

    def _word(self, word: str) -> Any:
        if word.startswith('"'):
            return word[1:-1]
        if word in _CONSTANTS:
            return _CONSTANTS[word]
        if word.isdecimal():
            return int(word)
        base, _, field = word.partition(".")
        if base not in ("", "$") and not (base in self.variables and not field):
            raise ValueError(f"no variable {word}")
        if base and not field:
            return self.variables[base]
        return (self.root if base == "$" else self.dot)[field]


@dataclass(frozen=True, slots=True)
class _Text:
    text: str

    def write(self, scope: _Scope) -> Iterator[str]:
        yield self.text


@dataclass(frozen=True, slots=True)
class _Value:
    expression: Expression

    def write(self, scope: _Scope) -> Iterator[str]:
        yield str(scope.value(self.expression))


@dataclass(frozen=True, slots=True)
class _Assignment:
    """`$name := value` declares a variable until the end of its block; `$name = value` changes the one that there is."""

    name: str
    expression: Expression
    declares: bool

    def write(self, scope: _Scope) -> Iterator[str]:
        maps = scope.variables.maps
        home = maps[0] if self.declares else next(known for known in maps if self.name in known)
        home[self.name] = scope.value(self.expression)
        yield ""


@dataclass(frozen=True, slots=True)
class _If:
    condition: Expression
    then: list[_Node]
    otherwise: list[_Node]

    def write(self, scope: _Scope) -> Iterator[str]:
        inner = scope.inner(scope.dot)
        for node in self.then if scope.value(self.condition) else self.otherwise:
            yield from node.write(inner)


@dataclass(frozen=True, slots=True)
class _Range:
    index: str
    element: str
    over: Expression
    body: list[_Node]

    def write(self, scope: _Scope) -> Iterator[str]:
        for index, element in enumerate(scope.value(self.over)):
            inner = scope.inner(element)
            inner.variables.update({self.index: index, self.element: element})
            for node in self.body:
                yield from node.write(inner)


_Node = _Text | _Value | _Assignment | _If | _Range


def _items(source: str) -> Iterator[str | list[str]]:
    """Texts, and the words of actions."""
    for number, item in enumerate(_ACTION.split(source)):
        if number % 2:
            yield _words(item)
        elif "{{" in item:
            raise ValueError("an action without an end")
        elif item:
            yield item


def _words(action: str) -> list[str]:
    words, position = [], 0
    action = action.rstrip()
    while position < len(action):
        word = _WORD.match(action, position)
        if word is None:
            raise ValueError(f"not understood: {action[position:]}")
        words.append(word[1])
        position = word.end()
    return words


def _block(items: Iterator[str | list[str]]) -> tuple[list[_Node], list[str]]:
    """The nodes up to an `end` or `else`, and that; up to the end of the template, nothing."""
    nodes: list[_Node] = []
    for item in items:
        match item:
            case str():
                nodes.append(_Text(item))
            case ["end"] | ["else", *_]:
                return nodes, item
            case ["if", *condition]:
                nodes.append(_if(condition, items))
            case ["range", index, ",", element, ":=", *over]:
                nodes.append(_Range(index, element, _expression(over), _closed(items)))
            case [name, ":=" | "=" as sign, *value] if name.startswith("$"):
                nodes.append(_Assignment(name, _expression(value), declares=sign == ":="))
            case _:
                nodes.append(_Value(_expression(item)))
    return nodes, []


def _if(condition: list[str], items: Iterator[str | list[str]]) -> _If:
    then, end = _block(items)
    otherwise: list[_Node] = []
    if end[:2] == ["else", "if"]:
        otherwise = [_if(end[2:], items)]
    elif end == ["else"]:
        otherwise = _closed(items)
    elif end != ["end"]:
        raise ValueError("an if without an end")
    return _If(_expression(condition), then, otherwise)


def _closed(items: Iterator[str | list[str]]) -> list[_Node]:
    nodes, end = _block(items)
    if end != ["end"]:
        raise ValueError("a block without an end")
    return nodes


def _expression(words: list[str]) -> Expression:
    expression, rest = _operands(words)
    if rest or not expression:
        raise ValueError(f"not understood: {' '.join(words)}")
    return expression


def _operands(words: list[str]) -> tuple[tuple[Expression, ...], list[str]]:
    """Words up to the parenthesis that closes them, or to the end; and those that follow."""
    operands: list[Expression] = []
    while words and words[0] != ")":
        word, *words = words
        if word == "(":
            inner, words = _operands(words)
            operands.append(inner)
            if not words:
                raise ValueError("a parenthesis without an end")
            words = words[1:]
        else:
            operands.append(word)
    return tuple(operands), words


def _and(*values: Any) -> Any:
    return next((value for value in values if not value), values[-1])


_CONSTANTS = {"true": True, "false": False}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "and": _and,
    "not": lambda value: not value,
    "eq": lambda one, other: one == other,
    "ne": lambda one, other: one != other,
    "len": len,
    "slice": lambda values, start: values[start:],
}
