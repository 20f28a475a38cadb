"""A chat template with calls put into its syntax tree that tell which message is being written.

    {% for message in messages %}           {{ loop_starts() }}{% for message in messages %}{{ loop_item(message) }}
      ...                               →     ...
    {% endfor %}                            {% endfor %}{{ loop_ends() }}

What the calls do is said in `trace`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from jinja2 import Template, nodes
from jinja2.visitor import NodeTransformer

from mlx_sft.data.sandbox import compiled, parsed

LOOP_STARTS = "mlx_sft_loop_starts"
LOOP_ITEM = "mlx_sft_loop_item"
RANGE_ITEM = "mlx_sft_range_item"
LOOP_ENDS = "mlx_sft_loop_ends"
ASSIGNED = "mlx_sft_assigned"
TAG_STARTS = "mlx_sft_tag_starts"
TAG_ENDS = "mlx_sft_tag_ends"
APPENDED = "mlx_sft_appended"
PRINTED = "mlx_sft_printed"


@dataclass(frozen=True, slots=True)
class Variant:
    """What is traced of a template.

    Args:
        loops: Loops over messages.
        captured: Also inside of macros and set blocks, whose text the template may change before it prints it.
        variables: Also what goes through variables: `{% set message = messages[i] %}` inside a loop, text that is written
            later (`ns.text = ns.text + ...`), arguments of macros, `range` over messages.
    """

    loops: bool = True
    captured: bool = True
    variables: bool = False


VARIANTS = (
    Variant(),
    Variant(captured=False),
    Variant(variables=True),
    Variant(loops=False, captured=False),
)
"""The plainest first; with the last, the conversation's prefixes alone tell whose each character is."""


@lru_cache(maxsize=64)
def traced(source: str, variant: Variant, name: str = "this tokenizer") -> Template:
    """The template with calls that trace this, in the environment of all its renderings; the result is kept."""
    environment = compiled(source, name).environment
    return environment.from_string(_InsertCalls(variant).visit(environment.parse(source)))


@lru_cache(maxsize=16)
def string_constants(source: str) -> frozenset[str]:
    """The strings that the template's code holds, such as `</think>`."""
    constants = (node.value for node in parsed(source).find_all(nodes.Const))
    return frozenset(value for value in constants if isinstance(value, str))


@lru_cache(maxsize=16)
def has_tags(source: str) -> bool:
    """Whether the template's author tagged what is generated."""
    return any(_is_tag(block) for block in parsed(source).find_all(nodes.CallBlock))


def _is_tag(block: nodes.CallBlock) -> bool:
    """{% generation %} is what transformers' extension makes this call block of."""
    called = block.call.node
    return isinstance(called, nodes.ExtensionAttribute) and called.name == "_generation_support"


def _call(function: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.Name(function, "load"), list(arguments), [], None, None)


def _output(call: nodes.Call, line: int) -> nodes.Node:
    return nodes.Output([call]).set_lineno(line)


class _InsertCalls(NodeTransformer):
    def __init__(self, variant: Variant) -> None:
        self._variant = variant
        self._depth = 0

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:  # noqa: N802 (the visitor's name for it)
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1
        if not self._variant.loops:
            return [node]
        is_range = isinstance(node.iter, nodes.Call) and _is_name(node.iter.node, "range")
        function = RANGE_ITEM if self._variant.variables and is_range else LOOP_ITEM
        node.body.insert(0, _output(_call(function, *_names([node.target])), node.lineno))
        return [_output(_call(LOOP_STARTS), node.lineno), node, _output(_call(LOOP_ENDS), node.lineno)]

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        if not self._variant.captured:
            return node
        self._depth += 1
        self.generic_visit(node)
        self._depth -= 1
        if self._variant.variables:
            line = node.lineno
            item = _output(_call(LOOP_ITEM, *_names(node.args)), line)
            node.body = [_output(_call(LOOP_STARTS), line), item, *node.body, _output(_call(LOOP_ENDS), line)]
        return node

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if _is_tag(node):
            starts, ends = (_output(_call(name), node.lineno) for name in (TAG_STARTS, TAG_ENDS))
            node.body = [starts, *node.body, ends]
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:  # noqa: N802
        return self.generic_visit(node) if self._variant.captured else node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node | list[nodes.Node]:  # noqa: N802
        if not self._variant.variables:
            return node
        self.generic_visit(node)
        if added := _appended_to(node.target, node.node):
            node.node = _call(APPENDED, *added)
        if self._depth == 0 or not isinstance(node.target, nodes.Name):
            return node
        return [node, _output(_call(ASSIGNED, nodes.Name(node.target.name, "load")), node.lineno)]

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        if self._variant.variables:
            self.generic_visit(node)
            node.nodes = [
                part if isinstance(part, nodes.TemplateData | nodes.Const) else _call(PRINTED, part)
                for part in node.nodes
            ]
        return node


def _names(targets: Sequence[nodes.Node]) -> list[nodes.Expr]:
    found = [
        name for target in targets for name in (target, *target.find_all(nodes.Name)) if isinstance(name, nodes.Name)
    ]
    return [nodes.Name(name.name, "load") for name in found]


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


def _appended_to(target: nodes.Node, value: nodes.Node) -> tuple[nodes.Expr, nodes.Expr] | None:
    """`(x, rest)` where the value that `x` is set to is `x + rest` or `x ~ rest`."""
    if isinstance(value, nodes.Concat) and len(value.nodes) > 1:
        first, *others = value.nodes
        rest: nodes.Expr = nodes.Concat(others)
    elif isinstance(value, nodes.Add):
        first, rest = value.left, value.right
        if deeper := _appended_to(target, first):
            return deeper[0], nodes.Add(deeper[1], rest)
    else:
        return None
    return (first, rest) if _is_target(first, target) else None


def _is_target(node: nodes.Node, target: nodes.Node) -> bool:
    if isinstance(target, nodes.NSRef):
        return isinstance(node, nodes.Getattr) and _is_name(node.node, target.name) and node.attr == target.attr
    return isinstance(target, nodes.Name) and _is_name(node, target.name)
