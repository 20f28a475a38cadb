"""AdamW whose two moments are kept in 8 bits a number (Dettmers et al. 2022, https://arxiv.org/abs/2110.02861).

Of each block of 256 numbers the largest amount is kept in float32, and of each number, divided by it, the place in a table of 256 values:

    fractions of a decade     2^i (signed) or 2^(i + 1) (unsigned) of them in the decade from 10^(i - 7) to 10^(i - 6), i from 0 to 6
    the table                 these, with both signs where it is signed; 0 and 1

The step is computed in float32 and then rounded to the nearest value, as in bitsandbytes and torchao. Arrays of fewer than 4,096 numbers,
or of a part of a block, keep float32.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from mlx_sft.optimizers.adamw import AdamW
from mlx_sft.optimizers.gradients import Arrays

BLOCK = 256
_LEAST = 4096
_LARGEST = "_largest"
"""Ends the name of the amounts that belong to a moment."""


def table(*, signed: bool) -> np.ndarray:
    """The 256 values [256], float32, in their order."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = np.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1)
        fractions = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        values += [*fractions, *-fractions] if signed else [*fractions]
    return np.sort(np.array(values, np.float32))


class _Table:
    """One of the two tables, by which numbers become codes and codes numbers."""

    def __init__(self, *, signed: bool) -> None:
        values = table(signed=signed)
        between = (values[:-1] + values[1:]) / 2
        self._values, self._between = mx.array(values), mx.array(np.append(between, np.float32(np.inf)))
        # Numbers whose bits have the same upper half lie so close together that no more than one of `between` lies among them.
        lowest = np.arange(2**16, dtype=np.uint32) << 16
        lowest[2**15 :] |= 0xFFFF  # of negative numbers the one with the largest amount
        self._codes = mx.array(
            np.searchsorted(between, lowest.view(np.float32), side="right").clip(max=255).astype(np.uint8)
        )

    def encoded(self, moment: mx.array) -> tuple[mx.array, mx.array]:
        """Codes, uint8 [blocks, 256], and the largest amount of each block, float32 [blocks]."""
        blocks = moment.reshape(-1, BLOCK)
        largest = mx.abs(blocks).max(axis=1)
        shares = blocks / mx.maximum(largest, 1e-12)[:, None]
        codes = self._codes[shares.view(mx.uint32) >> 16]
        return codes + (shares >= self._between[codes]).astype(mx.uint8), largest

    def decoded(self, codes: mx.array, largest: mx.array) -> mx.array:
        """Float32 [blocks, 256]."""
        shares: mx.array = self._values[codes]
        return shares * largest[:, None]


class _AdamW8bit(optim.AdamW):
    """MLX's AdamW with another state."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.tables = {"m": _Table(signed=True), "v": _Table(signed=False)}

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        if not _in_blocks(parameter.shape):
            super().init_single(parameter, state)
            return
        blocks = math.prod(parameter.shape) // BLOCK
        for name in self.tables:
            state[name] = mx.zeros((blocks, BLOCK), mx.uint8)
            state[name + _LARGEST] = mx.zeros(blocks)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        if "m" + _LARGEST not in state:
            plain: mx.array = super().apply_single(gradient, parameter, state)
            return plain
        moments = {
            name: table.decoded(state[name], state[name + _LARGEST]).reshape(parameter.shape)
            for name, table in self.tables.items()
        }
        updated: mx.array = super().apply_single(gradient, parameter, moments)
        state.update(self.kept(moments))
        return updated

    def kept(self, moments: Arrays) -> Arrays:
        """The state of a parameter whose moments these are."""
        state: Arrays = {}
        for name, moment in moments.items():
            state[name], state[name + _LARGEST] = self.tables[name].encoded(moment)
        return state


class AdamW8bit(AdamW):
    """The optimizer `adamw8bit`; its state is a quarter of AdamW's: two bytes a number, and a 64th of that."""

    name: ClassVar = "adamw8bit"
    kind: ClassVar = _AdamW8bit

    def take_up(self, first: Arrays, second: Arrays, steps: int) -> None:
        """As AdamW does, but rounded."""
        super().take_up(first, second, steps)
        for names, optimizer in self._groups:
            eight = cast(_AdamW8bit, optimizer)
            for name in names:
                if _in_blocks(first[name].shape):
                    eight.state[name] = eight.kept(eight.state[name])


def _in_blocks(shape: tuple[int, ...]) -> bool:
    size = math.prod(shape)
    return size >= _LEAST and size % BLOCK == 0
