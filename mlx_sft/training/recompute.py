"""How a model's layers are computed while it trains: what is kept for the backward pass, and what is computed again in it.

| mode | kept a token, besides the inputs of each layer's products | computed again |
|---|---|---|
| off | what the products give, norms and attention | the activation of the MLP |
| light | what the products give | all that lies between the products |
| layers | nothing: a layer's input alone | every layer |
| blocks | nothing: the input of about √N blocks of layers, then of the layers of one | every layer, twice |

(Chen et al. 2016, https://arxiv.org/abs/1604.06174.) Recomputed layers and blocks take the place of the model's own while a forward pass
runs; the model is itself again after it, and no class is changed.

On the CPU, rows may be joined (`cpu/joined_rows.py`) where a layer's attention can be told apart from its products.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_sft.cpu.fast_core import fast_core
from mlx_sft.cpu.joined_rows import JoinedRows, row_by_row
from mlx_sft.data.batches import Span
from mlx_sft.model.blocks import Block, InPlaceOf, attention_names, find_blocks, names_in, replaced_children, with_names
from mlx_sft.model.head import SplitModel
from mlx_sft.model.names import transformers_name
from mlx_sft.training.attention import composed_attention
from mlx_sft.training.gated_delta import UPDATE, chunked_holds, chunked_update

Mode = Literal["off", "light", "layers", "blocks"]

_PROBE = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
_ROWS = mx.array([[3, 1, 4, 0, 0], [1, 5, 9, 2, 6], [1, 5, 9, 7, 2]])
_JOINED = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 7, 2]])
_SPANS = (Span(0, 3), Span(3, 8), Span(8, 10, head=3, shared=3))
"""Two rows, and a third that begins as the second does; the three end to end; and where each lies there."""


class Recomputation:
    """A model's layers, computed in a mode.

    Attributes:
        rows: Where the rows of the micro-batch lie that is computed now, if they are joined. It must stay as it is until the gradient
            is taken, since layers that are computed again read it then.
    """

    def __init__(self, split: SplitModel, mode: Mode, *, composes_attention: bool = False) -> None:
        self.rows = JoinedRows()
        self._split = split
        self._layers = split.layers
        blocks = find_blocks(split.layers, lambda: split.hidden_states(_PROBE))
        code = _Code(split, composes_attention=composes_attention)
        blocks = [
            {name: replace(block, run=code.of(block.module) or block.run) for name, block in found.items()}
            for found in blocks
        ]
        lowest = _lowest_reached(split)
        self._replacements = _layers_in(mode, split.layers, blocks, self.rows, code, lowest)
        if not self._reproduces(split):
            unsplit: list[dict[str, Block]] = [{} for _ in blocks]
            mode = "layers" if mode == "blocks" else mode
            self._replacements = _layers_in(mode, split.layers, unsplit, self.rows, code, lowest)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the block, calling the model computes its layers in this mode."""
        originals = list(self._layers)
        self._layers[:] = self._replacements
        try:
            yield
        finally:
            self._layers[:] = originals

    def keeps_rows_apart(self, *, shared: bool = False) -> bool:
        """Whether joined rows are computed as each is alone; it is tried on two short ones, or with one more that has tokens of another."""
        padded, spans = self._split.hidden_states(_ROWS), _SPANS if shared else _SPANS[:2]
        alone = [padded[row : row + 1, span.shared : span.length] for row, span in enumerate(spans)]
        self.rows.spans = spans
        try:
            with self.active():
                joined = self._split.hidden_states(_JOINED[:, : spans[-1].end])
        except (
            ValueError
        ):  # of shapes: something of the length of the whole, as scales of positions, goes into the attention of a row
            return False
        finally:
            self.rows.spans = ()
        return self._split.agree(joined, mx.concatenate(alone, axis=1))

    def _reproduces(self, split: SplitModel) -> bool:
        """Whether the model computes the same in this mode."""
        plain = split.hidden_states(_PROBE)
        with self.active():
            return split.agree(split.hidden_states(_PROBE), plain)


def _lowest_reached(split: SplitModel) -> int:
    """The number of the lowest layer that a gradient comes to: the lowest that is trained, or the first where embeddings are."""
    trained: dict[str, mx.array] = tree_flatten(split.model.trainable_parameters(), destination={})  # type: ignore[assignment]
    outside = split.outside_layers({transformers_name(path): value for path, value in trained.items()})
    if any("embed" in name for name in outside):
        return 0
    return next((n for n, layer in enumerate(split.layers) if tree_flatten(layer.trainable_parameters())), 0)


def _layers_in(
    mode: Mode, layers: list[nn.Module], blocks: list[dict[str, Block]], rows: JoinedRows, code: _Code, lowest: int
) -> list[Any]:
    """What takes the place of each layer in a mode; below the lowest that a gradient comes to nothing is kept."""

    def recomputed(block: Block) -> _RecomputedBlock:
        return _RecomputedBlock(block, rows, recompute=block.positionwise or mode == "light")

    each = [
        _LayerOfBlocks(
            layer,
            code.of_children(layer) | {name: recomputed(block) for name, block in found.items()},
        )
        for layer, found in zip(layers, blocks, strict=True)
    ]
    if mode in ("off", "light"):
        return list(each)
    whole = [_RecomputedLayers([layer]) for layer in each]
    if mode == "layers":
        return list(whole)
    size = math.ceil(math.sqrt(len(whole) - lowest))
    groups = [_RecomputedLayers(whole[i : i + size]) for i in range(lowest, len(whole), size)]
    return [*whole[:lowest], *(member for group in groups for member in _members(group))]


class _Code:
    """What runs in the place of modules' own code: the same with other functions where it calls some of MLX's or mlx-lm's.

    Args:
        composes_attention: Whether attention is composed of plain operations.
    """

    def __init__(self, split: SplitModel, *, composes_attention: bool) -> None:
        self._names = attention_names(composed_attention) if composes_attention else {}
        modules = [child for layer in split.layers for child in layer.children().values()]
        loops = any(isinstance(module, nn.Module) and names_in(module, UPDATE) for module in modules)
        if loops and mx.default_device() == mx.Device(mx.gpu) and chunked_holds(split.model_dtype()):
            self._names = self._names | {UPDATE: chunked_update}

    def of(self, module: Any) -> Any:
        """Its code with other functions; None where it calls none of them; all code names `mx`, which tells nothing."""
        if not isinstance(module, nn.Module) or not any(names_in(module, name) for name in self._names if name != "mx"):
            return None
        return with_names(module, self._names)

    def of_children(self, layer: nn.Module) -> dict[str, Any]:
        return {
            name: InPlaceOf(child, run)
            for name, child in layer.children().items()
            if (run := self.of(child)) is not None
        }


class _RecomputedBlock:
    """A block; what lies between its products is computed again where the backward pass needs it."""

    def __init__(self, block: Block, rows: JoinedRows, *, recompute: bool) -> None:
        self._block = block
        self._core = fast_core(block) or block.core
        self._rows = rows
        self._recompute = recompute

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        block, module = self._block, self._block.module
        core = self._core if block.positionwise else row_by_row(self._core, self._rows.spans)
        shape_of_x = mx.broadcast_to(mx.zeros((), x.dtype), x.shape)  # so that no gradient goes past the products

        def rest(parameters: dict[str, Any], *projected: mx.array) -> mx.array:
            module.update(parameters)
            result: mx.array = module[block.last](core(list(projected), shape_of_x, *args, **kwargs))
            return result

        # The last product is not computed twice: nothing in a backward pass asks for its result.
        rest = mx.checkpoint(rest) if self._recompute else rest
        trainable = {name: value for name, value in module.trainable_parameters().items() if name not in block.first}
        return rest(trainable, *block.projected(x))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block.module, name)


class _LayerOfBlocks:
    """A layer with recomputed blocks in the place of its own."""

    def __init__(self, layer: nn.Module, parts: dict[str, Any]) -> None:
        self.layer = layer
        self._parts = parts

    def trainable_parameters(self) -> Any:
        return self.layer.trainable_parameters()

    def update(self, parameters: Any) -> None:
        self.layer.update(parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with replaced_children(self.layer, self._parts):
            return self.layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class _RecomputedLayers:
    """One layer, or several as one, of which only the input is kept; trainable arrays are arguments, so that gradients reach them."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def trainable_parameters(self) -> Any:
        return [layer.trainable_parameters() for layer in self.layers]

    def update(self, parameters: Any) -> None:
        for layer, values in zip(self.layers, parameters, strict=True):
            layer.update(values)

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        return self.run(x, [(args, kwargs)] * len(self.layers))

    def run(self, x: mx.array, calls: list[tuple[Any, Any]]) -> Any:
        """Each layer in turn, with the arguments that it was called with besides the first."""

        def inner(parameters: Any, x: Any, calls: list[tuple[Any, Any]]) -> Any:
            self.update(parameters)
            for layer, (args, kwargs) in zip(self.layers, calls, strict=True):
                x = layer(x, *args, **kwargs)
            return x

        return mx.checkpoint(inner)(self.trainable_parameters(), x, calls)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layers[0], name)


def _members(group: _RecomputedLayers) -> list[Any]:
    """A replacement for each layer of a group: all but the last give back what they get, and the last computes the whole."""
    calls: list[tuple[Any, Any]] = []

    def member(index: int) -> Any:
        def call(x: mx.array, *args: Any, **kwargs: Any) -> Any:
            calls.append((args, kwargs))
            if index + 1 < len(group.layers):
                return x
            taken = list(calls)
            calls.clear()
            return group.run(x, taken)

        return call

    return [InPlaceOf(group.layers[index], member(index)) for index in range(len(group.layers))]
