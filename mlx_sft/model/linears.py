"""The linear modules of a model: plain or quantized, single or one for each expert."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import mlx.nn as nn

from mlx_sft.model.names import expert_name, transformers_name
from mlx_sft.model.weights import Checkpoint

SPLIT_OUTPUTS = (nn.AllToShardedLinear, nn.QuantizedAllToShardedLinear)
SPLIT_INPUTS = (nn.ShardedToAllLinear, nn.QuantizedShardedToAllLinear)
"""Linear modules of which this process has some of the outputs, or computes with some of the inputs (`sharding.py`)."""
SPLIT = (*SPLIT_OUTPUTS, *SPLIT_INPUTS)


@cache
def _experts() -> tuple[type[nn.Module], type[nn.Module]]:
    """The classes of mlx-lm for the experts of a layer: plain and quantized. Importing mlx-lm takes seconds, so it waits for a model."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return SwitchLinear, QuantizedSwitchLinear


def is_experts(module: Any) -> bool:
    """Whether a linear module is one for each expert of a layer."""
    return isinstance(module, _experts())


def linear_modules(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Every linear module's path in the model and the module, by its name in transformers, in the model's order."""
    found = [
        (path, module)
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, nn.QuantizedLinear, *SPLIT, *_experts())
    ]
    return {transformers_name(path): (path, module) for path, module in sorted(found, key=lambda one: _natural(one[0]))}


def mark_joined(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Note on each linear module whether its weight is a tensor of the checkpoint, or one for each expert, or is stored otherwise.

    Only the first two can be written back, so that an adapter on all linear modules leaves the others out.
    """
    for name, (_, module) in linear_modules(model).items():
        weight = f"{name}.weight"
        module._joined = not {weight, expert_name(weight, 0)} & checkpoint.named.keys()


def is_joined(module: Any) -> bool:
    """Whether a linear module's weight is known to be a part of another tensor of its checkpoint, or under another name."""
    return bool(getattr(module, "_joined", False))


def joined_note(model: nn.Module) -> str:
    """What a person should know of the modules that an adapter leaves out; empty where there are none."""
    joined = {name.rpartition(".")[2]: name for name, (_, module) in linear_modules(model).items() if is_joined(module)}
    if not joined:
        return ""
    return (
        f"this checkpoint holds {', '.join(joined)} (such as {next(iter(joined.values()))}) inside of other tensors, or under other names, "
        "so that nothing can be merged into them; adapters leave them out"
    )


def weight_shape(linear: Any) -> tuple[int, ...]:
    """[out, in] of a linear module or an embedding, [experts, out, in] of a layer's experts; whole where processes have parts of it."""
    shape = part_shape(linear)
    if not isinstance(linear, SPLIT):
        return shape
    outputs, inputs = shape
    processes = linear.group.size()
    return (outputs * processes, inputs) if isinstance(linear, SPLIT_OUTPUTS) else (outputs, inputs * processes)


def part_shape(linear: Any) -> tuple[int, ...]:
    """The same of what this process has of it."""
    shape: tuple[int, ...] = linear.weight.shape
    return (*shape[:-1], linear.scales.shape[-1] * linear.group_size) if is_quantized(linear) else shape


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every module with a quantized weight, by its name in transformers."""
    for path, module in model.named_modules():
        if is_quantized(module):
            yield transformers_name(path), module


def is_quantized(module: Any) -> bool:
    """Whether its weight is packed, with a scale for each group of numbers."""
    return isinstance(
        module, (nn.QuantizedLinear, nn.QuantizedEmbedding, SPLIT_OUTPUTS[1], SPLIT_INPUTS[1], _experts()[1])
    )


def _natural(path: str) -> list[tuple[int, str]]:
    """`layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]
