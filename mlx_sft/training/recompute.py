"""How a model's layers are computed while it trains: what is kept for the backward pass, and what is computed again in it.

| mode | kept a token, besides the inputs of each layer's products | computed again |
|---|---|---|
| off | what the products give, norms and attention | the activation of the MLP |
| light | what the products give | all that lies between the products |
| layers | nothing: a layer's input alone | every layer |
| blocks | nothing: the input of about √N blocks of layers, then of the layers of one | every layer, twice |

(Chen et al. 2016, https://arxiv.org/abs/1604.06174.) Stand-ins take the place of layers and of their modules while a forward pass runs; the
model is itself again after it, and no class is changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.model.blocks import Block, find_blocks, stood_in
from mlx_sft.model.fast import fast_core
from mlx_sft.model.head import SplitModel

Mode = Literal["off", "light", "layers", "blocks"]

_PROBE = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


class Recomputed:
    """A model's layers, computed in a mode."""

    def __init__(self, split: SplitModel, mode: Mode) -> None:
        self._layers = split.layers
        blocks = find_blocks(split.layers, lambda: split.hidden_states(_PROBE))
        self._stand_ins = _stand_ins(split.layers, blocks, mode)
        if not self._reproduces(split):
            self._stand_ins = _stand_ins(split.layers, [{} for _ in blocks], "layers" if mode == "blocks" else mode)

    @contextmanager
    def standing_in(self) -> Iterator[None]:
        """Within the block, calling the model computes its layers in this mode."""
        originals = list(self._layers)
        self._layers[:] = self._stand_ins
        try:
            yield
        finally:
            self._layers[:] = originals

    def _reproduces(self, split: SplitModel) -> bool:
        """Whether the model computes the same with its stand-ins."""
        plain = split.hidden_states(_PROBE).astype(mx.float32)
        with self.standing_in():
            states = split.hidden_states(_PROBE).astype(mx.float32)
        tolerance = 1e-4 if split.model_dtype() == mx.float32 else 2e-2
        return bool((mx.abs(states - plain).max() <= tolerance * mx.abs(plain).max()).item())


def _stand_ins(layers: list[nn.Module], blocks: list[dict[str, Block]], mode: Mode) -> list[Any]:
    each = [
        _Layer(
            layer,
            {name: _Frugal(block, recompute=block.positionwise or mode == "light") for name, block in found.items()},
        )
        for layer, found in zip(layers, blocks, strict=True)
    ]
    if mode in ("off", "light"):
        return list(each)
    whole = [_Checkpointed([layer]) for layer in each]
    if mode == "layers":
        return list(whole)
    size = math.ceil(math.sqrt(len(whole)))
    groups = [_Checkpointed(whole[i : i + size]) for i in range(0, len(whole), size)]
    return [member for group in groups for member in _members(group)]


class _Frugal:
    """Stands where a block stood: what lies between its products is computed again where it is needed again."""

    def __init__(self, block: Block, *, recompute: bool) -> None:
        self._block = block
        self._core = fast_core(block) or block.core
        self._recompute = recompute

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        block, module = self._block, self._block.module
        shape_of_x = mx.broadcast_to(mx.zeros((), x.dtype), x.shape)  # so that no gradient goes past the products

        def rest(parameters: dict[str, Any], *projected: mx.array) -> mx.array:
            module.update(parameters)
            result: mx.array = module[block.last](self._core(list(projected), shape_of_x, *args, **kwargs))
            return result

        # The last product is not computed twice: nothing in a backward pass asks for its result.
        rest = mx.checkpoint(rest) if self._recompute else rest
        trainable = {name: value for name, value in module.trainable_parameters().items() if name not in block.first}
        return rest(trainable, *block.projected(x))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block.module, name)


class _Layer:
    """Stands where a layer stood, with stand-ins for its blocks."""

    def __init__(self, layer: nn.Module, parts: dict[str, _Frugal]) -> None:
        self.layer = layer
        self._parts = parts

    def trainable_parameters(self) -> Any:
        return self.layer.trainable_parameters()

    def update(self, parameters: Any) -> None:
        self.layer.update(parameters)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with stood_in(self.layer, self._parts):
            return self.layer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


class _Checkpointed:
    """One layer or several as one, of which the input alone is kept; trainable arrays are arguments, so that gradients reach them."""

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


def _members(group: _Checkpointed) -> list[Any]:
    """A stand-in for each layer of a group: all but the last give back what they get, and the last computes the whole."""
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

    return [_Member(group.layers[index], member(index)) for index in range(len(group.layers))]


class _Member:
    """Stands where a layer stood whose group computes it."""

    def __init__(self, layer: Any, call: Any) -> None:
        self._layer = layer
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)
