"""A stand-in of Go's text/template, as much of it as Modelfiles here are written in: a template and its data → the text that it writes.

Text, `if`, `range` over a list, variables and six functions; anything else is a `ValueError`. The language is described at
https://pkg.go.dev/text/template.
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
"""A word, or a function and its arguments."""

Variables = ChainMap[str, Any]
"""A map for each block that is open, the innermost first. `$` is the data."""


def render(source: str, data: dict[str, Any]) -> str:
    """The text that a template writes; raises `ValueError` where it has what is not known here."""
    nodes, end = _block(_items(source))
    if end:
        raise ValueError(f"{' '.join(end)} without a beginning")
    return _written(nodes, data, ChainMap({"$": data}))


@dataclass(frozen=True, slots=True)
class _Value:
    expression: Expression


@dataclass(frozen=True, slots=True)
class _Assignment:
    """`$name := value` declares a variable until the end of its block; `$name = value` changes an existing one."""

    name: str
    expression: Expression
    declares: bool


@dataclass(frozen=True, slots=True)
class _If:
    condition: Expression
    then: list[_Node]
    otherwise: list[_Node]


@dataclass(frozen=True, slots=True)
class _Range:
    index: str
    element: str
    over: Expression
    body: list[_Node]


_Node = str | _Value | _Assignment | _If | _Range


def _items(source: str) -> Iterator[str | list[str]]:
    """Texts, and the words of actions."""
    for number, item in enumerate(_ACTION.split(source)):
        if number % 2:
            yield _words(item.rstrip())
        elif "{{" in item:
            raise ValueError("an action without an end")
        elif item:
            yield item


def _words(action: str) -> list[str]:
    words, position = [], 0
    while position < len(action):
        word = _WORD.match(action, position)
        if word is None:
            raise ValueError(f"not understood: {action[position:]}")
        words.append(word[1])
        position = word.end()
    return words


def _block(items: Iterator[str | list[str]]) -> tuple[list[_Node], list[str]]:
    """The nodes up to an `end` or `else`, and that action; nothing at the end of the template."""
    nodes: list[_Node] = []
    for item in items:
        match item:
            case str():
                nodes.append(item)
            case ["end"] | ["else", *_]:
                return nodes, item
            case ["if", *condition]:
                nodes.append(_if(condition, items))
            case ["range", index, ",", element, ":=", *over]:
                nodes.append(_Range(index, element, _expression(iter(over)), _closed(items)))
            case [name, ":=" | "=" as sign, *value] if name.startswith("$"):
                nodes.append(_Assignment(name, _expression(iter(value)), declares=sign == ":="))
            case _:
                nodes.append(_Value(_expression(iter(item))))
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
    return _If(_expression(iter(condition)), then, otherwise)


def _closed(items: Iterator[str | list[str]]) -> list[_Node]:
    nodes, end = _block(items)
    if end != ["end"]:
        raise ValueError("a block without an end")
    return nodes


def _expression(words: Iterator[str], in_parentheses: bool = False) -> Expression:
    """Words up to the parenthesis that closes them, or all of them."""
    operands: list[Expression] = []
    closed = False
    for word in words:
        if word == ")":
            closed = True
            break
        operands.append(_expression(words, in_parentheses=True) if word == "(" else word)
    if not operands or closed != in_parentheses:
        raise ValueError("an action without words, or with parentheses that do not match")
    return tuple(operands)


def _written(nodes: list[_Node], dot: Any, variables: Variables) -> str:
    written: list[str] = []
    for node in nodes:
        match node:
            case str():
                written.append(node)
            case _Value():
                written.append(str(_value(node.expression, dot, variables)))
            case _Assignment():
                scopes = variables.maps[:1] if node.declares else [s for s in variables.maps if node.name in s]
                scopes[0][node.name] = _value(node.expression, dot, variables)
            case _If():
                chosen = node.then if _value(node.condition, dot, variables) else node.otherwise
                written.append(_written(chosen, dot, variables.new_child()))
            case _Range():
                for index, element in enumerate(_value(node.over, dot, variables)):
                    inner = variables.new_child({node.index: index, node.element: element})
                    written.append(_written(node.body, element, inner))
    return "".join(written)


def _value(expression: Expression, dot: Any, variables: Variables) -> Any:
    match expression:
        case str():
            return _word(expression, dot, variables)
        case (single,):
            return _value(single, dot, variables)
        case (function, *operands) if isinstance(function, str) and function in _FUNCTIONS:
            return _FUNCTIONS[function](*(_value(operand, dot, variables) for operand in operands))
    raise ValueError(f"no function {expression[0]}")


def _word(word: str, dot: Any, variables: Variables) -> Any:
    if word.startswith('"'):
        return word[1:-1]
    if word in _CONSTANTS:
        return _CONSTANTS[word]
    if word.isdecimal():
        return int(word)
    base, _, field = word.partition(".")  # `.Field` of the dot, `$.Field` of the data, `$name`
    if base and base not in variables:
        raise ValueError(f"no variable {word}")
    value = variables[base] if base else dot
    return value[field] if field else value


_CONSTANTS = {"true": True, "false": False}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "not": lambda value: not value,
    "eq": lambda one, other: one == other,
    "ne": lambda one, other: one != other,
    "len": len,
    "slice": lambda values, start: values[start:],
}
