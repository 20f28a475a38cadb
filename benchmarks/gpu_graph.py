"""The graph of a step as a GPU would compute it, recorded on a CPU: nothing is evaluated.

`mx.export_function` names every primitive of a function and the arrays between them, also of the gradients inside. Three things it does
not show as they are on a GPU, and while a function is recorded something else stands in for them:

- a kernel of `mx.fast`: on a CPU it is many plain operations, so a mark of plain operations that no model has becomes one node here
  (of a norm whose weight is frozen, of causal attention);
- `mx.checkpoint`: it cannot be exported, so its ends are marked, and what the backward pass reads of its inside is copied here;
- `mx.custom_function`: it cannot be exported, so its gradient is taken at once, for a result whose own gradient is 1.

    functions ─► events ─► kernels, gradients and recomputation put in again ─► nodes that are needed, in the order of `mx.compile`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from unittest.mock import patch

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

_FIRST_TAG = 2**40
"""Tags are scalar constants from here on, larger than any that a model has."""


@dataclass(frozen=True)
class Array:
    """A node's result: shape and bytes of a number."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


@dataclass(frozen=True)
class Node:
    """A primitive; inputs and outputs are names of arrays."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arguments: tuple[Any, ...] = ()


@dataclass
class Graph:
    """Nodes in the order in which they can be computed.

    Attributes:
        arrays: By name, those of constants and of the function's arguments too.
        outputs: Names of the function's results.
    """

    nodes: list[Node]
    arrays: dict[str, Array]
    outputs: list[str]

    def producers(self) -> dict[str, Node]:
        return {name: node for node in self.nodes for name in node.outputs}

    def ordered(self, producers: dict[str, Node] | None = None) -> Graph:
        """Without what no output needs, each node after its inputs, these in the order in which they are named, as `mx.compile` goes."""
        producers = self.producers() if producers is None else producers
        ordered: dict[int, Node] = {}
        stack = [(producers[name], False) for name in reversed(self.outputs) if name in producers]
        while stack:
            node, done = stack.pop()
            if id(node) in ordered:
                continue
            if done:
                ordered[id(node)] = node
                continue
            stack.append((node, True))
            stack += [(producers[name], False) for name in reversed(node.inputs) if name in producers]
        return replace(self, nodes=list(ordered.values()))


Kind = Literal["RMSNorm", "RoPE", "ScaledDotProductAttention", "CrossEntropy", "enter", "leave", "gradient", "value"]


@dataclass
class _Marks:
    """What was marked while a function was recorded, by tag."""

    kinds: list[Kind] = field(default_factory=list)

    def tag(self, kind: Kind) -> mx.array:
        self.kinds.append(kind)
        return mx.array(_FIRST_TAG + len(self.kinds) - 1, mx.uint64)

    def marked(self, kind: Kind, arrays: Sequence[mx.array], further: Sequence[mx.array] = ()) -> list[mx.array]:
        """The arrays behind a `Depends` with a tag, which their gradients pass."""
        return list(mx.depends(list(arrays), [*further, self.tag(kind)]))


# While a function is recorded


def record(function: Callable[..., Any], *arguments: Any, kernels: bool = True) -> Graph:
    """The graph of a function's results, with MLX's kernels as one node each, or as a CPU has them.

    Args:
        arguments: Trees of arrays, and of what is constant.
    """
    marks = _Marks()
    events: list[dict[str, Any]] = []

    def of_arrays(*values: mx.array) -> list[mx.array]:
        return _arrays(function(*_with_arrays(arguments, values)))

    with standing_in(marks, kernels=kernels):
        mx.export_function(events.append, of_arrays, *_arrays(arguments))
    graph, tags = _read(events)
    marked = {name: marks.kinds[number] for name, number in tags.items()}
    graph = _with_gradients(_with_kernels(graph, marked), marked)
    return _with_recomputation(graph, tags, marks)


@contextmanager
def standing_in(marks: _Marks, *, kernels: bool = True) -> Iterator[None]:
    """Within the block MLX's namespace has marks where it has checkpoints, custom functions and kernels, and a GPU by default."""

    def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: _segment(marks, function, args, kwargs)

    def custom_function(function: Callable[..., Any]) -> _CustomFunction:
        return _CustomFunction(marks, function)

    def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
        return _kernel(marks, "RMSNorm", [x], [] if weight is None else [weight], x.shape, x.dtype)

    def rope(x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return _kernel(marks, "RoPE", [x], [], x.shape, x.dtype)

    def attention(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, **kwargs: Any) -> mx.array:
        if not isinstance(mask, str):
            raise ValueError("only causal attention has a known cost")
        return _kernel(marks, "ScaledDotProductAttention", [q, k, v], [], (*q.shape[:-1], v.shape[-1]), q.dtype)

    def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
        return _kernel(marks, "CrossEntropy", [logits], [targets], targets.shape, mx.float32)

    own: dict[str, Any] = {"checkpoint": checkpoint, "custom_function": custom_function}
    own["default_device"] = lambda: mx.Device(mx.gpu)
    fast: dict[str, Any] = {"rms_norm": rms_norm, "rope": rope, "scaled_dot_product_attention": attention}
    fast["cross_entropy"] = cross_entropy
    with patch.multiple(mx, **own), patch.multiple(mx.fast, **fast) if kernels else nullcontext():
        yield


def _kernel(
    marks: _Marks,
    kind: Kind,
    inputs: list[mx.array],
    constants: list[mx.array],
    shape: tuple[int, ...],
    dtype: mx.Dtype,
) -> mx.array:
    """Arrays of a kernel's shapes, whose gradient needs the inputs: a sine forward, a cosine backward.

    A running sum is at the end, so that there is another at the beginning of the backward pass.
    """
    held = [array.flatten() for array in marks.marked(kind, inputs, constants)]
    waves = mx.sin(mx.concatenate(held))[: math.prod(shape)]
    return mx.cumsum(waves.reshape(shape).astype(dtype), -1)


def _segment(marks: _Marks, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A function between a mark of its arguments and one of its results."""
    tree = (args, kwargs)
    args, kwargs = _with_arrays(tree, marks.marked("enter", _arrays(tree)))
    results = (function(*args, **kwargs),)
    return _with_arrays(results, marks.marked("leave", _arrays(results)))[0]


class _CustomFunction:
    """A custom function whose first result is what is differentiated, and nothing is done to it afterwards."""

    def __init__(self, marks: _Marks, function: Callable[..., Any]) -> None:
        self._marks = marks
        self._function = function
        self._backward: Callable[..., Any]

    def vjp(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        self._backward = backward
        return backward

    def __call__(self, *primals: Any) -> Any:
        fixed = _with_arrays(primals, [mx.stop_gradient(primal) for primal in _arrays(primals)])
        outputs = self._function(*fixed)
        first, *further = _arrays(outputs)
        ones = _with_arrays(outputs, [mx.ones_like(first), *map(mx.zeros_like, further)])
        gradients = _arrays(self._backward(fixed, ones, outputs))
        total = mx.array(0.0)
        for primal, gradient in zip(_arrays(primals), gradients, strict=True):
            if mx.issubdtype(primal.dtype, mx.floating):
                (given,) = self._marks.marked("gradient", [mx.stop_gradient(gradient)])
                total = total + (primal * given).sum()
        return _with_arrays(outputs, [*self._marks.marked("value", [total], [first]), *further])


def _arrays(tree: Any) -> list[mx.array]:
    return [leaf for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)]


def _with_arrays(tree: Any, arrays: Iterable[mx.array]) -> Any:
    """A tree with other arrays."""
    new = iter(arrays)
    return tree_map(lambda leaf: next(new) if isinstance(leaf, mx.array) else leaf, tree)


# What was recorded, rewritten


def _read(events: list[dict[str, Any]]) -> tuple[Graph, dict[str, int]]:
    """The graph as it was exported, and the numbers of the tags by the names of their constants."""
    graph, tags = Graph([], {}, []), {}
    for event in events:
        kind = event["type"]
        if kind == "constants":
            for name, value in event["constants"]:
                graph.arrays[name] = Array(tuple(value.shape), value.dtype.size)
                if value.dtype == mx.uint64 and value.ndim == 0 and value.item() >= _FIRST_TAG:
                    tags[name] = int(value.item()) - _FIRST_TAG
        elif kind in ("inputs", "outputs", "primitive"):
            own = event["outputs" if kind == "primitive" else kind]
            graph.arrays |= {name: Array(tuple(shape), dtype.size) for name, shape, dtype in own}
            if kind == "outputs":
                graph.outputs = [name for name, *_ in own]
            if kind == "primitive":
                inputs, outputs = (tuple(name for name, *_ in event[side]) for side in ("inputs", "outputs"))
                graph.nodes.append(Node(event["name"], inputs, outputs, tuple(event["arguments"])))
    return graph.ordered(), tags


def _with_kernels(graph: Graph, marked: Mapping[str, Kind]) -> Graph:
    """With a node for each marked kernel, and for its gradient, which reads what that of MLX's reads."""
    producers = graph.producers()

    def origin(name: str, found: Callable[[Node], bool]) -> Node:
        """The nearest node before an array, from which it was computed by operations of a mark."""
        seen, waiting = set(), [name]
        while waiting:
            node = producers.get(waiting.pop(0))
            if node is not None and id(node) not in seen:
                if found(node):
                    return node
                seen.add(id(node))
                waiting += node.inputs
        raise ValueError(f"{name} has no mark before it")

    def is_mark(node: Node) -> bool:
        return node.name == "Depends" and node.inputs[-1] in marked

    replaced, arrays, results = dict(producers), dict(graph.arrays), {}
    for node in graph.nodes:
        if node.name == "Scan" and not node.arguments[2]:
            mark = origin(node.inputs[0], is_mark)
            results[mark.inputs[-1]] = node.outputs[0]
            replaced[node.outputs[0]] = Node(marked[mark.inputs[-1]], mark.inputs[:-1], node.outputs)
    for node in graph.nodes:
        cosines = [name for name in node.inputs if name in producers and producers[name].name == "Cos"]
        if node.name == "Multiply" and cosines:
            (other,) = set(node.inputs) - set(cosines)
            cotangent = origin(other, lambda node: node.name == "Scan" and bool(node.arguments[2])).inputs[0]
            mark = origin(cosines[0], is_mark)
            kind, kept = marked[mark.inputs[-1]], mark.inputs[:-1]
            if kind == "RoPE":
                kept = ()
            elif kind != "RMSNorm":
                result = results.setdefault(mark.inputs[-1], f"{mark.inputs[-1]}.result")
                if result not in arrays:  # no one else needs it
                    arrays[result] = arrays[cotangent]
                    replaced[result] = Node(kind, kept, (result,))
                kept = (*kept, result)
            replaced[node.outputs[0]] = Node(f"{kind}VJP", (*kept, cotangent), node.outputs)
    return replace(graph, arrays=arrays).ordered(replaced)


def _with_gradients(graph: Graph, marked: Mapping[str, Kind]) -> Graph:
    """With the gradients that custom functions gave, in place of their products with a cotangent of 1."""
    same: dict[str, str] = {}
    for node in graph.nodes:
        kind = marked.get(node.inputs[-1]) if node.name == "Depends" else None
        if kind == "value":
            same[node.outputs[0]] = node.inputs[1]
        elif kind == "gradient":
            same[node.outputs[0]] = node.inputs[0]
        elif node.name == "Multiply" and (given := [name for name in node.inputs if name in same]):
            same[node.outputs[0]] = given[0]
    return _renamed(graph, same)


def _with_recomputation(graph: Graph, tags: Mapping[str, int], marks: _Marks) -> Graph:
    """With a copy of what the backward pass reads of each checkpoint's inside; inner ones first, which outer ones then copy."""
    recomputation, names = _Recomputation(graph), {number: name for name, number in tags.items()}
    open_marks: list[int] = []
    for number, kind in enumerate(marks.kinds):
        if kind == "enter":
            open_marks.append(number)
        elif kind == "leave":
            recomputation.add(names.get(open_marks.pop()), names.get(number))
    return recomputation.graph()


class _Recomputation:
    """A graph to which copies are added; a node's key is its first result."""

    def __init__(self, graph: Graph) -> None:
        self._before = graph
        self._arrays = dict(graph.arrays)
        self._nodes = {node.outputs[0]: node for node in graph.nodes}
        self._keys = {name: key for key, node in self._nodes.items() for name in node.outputs}
        self._by_tag = {node.inputs[-1]: key for key, node in self._nodes.items() if node.name == "Depends"}
        self._enters: set[str] = set()
        self._readers: dict[str, set[str]] = {}
        for node in graph.nodes:
            self._note_readers(node)

    def add(self, first_tag: str | None, last_tag: str | None) -> None:
        """The copy of what is between two marks, as far as others read it; they read the copy then."""
        if first_tag not in self._by_tag or last_tag not in self._by_tag:
            return  # no result needs it
        first, last = self._by_tag[first_tag], self._by_tag[last_tag]
        enter, leave = self._nodes[first], self._nodes[last]
        inside = self._nodes_before(leave.inputs, lambda key: key != first)
        held = {*enter.outputs, *(name for key in inside for name in self._nodes[key].outputs)}
        readers = {key for name in held for key in self._readers.get(name, ())} - inside - {last}
        read = {name for key in readers for name in self._nodes[key].inputs if name in held}
        copied = self._nodes_before(read, lambda key: key in inside)
        again = {name: f"{name}.{last_tag}" for key in (*copied, first) for name in self._nodes[key].outputs}
        self._arrays |= {new: self._arrays[name] for name, new in again.items()}
        for key in copied:
            self._put(_with_names(self._nodes[key], again))
            if key in self._enters:
                self._enters.add(again[key])
        # A copy waits for all results of the checkpoint; so they too are computed where an outer one is computed again.
        waiting = replace(enter, inputs=(*enter.inputs, *leave.outputs))
        self._put(replace(waiting, outputs=tuple(again[name] for name in enter.outputs)))
        for key in readers:
            self._put(_with_inputs(self._nodes[key], again))
        self._enters.add(first)
        # A checkpoint's results are of one node with its arguments, which `mx.compile` makes nothing else of.
        self._put(replace(leave, inputs=(*leave.inputs[:-1], *enter.inputs[:-1])))

    def graph(self) -> Graph:
        """With arguments in the place of their marks, but in the copies, where a node stands between."""
        marks = [self._nodes[key] for key in self._enters]
        same = {own: of for node in marks for own, of in zip(node.outputs, node.inputs, strict=False)}
        return _renamed(replace(self._before, nodes=list(self._nodes.values()), arrays=self._arrays), same)

    def _nodes_before(self, names: Iterable[str], belongs: Callable[[str], bool]) -> set[str]:
        """The keys of nodes from which arrays are computed, as far as they belong there."""
        found: set[str] = set()
        waiting = [self._keys[name] for name in names if name in self._keys]
        while waiting:
            key = waiting.pop()
            if key not in found and belongs(key):
                found.add(key)
                waiting += [self._keys[name] for name in self._nodes[key].inputs if name in self._keys]
        return found

    def _put(self, node: Node) -> None:
        self._nodes[node.outputs[0]] = node
        self._keys |= dict.fromkeys(node.outputs, node.outputs[0])
        self._note_readers(node)

    def _note_readers(self, node: Node) -> None:
        for name in node.inputs:
            self._readers.setdefault(name, set()).add(node.outputs[0])


def _renamed(graph: Graph, same: Mapping[str, str]) -> Graph:
    """With some arrays in the place of others."""

    def last(name: str) -> str:
        while name in same:
            name = same[name]
        return name

    names = {name: last(name) for name in same}
    nodes = [_with_inputs(node, names) for node in graph.nodes if same.keys().isdisjoint(node.outputs)]
    return Graph(nodes, graph.arrays, [names.get(name, name) for name in graph.outputs]).ordered()


def _with_inputs(node: Node, names: Mapping[str, str]) -> Node:
    if names.keys().isdisjoint(node.inputs):
        return node
    return replace(node, inputs=tuple(names.get(name, name) for name in node.inputs))


def _with_names(node: Node, names: Mapping[str, str]) -> Node:
    return replace(_with_inputs(node, names), outputs=tuple(names[name] for name in node.outputs))
