"""What a step costs in memory, and how large a micro-batch fits. Knows nothing of losses or loops."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_sft.model.head import SplitModel

MOST_TOKENS = 2048
"""Matrix products are no faster with more rows at once, and memory is the budget."""

_KEPT_PER_FEATURE = 2.1
"""Numbers kept for backward per input and output feature of a layer's matrices: 190 KB a token and layer were measured in
float32 on Qwen3-0.6B, whose features add up to 22,528."""

_BYTES_A_PARAMETER = 24
"""Float32 value, gradient, accumulated gradient and AdamW's two moments."""

_HEAD_BYTES = 8 * 64 * 2**20
"""A chunk of logits, and what its loss and gradient are made from: eight arrays of its size were measured."""


class Machine(Protocol):
    """The facts about a device's memory that a choice needs."""

    def usable_bytes(self) -> int:
        """What this process may still take, without pressing on the rest of the machine."""


class ThisMachine:
    """The device that MLX runs on by default."""

    def usable_bytes(self) -> int:
        facts = mx.device_info() if mx.default_device() == mx.Device(mx.gpu) else {}
        return usable_bytes(facts, _system_memory(), mx.get_active_memory())


def usable_bytes(device: Mapping[str, object], system: int, active: int) -> int:
    """Nine tenths of what the device recommends, or half of the system's memory, less what is taken already."""
    recommended = device.get("max_recommended_working_set_size")
    if isinstance(recommended, int):
        return max(0, int(0.9 * recommended) - active)
    total = device.get("total_memory", system)
    return max(0, (total if isinstance(total, int) else system) // 2 - active)


@dataclass(frozen=True)
class Footprint:
    """What a step takes beyond the weights, in bytes.

    Attributes:
        fixed: Parameters, gradients, optimizer state and chunks of logits.
        per_token: Kept for backward for each padded token.
        per_token_recomputed: The same where layers are recomputed.
    """

    fixed: int
    per_token: int
    per_token_recomputed: int

    @classmethod
    def of(cls, split: SplitModel, trainable: int) -> Footprint:
        """The footprint of a model with `trainable` parameters."""
        layers = split.layers
        itemsize = split.model_dtype().size
        features = [_linear_features(layer) for layer in layers]
        hidden = max(_smallest_features(layer) for layer in layers)
        kept = [int(_KEPT_PER_FEATURE * f * itemsize) for f in features]
        # One layer's numbers and their gradients, and the input of every layer.
        recomputed = 2 * max(kept) + len(layers) * hidden * itemsize
        return cls(_HEAD_BYTES + _BYTES_A_PARAMETER * trainable, sum(kept), recomputed)


@dataclass(frozen=True)
class Choice:
    """How a step is computed on this machine."""

    micro_batch_tokens: int
    recompute: bool


def choose(
    footprint: Footprint,
    usable: int,
    longest: int,
    *,
    micro_batch_tokens: int | None,
    grad_checkpoint: str,
) -> Choice:
    """The largest micro-batch that fits, and recomputation only where the longest row would not fit without it.

    Args:
        usable: Bytes that may be taken.
        longest: Tokens of the longest row.
        micro_batch_tokens: As configured; None to choose.
        grad_checkpoint: `auto`, `on` or `off`.
    """
    free = max(0, usable - footprint.fixed)
    needed = max(longest, micro_batch_tokens or 0)
    recompute = grad_checkpoint == "on" or (grad_checkpoint == "auto" and free < needed * footprint.per_token)
    if micro_batch_tokens is None:
        per_token = footprint.per_token_recomputed if recompute else footprint.per_token
        micro_batch_tokens = max(1, min(MOST_TOKENS, free // max(1, per_token)))
    return Choice(micro_batch_tokens, recompute)


def prepare_device() -> None:
    """On Metal, let the model's memory stay resident up to what the system recommends."""
    if mx.metal.is_available():
        limit = mx.device_info().get("max_recommended_working_set_size")
        if isinstance(limit, int):
            mx.set_wired_limit(limit)


def _system_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _linear_features(layer: nn.Module) -> int:
    return sum(sum(m.weight.shape) for _, m in layer.named_modules() if isinstance(m, nn.Linear))


def _smallest_features(layer: nn.Module) -> int:
    shapes = [m.weight.shape for _, m in layer.named_modules() if isinstance(m, nn.Linear)]
    return min((max(shape) for shape in shapes), default=0)
