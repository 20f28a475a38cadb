"""The kernels of a recorded graph on a GPU: which element-wise operations `mx.compile` makes one of, and what each moves and computes.

`fused` follows `compile_fuse` of MLX (mlx/compile.cpp) step by step. The costs are those of MLX's Metal kernels, where every input is
read once and every output written once; a view moves nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

from benchmarks.gpu_graph import Array, Graph, Node

MOST_DEPTH, MOST_ARRAYS = 11, 24
"""Of what is fused, in operations and in inputs."""

ELEMENTWISE = frozenset({
    "Abs", "Add", "ArcCos", "ArcCosh", "ArcSin", "ArcSinh", "ArcTan", "ArcTan2", "ArcTanh", "AsType", "BitwiseBinary",
    "BitwiseInvert", "Ceil", "Conjugate", "Cos", "Cosh", "Divide", "Equal", "Erf", "ErfInv", "Exp", "Expm1", "Floor",
    "Greater", "GreaterEqual", "Imag", "Less", "LessEqual", "Log", "Log1p", "LogAddExp", "LogicalAnd", "LogicalNot",
    "LogicalOr", "Maximum", "Minimum", "Multiply", "Negative", "NotEqual", "Power", "Real", "Remainder", "Round",
    "Select", "Sigmoid", "Sign", "Sin", "Sinh", "Sqrt", "Square", "Subtract", "Tan", "Tanh",
})  # fmt: skip
VIEWS = frozenset({
    "Broadcast", "BroadcastAxes", "Depends", "ExpandDims", "Flatten", "NumberOfElements", "Reshape", "Slice", "Split",
    "Squeeze", "StopGradient", "Transpose", "Unflatten",
})  # fmt: skip
_READERS_OF_ROWS = ("RMSNorm", "RMSNormVJP", "CrossEntropy", "CrossEntropyVJP", "ScaledDotProductAttentionVJP")
"""They read rows that lie one after another; others are copied first."""

_TILE = 1024
"""Queries and keys whose scores attention's gradient computes at once (Metal, MLX 0.32.4); tiles that no query sees are left out."""

_LAUNCHES_A_TILE, _PASSES_A_TILE = 8, 9
"""Of attention's gradient, after the names of its kernels: the products s, dp, dv, dk and dq, ds, and the sums of dk and dv over a group's
heads; and how often scores are moved: s and dp are written, both are read, p and ds are written, p is read once and ds twice."""

_NORM_GROUPS = 512
"""Groups of rows that the gradient of a norm's weight is summed up in first."""


@dataclass(frozen=True)
class Kernel:
    """What a node takes.

    Attributes:
        name: Of its primitive; `Compiled` where several are one.
        launches: Kernels that are started for it.
        read, written: Bytes.
        flops: Operations of products of matrices; those of others are free beside what they move.
    """

    name: str
    launches: int
    read: int
    written: int
    flops: int

    @property
    def moved(self) -> int:
        return self.read + self.written


# What is fused


def fused(graph: Graph) -> Graph:
    """The graph with element-wise operations that `mx.compile` makes one kernel of, as nodes named `Compiled`."""
    return _Fusion(graph).run()


class _Fusion:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._arrays = dict(graph.arrays)
        self._outputs = set(graph.outputs)
        self._producers = graph.producers()
        self._readers: dict[str, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            for name in set(node.inputs):
                self._readers[name].append(node)

    def run(self) -> Graph:
        """From the last node to the first, each with what lies before it and is read by nothing else."""
        done: set[str] = set()
        nodes: list[Node] = []
        for original in reversed(self._graph.nodes):
            node = self._producers[original.outputs[0]]
            if node.outputs[0] in done:
                continue
            group = self._group(node) if node.name in ELEMENTWISE else {}
            if len(group) <= 1:
                nodes.append(node)
                continue
            made = self._compiled(node, group)
            done.update(made.outputs, group)
            nodes.append(made)
        return Graph(nodes[::-1], self._arrays, self._graph.outputs).ordered()

    def _group(self, last: Node) -> dict[str, Node]:
        """The nodes that become one with this one, by the names of their results."""
        group: dict[str, Node] = {}
        inputs: set[str] = set()
        shape = self._arrays[last.outputs[0]].shape

        def visit(name: str, depth: int) -> None:
            node = self._producers.get(name)
            if name in group:
                return
            other_shape = name in self._outputs and self._arrays[name].shape != shape
            if depth >= MOST_DEPTH or node is None or not _is_fusable(node) or other_shape:
                inputs.add(name)
                return
            if depth > 0 and any(reader.outputs[0] not in group for reader in self._readers[name]):
                if node.name == "Broadcast" and len(inputs) < MOST_ARRAYS:
                    visit(self._split(node, group), depth)
                else:
                    inputs.add(name)
                return
            if name in self._outputs:
                inputs.add(name)
            else:
                inputs.discard(name)
            if len(inputs) >= MOST_ARRAYS:
                return
            group[name] = node
            for before in self._producers[name].inputs:
                visit(before, depth + 1)

        visit(last.outputs[0], 0)
        return group

    def _split(self, node: Node, group: dict[str, Node]) -> str:
        """A broadcast of its own for the nodes of a group, so that others need not be in it."""
        name = node.outputs[0]
        own = f"{name}:{len(self._arrays)}"
        self._arrays[own] = self._arrays[name]
        self._producers[own] = replace(node, outputs=(own,))
        mine = [reader for reader in self._readers[name] if reader.outputs[0] in group]
        self._readers[name] = [reader for reader in self._readers[name] if reader.outputs[0] not in group]
        for reader in mine:
            renamed = replace(reader, inputs=tuple(own if one == name else one for one in reader.inputs))
            self._change(reader, renamed)
            group[reader.outputs[0]] = renamed
        self._readers[own] = [self._producers[reader.outputs[0]] for reader in mine]
        for before in node.inputs:
            self._readers[before].append(self._producers[own])
        return own

    def _change(self, node: Node, by: Node) -> None:
        for name in node.outputs:
            self._producers[name] = by
        for name in {*node.inputs, *by.inputs}:
            self._readers[name] = [by if reader is node else reader for reader in self._readers[name]]

    def _compiled(self, last: Node, group: dict[str, Node]) -> Node:
        group = {name: self._producers[name] for name in group}
        outside = [name for node in group.values() for name in node.inputs if name not in group]
        outputs = [name for name in group if name in self._outputs and name != last.outputs[0]]
        made = Node("Compiled", tuple(dict.fromkeys(outside)), (*outputs, last.outputs[0]))
        for name in made.inputs:
            kept = [reader for reader in self._readers[name] if reader.outputs[0] not in group]
            self._readers[name] = [*kept, made]
        for name in made.outputs:
            self._producers[name] = made
            self._readers[name] = [reader for reader in self._readers[name] if reader.outputs[0] not in group]
        return made


def _is_fusable(node: Node) -> bool:
    return node.name in ELEMENTWISE or node.name == "Broadcast"


# What a kernel takes


def kernels(graph: Graph) -> list[Kernel]:
    """Of each node that computes something.

    Raises:
        ValueError: For a primitive whose cost is not known.
    """
    return _Costs(graph).kernels()


class _Costs:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._producers = graph.producers()
        self._turned: set[str] = set()
        """Arrays whose axes do not lie in the order in which they are named."""

    def kernels(self) -> list[Kernel]:
        found: list[Kernel] = []
        for node in self._graph.nodes:
            if node.name in VIEWS:
                found += self._view(node)
            else:
                found += self._copies(node)
                found.append(self._kernel(node))
        return found

    def _view(self, node: Node) -> list[Kernel]:
        """Nothing; a copy where axes are joined that do not lie one behind the other."""
        if node.name == "Transpose":
            order = [axis for axis in node.arguments[0] if self._shape(node.inputs[0])[axis] > 1]
            if order != sorted(order):
                self._turned.update(node.outputs)
        elif self._turned.intersection(node.inputs):
            if node.name in ("Flatten", "Reshape"):
                return [self._copy(node.outputs[0])]
            self._turned.update(node.outputs)
        return []

    def _copies(self, node: Node) -> list[Kernel]:
        """Of inputs that are not as the kernel reads them."""
        if node.name not in _READERS_OF_ROWS:
            return []
        return [self._copy(name) for name in node.inputs if name in self._turned]

    def _copy(self, name: str) -> Kernel:
        nbytes = self._array(name).nbytes
        return Kernel("Copy", 1, nbytes, nbytes, 0)

    def _kernel(self, node: Node) -> Kernel:
        read = sum(map(self._read, dict.fromkeys(node.inputs)))
        written = sum(self._array(name).nbytes for name in node.outputs)
        plain = Kernel(node.name, 1, read, written, 0)
        match node.name:
            case "Matmul" | "AddMM":
                inner = self._shape(node.inputs[0])[-1]
                return replace(plain, flops=2 * math.prod(self._shape(node.outputs[0])) * inner)
            case "ScaledDotProductAttention":
                # Half of the scores, for those that no query sees are left out; log Σ e^s is written for the backward pass.
                queries, keys = (self._shape(name) for name in node.inputs[:2])
                flops = 2 * 2 * math.prod(queries) * keys[-2] // 2
                return replace(plain, written=written + 4 * self._rows(node.inputs[0]), flops=flops)
            case "ScaledDotProductAttentionVJP":
                return self._attention_gradient(node, plain)
            case "Gather" | "GatherAxis":
                return replace(plain, read=written + sum(map(self._read, node.inputs[1:])))
            case "Scatter" | "ScatterAxis" | "SliceUpdate":
                update = self._read(node.inputs[-1 if node.name == "Scatter" else 1])
                return replace(plain, launches=2, written=written + update)  # a copy of the whole first
            case "Concatenate":
                return replace(plain, launches=len(node.inputs))
            case "Arange" | "Full" | "Reduce" | "Softmax" | "LogSumExp" | "Compiled" | "Contiguous" | "Copy":
                return plain
            case "RMSNormVJP":
                # It sums up the gradient of its weight too, in a second kernel, also where no one asks for it.
                width, itemsize = self._shape(node.inputs[0])[-1], self._array(node.inputs[0]).itemsize
                sums = min(_NORM_GROUPS, self._rows(node.inputs[0])) * width * itemsize
                return replace(plain, launches=2, read=read + sums, written=written + sums)
            case "RMSNorm" | "RoPE" | "RoPEVJP" | "CrossEntropy" | "CrossEntropyVJP":
                return plain
            case name if name in ELEMENTWISE:
                return plain
        raise ValueError(f"no cost is known of {node.name}")

    def _attention_gradient(self, node: Node, plain: Kernel) -> Kernel:
        """Of queries and keys of one width, in tiles."""
        *_, width, size = self._shape(node.inputs[0])
        across = -(-width // _TILE)
        tiles = across * (across + 1) // 2
        scores = self._rows(node.inputs[0]) // width * tiles * min(width, _TILE) ** 2
        moved = _PASSES_A_TILE * scores * self._array(node.inputs[0]).itemsize
        return Kernel(
            node.name,
            launches=1 + _LAUNCHES_A_TILE * tiles,  # Σ o · do first
            read=plain.read + moved // 2,
            written=plain.written + moved - moved // 2,
            flops=5 * 2 * scores * size,
        )

    def _rows(self, name: str) -> int:
        return math.prod(self._shape(name)[:-1])

    def _read(self, name: str) -> int:
        """Bytes of an array as it lies in memory, however often a view repeats them."""
        node, own = self._producers.get(name), self._array(name).nbytes
        if node is None or node.name not in VIEWS:
            return own
        return min(own, self._read(node.inputs[0]))

    def _array(self, name: str) -> Array:
        return self._graph.arrays[name]

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._array(name).shape


def total(found: Iterable[Kernel]) -> Kernel:
    """The sums over kernels."""
    found = list(found)
    launches, read, written, flops = (
        sum(getattr(kernel, name) for kernel in found) for name in ("launches", "read", "written", "flops")
    )
    return Kernel("", launches, read, written, flops)
