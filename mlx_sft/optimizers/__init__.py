"""What turns gradients into updates. A further optimizer is one more file with a subclass of `Optimizer`, and a line in `ENTRIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import mlx.core as mx
import mlx.optimizers as optim
from pydantic import Field

from mlx_sft.config import TrainConfig
from mlx_sft.errors import USAGE, UserError
from mlx_sft.optimizers.gradients import Arrays, parts, row_pieces
from mlx_sft.optimizers.rounding import random_bits, stochastically_rounded
from mlx_sft.registry import OPTIMIZERS
from mlx_sft.settings import Settings as NoSettings

ENTRIES = {
    "adamw": "mlx_sft.optimizers.adamw:AdamW",
    "adamw8bit": "mlx_sft.optimizers.adamw8bit:AdamW8bit",
    "adafactor": "mlx_sft.optimizers.adafactor:Adafactor",
    "lion": "mlx_sft.optimizers.lion:Lion",
    "muon": "mlx_sft.optimizers.muon:Muon",
    "sgd": "mlx_sft.optimizers.sgd:SGD",
}


class DecaySettings(NoSettings):
    """What most optimizers have."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay; norms and biases are left out."""


class Optimizer:
    """An optimizer of MLX's over named arrays, with a state that a checkpoint keeps exactly.

    A subclass says with `make` which of MLX's it is. One that is none of MLX's derives it from
    `mlx.optimizers.Optimizer`, with `init_single` and `apply_single`.

    Args:
        settings: The chosen ones.
        parameters: Flat arrays by name, float32 or bfloat16; a step is computed in float32, and so is the state.
        decayed: Which names weight decay applies to.
        factor: What the learning rate of each name is multiplied with.
        compiled: Whether a part's updates are one compiled graph, in which an array takes three kernels and not thirty. It pays on GPUs.

    Attributes:
        name: By which the configuration chooses it.
        Settings: Its settings, each of which becomes an option.
        by_rows: Whether a large array may be updated some rows after others, because no block of 256 numbers depends on another.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[NoSettings]] = NoSettings
    by_rows: ClassVar[bool] = False

    def __init__(
        self,
        settings: Any,
        parameters: Arrays,
        decayed: Callable[[str], bool],
        factor: Callable[[str], float] = lambda name: 1.0,
        *,
        compiled: bool = False,
    ) -> None:
        self.settings = settings
        groups: dict[tuple[bool, str, float], list[str]] = {}
        for name, value in parameters.items():
            groups.setdefault((not decayed(name), self.kind_of(name, value.shape), factor(name)), []).append(name)
        self._groups = [(groups[key], self.make(settings, key[1], decayed=not key[0])) for key in sorted(groups)]
        self._factors = [key[2] for key in sorted(groups)]
        for names, optimizer in self._groups:
            optimizer.init(
                {name: parameters[name].astype(mx.float32) for name in names}
            )  # of which the shapes alone are used
        self._compiled = compiled
        applies = (partial(_apply, optimizer) for _, optimizer in self._groups)
        self._applies = [mx.compile(apply) if compiled else apply for apply in applies]

    @classmethod
    def make(cls, settings: Any, kind: str, *, decayed: bool) -> optim.Optimizer:
        """MLX's optimizer for the parameters of one kind; without weight decay where they are not decayed."""
        raise NotImplementedError

    @classmethod
    def kind_of(cls, name: str, shape: tuple[int, ...]) -> str:
        """Which parameters belong together, for an optimizer that treats some of them otherwise."""
        return ""

    @classmethod
    def state_bytes(cls, settings: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """What the state of parameters of these shapes takes in memory and in a checkpoint."""
        total = 0
        for name, shape in shapes.items():
            state: dict[str, mx.array] = {}
            cls.make(settings, cls.kind_of(name, shape), decayed=True).init_single(mx.zeros(shape), state)
            total += sum(value.nbytes for value in state.values())  # of arrays that are never computed
        return total

    def update(
        self,
        parameters: Arrays,
        gradients: Arrays,
        learning_rate: float,
        scale: mx.array | None = None,
        key: mx.array | None = None,
    ) -> Arrays:
        """The parameters after one step, evaluated as the state is, a part after another.

        `gradients` is empty afterwards: what is new takes their place in memory.

        Args:
            scale: What the gradients are multiplied with first, where they are clipped.
            key: Random key of the step, by which parameters in bfloat16 are rounded stochastically; to nearest where None.
        """
        updated: Arrays = {}
        keys = {} if key is None else dict(zip(parameters, mx.random.split(key, len(parameters)), strict=True))
        for (names, optimizer), factor, apply in zip(self._groups, self._factors, self._applies, strict=True):
            optimizer.learning_rate = learning_rate * factor
            optimizer.state["step"] = optimizer.step + 1
            shared = {name: optimizer.state[name] for name in _SHARED}
            for part in parts(names, parameters):
                pieces = row_pieces(parameters[part[0]].shape) if self.by_rows and len(part) == 1 else []
                if len(pieces) > 1:
                    name = part[0]
                    updated[name] = _in_pieces(
                        apply, shared, parameters[name], gradients.pop(name), optimizer.state[name], scale, keys.get(name),
                        pieces,
                    )  # fmt: skip
                    continue
                for together in [part] if self._compiled else [[name] for name in part]:
                    old = {name: parameters[name] for name in together}
                    states = {name: optimizer.state[name] for name in together}
                    taken = {name: gradients.pop(name) for name in together}
                    own_keys = {name: keys[name] for name in together if name in keys}
                    new, states = apply(shared, old, taken, states, scale, own_keys)
                    del taken
                    updated |= new
                    optimizer.state.update(states)
                mx.eval([optimizer.state[name] for name in part])  # first, so that the gradients are gone
                mx.eval([updated[name] for name in part])
        return {name: updated[name] for name in parameters}

    def take_up(self, first: Arrays, second: Arrays, steps: int) -> None:
        """Go on with the two moments of an AdamW elsewhere; raises `UserError` for an optimizer that has others."""
        what = f"--optimizer {self.name} cannot go on with the moments of AdamW"
        raise UserError(what, hint="leave --optimizer out", exit_code=USAGE)

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


_SHARED = ("step", "learning_rate")
"""What of an optimizer's state is of all its parameters."""


def _apply(
    optimizer: optim.Optimizer,
    shared: Arrays,
    parameters: Arrays,
    gradients: Arrays,
    states: dict[str, Arrays],
    scale: mx.array | None,
    keys: Arrays,
) -> tuple[Arrays, dict[str, Arrays]]:
    """The parameters and their states after a step, by name; the optimizer itself stays as it is."""
    before = {name: optimizer.state[name] for name in _SHARED}
    optimizer.state.update(shared)
    states = {name: dict(state) for name, state in states.items()}
    updated: Arrays = {}
    try:
        for name, parameter in parameters.items():
            gradient = gradients[name].astype(mx.float32)
            gradient = gradient if scale is None else gradient * scale
            precise = optimizer.apply_single(gradient, parameter.astype(mx.float32), states[name])
            updated[name] = _rounded(precise, parameter.dtype, keys.get(name))
    finally:
        optimizer.state.update(before)
    return updated, states


def _rounded(precise: mx.array, dtype: mx.Dtype, key: mx.array | None) -> mx.array:
    """A parameter's new value, float32, as the parameter is stored."""
    if dtype != mx.bfloat16 or key is None:
        return precise.astype(dtype)
    return stochastically_rounded(precise, random_bits(precise.shape, key))


def _in_pieces(
    apply: Callable[..., tuple[Arrays, dict[str, Arrays]]],
    shared: Arrays,
    parameter: mx.array,
    gradient: mx.array,
    state: Arrays,
    scale: mx.array | None,
    key: mx.array | None,
    pieces: list[slice],
) -> mx.array:
    """A large parameter after a step, of which only some rows at a time are computed.

    It takes the place of its gradient in memory where that is of the same precision, and the state that of the one before.
    """
    updated = gradient if gradient.dtype == parameter.dtype else mx.zeros(parameter.shape, parameter.dtype)
    keys = [None] * len(pieces) if key is None else mx.random.split(key, len(pieces))
    rows = len(parameter)
    for piece, own_key in zip(pieces, keys, strict=True):
        # The same share of everything that is kept of the parameter, a number each or less.
        places = {
            kind: slice(piece.start * len(kept) // rows, piece.stop * len(kept) // rows) for kind, kept in state.items()
        }
        states = {"": {kind: state[kind][place] for kind, place in places.items()}}
        own_keys = {} if own_key is None else {"": own_key}
        new, states = apply(shared, {"": parameter[piece]}, {"": gradient[piece]}, states, scale, own_keys)
        mx.eval(new, states)
        updated[piece] = new[""]
        for kind, place in places.items():
            state[kind][place] = states[""][kind]
        mx.eval(updated, state)  # in place, because nothing else holds them
    return updated


def make_optimizer(
    config: TrainConfig,
    parameters: Arrays,
    decayed: Callable[[str], bool],
    rate: Callable[[str, float], float] = lambda name, peak: peak,
    *,
    compiled: bool = False,
) -> Optimizer:
    """The optimizer that a configuration asks for, with a state as training starts with it.

    Args:
        rate: The peak learning rate of a parameter, by its name and that of the run.
    """
    kind: type[Optimizer] = OPTIMIZERS[config.optimizer]
    settings, peak = config.settings(kind.Settings), config.lr

    def factor(name: str) -> float:
        return rate(name, peak) / peak if peak else 1.0

    return kind(settings, parameters, decayed, factor, compiled=compiled)
