"""Low-rank updates beside linear layers of which each process has a part (`model/sharding.py`).

Each process has A and B whole, and computes with the rows of B, or with the columns of A, that belong to its part:

    outputs split:   y_r = W_r x + scale · B_r A x                          B_r: rows of process r
    inputs split:    y   = Σ over processes (W_r x_r + scale · B A_r x_r)   A_r: columns of process r

So the gradients that a process has of A and B are parts, which add up to those of one process with the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import sum_gradients

from mlx_sft.errors import USAGE, UserError
from mlx_sft.methods.lora_layers import LoraLinear
from mlx_sft.methods.lora_settings import LoraSettings
from mlx_sft.model.linears import SPLIT_INPUTS, SPLIT_OUTPUTS
from mlx_sft.model.sharding import is_part, is_split, own_part, product, with_bias


class LoraOfOutputs(LoraLinear):
    """Beside a layer of which this process has some outputs: [..., in] → [..., out / processes]."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.of_shared(sum_gradients(self.linear.group)(x))

    def of_shared(self, x: mx.array) -> mx.array:
        """Of an input whose gradient is added up over the processes elsewhere."""
        return self._updated(with_bias(product(self.linear, x), self.linear), x)

    def _used(self) -> tuple[mx.array, mx.array]:
        return self.lora_A, own_part(self.lora_B, -2, self.linear.group)


class LoraOfInputs(LoraLinear):
    """Beside a layer that adds up what the processes have of some inputs each: [..., in / processes] → [..., out]."""

    def __call__(self, x: mx.array) -> mx.array:
        result = self._updated(product(self.linear, x), x)
        return with_bias(mx.distributed.all_sum(result, group=self.linear.group), self.linear)

    def _used(self) -> tuple[mx.array, mx.array]:
        return own_part(self.lora_A, -1, self.linear.group), self.lora_B

    def _kept(self, shape: tuple[int, ...], key: mx.array) -> mx.array:
        """The part of what one process would draw for all inputs."""
        group = self.linear.group
        return own_part(super()._kept((*shape[:-1], shape[-1] * group.size()), key), -1, group)


def beside_part(linear: nn.Module) -> type[LoraLinear] | None:
    """What stands around a part of a linear layer; None for a layer that is whole."""
    if isinstance(linear, SPLIT_OUTPUTS):
        return LoraOfOutputs
    return LoraOfInputs if isinstance(linear, SPLIT_INPUTS) else None


def refuse_whole(
    model: nn.Module, linears: Mapping[str, tuple[str, nn.Module]], chosen: Sequence[str], settings: LoraSettings
) -> None:
    """Raise `UserError` where something is to be trained that is no part of a split model, or that needs whole weights."""
    if not is_split(model):
        return
    if settings.needing_whole:
        what = f"no process has the whole weights that {settings.needing_whole} needs"
        raise UserError(what, where="shard_base", hint="leave one of them out", exit_code=USAGE)
    whole = [name for name in chosen if not is_part(linears[name][1])]
    if whole:
        parts = dict.fromkeys(name.rpartition(".")[2] for name, (_, linear) in linears.items() if is_part(linear))
        what = f"--shard-base splits {whole[0]} not at all, or otherwise than by its rows or columns, and trains no adapter on it"
        raise UserError(what, where="target", hint=f"give --target {','.join(parts)}", exit_code=USAGE)
