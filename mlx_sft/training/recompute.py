"""Gradient checkpointing: keep each layer's input only, and compute the layer again in the backward pass.

The model's layers are wrapped while a forward pass runs and are themselves again after it; no class is changed.
(Chen et al. 2016, https://arxiv.org/abs/1604.06174.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn


class _Recomputed:
    """Stands where a layer stood; its trainable arrays are arguments, so that gradients reach them."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def inner(parameters: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self._layer.update(parameters)
            return self._layer(*args, **kwargs)

        return mx.checkpoint(inner)(self._layer.trainable_parameters(), *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._layer, name)


@contextmanager
def recomputed(layers: list[nn.Module]) -> Iterator[None]:
    """Within the block, every layer of the model's own list is computed again for its gradient."""
    originals = list(layers)
    stand_ins: list[Any] = [_Recomputed(layer) for layer in originals]
    layers[:] = stand_ins
    try:
        yield
    finally:
        layers[:] = originals
