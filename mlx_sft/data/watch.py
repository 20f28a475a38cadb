"""A chat template, watched while it writes: which message is each character of its output from?

Knows Jinja; knows nothing of turns, roles or tokens.

The template's syntax tree is instrumented so that its loops over messages leave private-use marker characters:

    {% for message in messages %}           <M0>             <M1>                        <end>
      <|im_start|>role                  →   <|im_start|>user <|im_start|>assistant
      content<|im_end|>                     hello<|im_end|>  hi there<|im_end|>
    {% endfor %}

A character belongs to the innermost loop item that is, by identity, a message. Nothing is printed where the owner does
not change, so that loops over tool calls or text parts leave no trace.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from jinja2 import Environment, Template, nodes
from jinja2.visitor import NodeTransformer
from numpy.typing import NDArray

NOBODY = -1
"""The owner of what no message wrote."""

Integers = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Alphabet:
    """Private-use characters that a text does not hold: `size` markers from `base` on, and as many colours after them."""

    base: int
    size: int

    @classmethod
    def absent_from(cls, text: str, messages: int) -> Alphabet | None:
        """An alphabet for so many messages, or None where the text leaves no room for one."""
        taken = {ord(character) for character in set(text) if character >= chr(_PRIVATE_PLANES[0].start)}
        size = messages + 1
        for plane in _PRIVATE_PLANES:
            for base in range(plane.start, plane.stop - 2 * size, 2 * size):
                if taken.isdisjoint(range(base, base + 2 * size)):
                    return cls(base, size)
        return None

    def marker(self, index: int) -> str:
        """Says: from here on message `index` writes (or `NOBODY`)."""
        return chr(self.base + index + 1)

    def colour(self, index: int) -> str:
        """Stands for a letter of message `index`."""
        return chr(self.base + self.size + index)

    def colours(self, code_points: NDArray[np.uint32]) -> Integers:
        """The message that each character is a colour of, `NOBODY` for other characters."""
        index = code_points.astype(np.int64) - (self.base + self.size)
        return np.where((index >= 0) & (index < self.size), index, NOBODY).astype(np.int32)

    def owners(self, marked: str) -> tuple[str, Integers]:
        """The text without its markers, and the owner of each of its characters."""
        pieces = re.split(f"([{chr(self.base)}-{chr(self.base + self.size - 1)}])", marked)
        texts = pieces[::2]
        owners = [NOBODY, *(ord(marker) - self.base - 1 for marker in pieces[1::2])]
        return "".join(texts), np.repeat(np.array(owners, np.int32), [len(text) for text in texts])


_PRIVATE_PLANES = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))


@dataclass(frozen=True, slots=True)
class WatchedTemplate:
    """A template compiled in each variant of watching, the most exact first."""

    variants: tuple[Template, ...]
    constants: re.Pattern[str]
    """Splits a text at the strings that the template's own code holds, and keeps them."""


@lru_cache(maxsize=16)
def compile_watched(source: str) -> WatchedTemplate:
    """Parse and instrument a template; the result is kept."""
    # transformers' own sandbox, so that both renderings have the same filters and globals. Imported late: it is slow.
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment: Environment = _compile_jinja_template(source).environment
    variants = tuple(
        environment.from_string(transform().visit(environment.parse(source)))
        for transform in (_WatchLoops, _WatchLoopsAndAssignments)
    )
    constants = {node.value for node in environment.parse(source).find_all(nodes.Const)}
    strings = [re.escape(value) for value in constants if isinstance(value, str) and value.strip()]
    strings.sort(key=lambda value: (-len(value), value))
    return WatchedTemplate(variants, re.compile(f"({'|'.join(strings) or '(?!)'})"))


class Watch:
    """One rendering's inserted calls; they print a marker where the message that is being written changes.

    Args:
        messages: The very objects that the template is given.
        alphabet: Supplies the markers.
    """

    def __init__(self, messages: list[dict[str, Any]], alphabet: Alphabet) -> None:
        self._indices = {id(message): index for index, message in enumerate(messages)}
        self._alphabet = alphabet
        self._current = NOBODY
        self._outer: list[int] = []

    def functions(self) -> dict[str, Callable[..., str]]:
        """The variables that an instrumented template needs."""
        return {
            _LOOP_STARTS: self._loop_starts,
            _LOOP_ITEM: self._loop_item,
            _LOOP_ENDS: self._loop_ends,
            _ASSIGNED: self._assigned,
        }

    def _loop_starts(self) -> str:
        self._outer.append(self._current)
        return ""

    def _loop_item(self, *targets: Any) -> str:
        """An item that is no message is part of what surrounds the loop."""
        found = (self._indices[id(target)] for target in targets if id(target) in self._indices)
        return self._write(next(found, self._outer[-1]))

    def _loop_ends(self) -> str:
        return self._write(self._outer.pop())

    def _assigned(self, value: Any) -> str:
        return self._write(self._indices.get(id(value), self._current))

    def _write(self, index: int) -> str:
        if index == self._current:
            return ""
        self._current = index
        return self._alphabet.marker(index)


_LOOP_STARTS = "mlx_sft_loop_starts"
_LOOP_ITEM = "mlx_sft_loop_item"
_LOOP_ENDS = "mlx_sft_loop_ends"
_ASSIGNED = "mlx_sft_assigned"


def _call(function: str, names: list[str], line: int) -> nodes.Node:
    """`{{ function(*names) }}`"""
    arguments: list[nodes.Expr] = [nodes.Name(name, "load") for name in names]
    call = nodes.Call(nodes.Name(function, "load"), arguments, [], None, None)
    return nodes.Output([call]).set_lineno(line)


class _WatchLoops(NodeTransformer):
    """Calls around loops and at the start of their items."""

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:  # noqa: N802 (the visitor's name for it)
        self.generic_visit(node)
        targets = [node.target, *node.target.find_all(nodes.Name)]
        names = [target.name for target in targets if isinstance(target, nodes.Name)]
        node.body.insert(0, _call(_LOOP_ITEM, names, node.lineno))
        return [_call(_LOOP_STARTS, [], node.lineno), node, _call(_LOOP_ENDS, [], node.lineno)]


class _WatchLoopsAndAssignments(_WatchLoops):
    """Also a call after `{% set message = messages[i] %}` inside a loop, which may be over something else."""

    def __init__(self) -> None:
        self._depth = 0

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:  # noqa: N802
        self._depth += 1
        watched = super().visit_For(node)
        self._depth -= 1
        return watched

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node | list[nodes.Node]:  # noqa: N802
        if self._depth == 0 or not isinstance(node.target, nodes.Name):
            return node
        return [node, _call(_ASSIGNED, [node.target.name], node.lineno)]
