"""The head of a model computed for a part of its vocabulary at a time, and proved equal to the whole before it is trusted.

    hidden_states [positions, hidden] ─► head, of its matrix the rows a..b alone ─► logits [positions, b − a]

The model's own code runs, with a stand-in where its matrix was: what it makes of logits one by one, such as soft-capping or a scale,
it makes of these too. Knows nothing of losses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.model.blocks import replaced_children
from mlx_sft.model.head import EMBEDDING_KINDS, SplitModel
from mlx_sft.model.linears import weight_shape
from mlx_sft.model.quantize import plain_weight

COLUMNS = 4096
"""Logits of a position that exist at once: products of so many columns are as fast as any, and 500 positions of them stay in a cache."""

_PROBED = 8

_OUTPUTS = (nn.Linear, nn.QuantizedLinear, *EMBEDDING_KINDS)


class TiledHead:
    """A head whose logits can be had tile by tile.

    Args:
        split: The model.
        holder, name: The module that holds the output matrix, and its name there.
        columns: Logits of a position in a tile.
    """

    def __init__(self, split: SplitModel, holder: nn.Module, name: str, columns: int = COLUMNS) -> None:
        self._split = split
        self._holder = holder
        self._name = name
        self.columns = columns

    @property
    def tiles(self) -> list[slice]:
        """The vocabulary, cut."""
        vocabulary = weight_shape(self._output)[0]
        return [slice(start, min(start + self.columns, vocabulary)) for start in range(0, vocabulary, self.columns)]

    def logits(self, hidden_states: mx.array, tile: slice) -> mx.array:
        """[positions, hidden] → [positions, columns of the tile]."""
        part = _rows_of(self._output, tile)
        return self._through(getattr(part, "as_linear", part), hidden_states)

    def target_logits(self, hidden_states: mx.array, targets: mx.array) -> mx.array:
        """[positions, hidden], [positions] → [positions, 1]: of each position the logit of its target alone."""
        return self._through(partial(_row_by_row, _rows_of(self._output, targets)), hidden_states)

    def holds(self) -> bool:
        """Whether tiles are what the whole head gives, for a few random hidden states."""
        vocabulary, width = weight_shape(self._output)
        hidden_states = mx.random.normal((_PROBED, width), self._split.model_dtype(), key=mx.random.key(0))
        whole = self._split.logits(hidden_states)
        if whole.shape[-1] != vocabulary:
            return False
        cuts = [0, vocabulary // 3, vocabulary // 2, vocabulary]
        targets = mx.arange(_PROBED) * 7919 % vocabulary
        tiles = [self.logits(hidden_states, slice(a, b)) for a, b in pairwise(cuts)]
        alone = self.target_logits(hidden_states, targets)
        of_targets = mx.take_along_axis(whole, targets[:, None], axis=-1)
        joined = mx.concatenate(tiles, axis=-1)
        if joined.shape != whole.shape or alone.shape != of_targets.shape:
            return False
        return self._split.agree(joined, whole) and self._split.agree(alone, of_targets)

    @property
    def _output(self) -> Any:
        return self._holder[self._name]

    def _through(self, product: Callable[[mx.array], mx.array], hidden_states: mx.array) -> mx.array:
        with replaced_children(self._holder, {self._name: _Product(product)}):
            return self._split.logits(hidden_states)


def tiled_head(split: SplitModel) -> TiledHead | None:
    """The head in tiles; None where there is no way to compute it so."""
    head = expected_tiles(split)
    if head is None:
        return None
    try:
        return head if head.holds() else None
    except (AttributeError, TypeError, ValueError):
        return None


def expected_tiles(split: SplitModel) -> TiledHead | None:
    """The head in tiles, as it is expected to be: the proof of it needs the weights."""
    place = split.output_matrix()
    return TiledHead(split, *place) if place is not None and type(place[0][place[1]]) in _OUTPUTS else None


class _Product:
    """Stands where the output matrix stood, be it called as a linear module or as an embedding."""

    def __init__(self, product: Callable[[mx.array], mx.array]) -> None:
        self._product = product

    def __call__(self, hidden_states: mx.array) -> mx.array:
        return self._product(hidden_states)

    as_linear = __call__


def _rows_of(output: Any, rows: slice | mx.array) -> Any:
    """A module of the same kind with these rows of the matrix."""
    kind: Any = type(output)
    part = kind.__new__(kind)
    nn.Module.__init__(part)
    vars(part).update(vars(output))
    for name, value in output.items():
        part[name] = value[rows]
    return part


def _row_by_row(part: Any, hidden_states: mx.array) -> mx.array:
    """[..., positions, hidden] and a part of as many rows → [..., positions, 1]: each position with its own row."""
    logits: mx.array = (hidden_states[..., None, :] @ plain_weight(part)[..., None])[..., 0]
    return logits + part.bias[:, None] if "bias" in part else logits
