"""A chat template's syntax tree with filters put in that count what it does.

Knows Jinja's syntax; what the filters do, `filters` knows.

    {% for message in messages %}     →     {% for message in messages %}{% do 4|tick %}
      {{ text ~ message.content }}            {{ (text, message.content)|concatenated }}
    {% endfor %}                            {% endfor %}
"""

from __future__ import annotations

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from mlx_sft.data.sandbox.limits import STEP

# No template can write these names.
TICK = "bounded tick"
"""A turn of a loop, which costs so much; true."""
READ = "bounded read"
"""A value that is written out, compared or hashed as a whole."""
SEARCHED = "bounded searched"
"""A value in which another is looked for."""
MADE = "bounded made"
"""A value that has just been made."""
CONCATENATED = "bounded concatenated"
"""`a ~ b ~ c` of a tuple."""

_MOST_ADDED = 8
"""So many `+` in a row are counted as one."""


def rewritten(template: nodes.Template) -> nodes.Template:
    """The template, which is changed, with its loops, operators and outputs counted."""
    return _Rewriting().visit(template)  # type: ignore[no-any-return]


class _Rewriting(NodeTransformer):
    """Multiplication, powers and `%` are the environment's to intercept, as are calls and filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (the visitor's name for it)
        cost = STEP + sum(len(data.data) for statement in node.body for data in _data(statement))
        self.generic_visit(node)
        if isinstance(node.test, nodes.Expr):
            node.test = nodes.And(_filtered(nodes.Const(STEP), TICK), node.test)
        node.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(cost), TICK)).set_lineno(node.lineno))
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [part if isinstance(part, nodes.TemplateData) else _read(part) for part in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _filtered(nodes.Tuple(node.nodes, "load"), CONCATENATED, node.lineno)

    def visit_Add(self, node: nodes.Add) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if _is_number(node.left) or _is_number(node.right):
            return node
        sum_before = _made(node.left)
        if sum_before and _added(sum_before) < _MOST_ADDED:
            node.left = sum_before
        return _filtered(node, MADE)

    def visit_Sub(self, node: nodes.Sub) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if not (_is_number(node.left) or _is_number(node.right)):
            node.left, node.right = _read(node.left), _read(node.right)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        sides: list[nodes.Compare | nodes.Operand] = [node, *node.ops]
        for left, right in zip(sides, node.ops, strict=False):
            if right.op in ("in", "notin"):
                if not _is_constant(right.expr):
                    left.expr, right.expr = _read(left.expr), _filtered(right.expr, SEARCHED)
            elif not (_is_small(left.expr) or _is_small(right.expr)):
                left.expr, right.expr = _read(left.expr), _read(right.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _filtered(node, MADE)
        node.arg = _read(node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.key = _read(node.key)
        return node


def _filtered(node: nodes.Expr, name: str, line: int | None = None) -> nodes.Filter:
    line = node.lineno if line is None else line
    return nodes.Filter(node, name, [], [], None, None, lineno=line)


def _read(node: nodes.Expr) -> nodes.Expr:
    if _is_small(node) or (isinstance(node, nodes.Filter) and node.name == READ):
        return node
    # What is read as a whole need not be counted as made.
    return _filtered(_made(node) or node, READ)


def _made(node: nodes.Node) -> nodes.Expr | None:
    """What a node counts as made."""
    return node.node if isinstance(node, nodes.Filter) and node.name == MADE else None


def _is_number(node: nodes.Expr) -> bool:
    """Whether it is surely a number, or else an error."""
    if isinstance(node, nodes.Add | nodes.Sub):
        return _is_number(node.left) or _is_number(node.right)
    if isinstance(node, nodes.Filter):
        return node.name in ("length", "count")
    return isinstance(node, nodes.Const) and isinstance(node.value, int | float)


def _is_small(node: nodes.Expr) -> bool:
    """Whether it surely takes no time to read."""
    return isinstance(node, nodes.Const | nodes.Compare | nodes.Test | nodes.Not) or _is_number(node)


def _is_constant(node: nodes.Expr) -> bool:
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(isinstance(item, nodes.Const) for item in node.items)
    return isinstance(node, nodes.Const)


def _added(node: nodes.Node | None) -> int:
    """How many `+` stand in a row at its left."""
    count = 0
    while isinstance(node, nodes.Add):
        node, count = node.left, count + 1
    return count


def _data(node: nodes.Node) -> list[nodes.TemplateData]:
    return [node] if isinstance(node, nodes.TemplateData) else list(node.find_all(nodes.TemplateData))
