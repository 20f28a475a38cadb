"""Optimizer and learning-rate schedule from the configuration; both to the letter of PyTorch's and transformers'.

Knows nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlx_sft.config import TrainConfig

Arrays = dict[str, mx.array]

_PART_BYTES = 16 * 2**20


class AdamW:
    """AdamW with bias correction, as `torch.optim.AdamW` (Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101).

    Args:
        parameters: Flat float32 arrays by name; the state is float32 as they are.
        decayed: Which names weight decay applies to.
    """

    def __init__(self, config: TrainConfig, parameters: Arrays, decayed: Callable[[str], bool]) -> None:
        groups = [
            ([name for name in parameters if decayed(name)], config.weight_decay),
            ([name for name in parameters if not decayed(name)], 0.0),
        ]
        self._groups = [
            (names, self._optimizer(config, decay, {name: parameters[name] for name in names}))
            for names, decay in groups
            if names
        ]

    @staticmethod
    def _optimizer(config: TrainConfig, weight_decay: float, parameters: Arrays) -> optim.AdamW:
        # MLX leaves bias correction off by default, PyTorch has it on.
        optimizer = optim.AdamW(config.lr, list(config.betas), config.eps, weight_decay, bias_correction=True)
        optimizer.init(parameters)
        return optimizer

    def update(self, parameters: Arrays, gradients: Arrays, learning_rate: float) -> Arrays:
        """The parameters after one step, evaluated as the state is, a part after another.

        `gradients` is empty afterwards: what is new takes their place in memory.
        """
        updated: Arrays = {}
        for names, optimizer in self._groups:
            optimizer.learning_rate = learning_rate
            optimizer.state["step"] = optimizer.step + 1
            for part in _parts(names, parameters):
                for name in part:
                    gradient = gradients.pop(name)
                    updated[name] = optimizer.apply_single(gradient, parameters[name], optimizer.state[name])
                    del gradient
                mx.eval([optimizer.state[name] for name in part])  # first, so that the gradients are gone
                mx.eval([updated[name] for name in part])
        return {name: updated[name] for name in parameters}

    def take_up(self, first: Arrays, second: Arrays, steps: int) -> None:
        """Go on with the two moments of another AdamW that has taken so many steps with these parameters."""
        for names, optimizer in self._groups:
            optimizer.state["step"] = mx.array(steps, mx.uint64)
            for name in names:
                optimizer.state[name] = {"m": first[name], "v": second[name]}

    @property
    def state(self) -> list[dict[str, Any]]:
        return [optimizer.state for _, optimizer in self._groups]

    def flat_state(self) -> Arrays:
        """The state by name, as a checkpoint keeps it; the inverse of `load_flat_state`."""
        flat: Arrays = {}
        for index, state in enumerate(self.state):
            for name, value in state.items():
                for kind, array in value.items() if isinstance(value, dict) else [("", value)]:
                    flat[f"{index}|{name}|{kind}"] = array
        return flat

    def load_flat_state(self, flat: Arrays) -> None:
        """Take up a state that `flat_state` returned; raises `KeyError` where it is of other parameters."""
        for index, (_, optimizer) in enumerate(self._groups):
            for name, value in optimizer.state.items():
                if isinstance(value, dict):
                    optimizer.state[name] = {k: flat[f"{index}|{name}|{k}"] for k in value}
                else:
                    optimizer.state[name] = flat[f"{index}|{name}|"]


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of a step (from 1), as transformers' `get_*_schedule_with_warmup`, whose steps count from 0."""
    done = step - 1
    warmup_steps = math.ceil(total_steps * config.warmup)
    if done < warmup_steps:
        return config.lr * done / warmup_steps
    if config.scheduler == "constant":
        return config.lr
    progress = (done - warmup_steps) / max(1, total_steps - warmup_steps)
    if config.scheduler == "linear":
        return config.lr * max(0.0, 1.0 - progress)
    return config.lr * max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def global_norm(gradients: Arrays) -> mx.array:
    """The Euclidean norm of all gradients together, float32; evaluated a part after another."""
    squares: list[mx.array] = []
    for part in _parts(list(gradients), gradients):
        squares += [mx.square(gradients[name]).sum() for name in part]
        mx.eval(squares)
    return mx.sqrt(mx.stack(squares).sum())


def clip(gradients: Arrays, norm: mx.array, max_norm: float) -> Arrays:
    """Scale gradients down to a global norm of `max_norm`, as `torch.nn.utils.clip_grad_norm_`; 0 leaves them."""
    if max_norm == 0:
        return gradients
    scale = mx.minimum(max_norm / (norm + 1e-6), 1.0)
    return {name: gradient * scale for name, gradient in gradients.items()}


def _parts(names: list[str], arrays: Arrays) -> Iterator[list[str]]:
    """The names in parts of about 16 MiB: what a part is computed from in between exists for it alone, and small arrays go together."""
    part: list[str] = []
    taken = 0
    for name in names:
        if part and taken + arrays[name].nbytes > _PART_BYTES:
            yield part
            part, taken = [], 0
        part.append(name)
        taken += arrays[name].nbytes
    if part:
        yield part
