"""P-tuning (Liu et al. 2021, https://arxiv.org/abs/2103.10385): virtual tokens that a small trained network makes.

    e1 e2 ... en ─► encoder ─► v1 v2 ... vn │ <bos> system, user, assistant ...
    trained          trained                │ frozen model

The encoder is PEFT's `PromptEncoder`, and its arrays have the names that they have there. PEFT's file, which calls the method P_TUNING,
holds what comes out of the encoder; the encoder itself is in the run's checkpoints alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import mlx.core as mx
import mlx.nn as nn
from pydantic import Field, model_validator

from mlx_sft.console import many
from mlx_sft.methods import Parameters
from mlx_sft.methods.encoders import EMBEDDING, Drawn, draw_encoder, linear, linear_arrays
from mlx_sft.methods.full import is_decayed
from mlx_sft.methods.prompt_embeddings import PromptEmbeddings, StatedVectors, VirtualTokensSettings
from mlx_sft.methods.prompt_files import PROMPT
from mlx_sft.methods.virtual_tokens import InFront

_HEADS = {"mlp": ("mlp_head.0", "mlp_head.2", "mlp_head.4"), "lstm": ("mlp_head.0", "mlp_head.2")}
"""PEFT's names of the linear layers of each encoder, in order."""

_WAYS = ("", "_reverse")
"""How torch's names of an LSTM's arrays end, in the order in which what both directions give is put together."""


class PTuningSettings(VirtualTokensSettings):
    """Settings of the method `p-tuning`."""

    encoder: Literal["mlp", "lstm", "none"] = "mlp"
    """What makes the virtual tokens of trained embeddings: mlp (three linear layers), lstm (a bidirectional LSTM and two linear layers), or
    none, which trains the virtual tokens themselves. A run from an adapter has none, because the adapter's file holds no encoder."""
    encoder_hidden_size: int = Field(default=128, ge=1, le=65536)
    """Width of the encoder's hidden layers; of an LSTM's states in each direction."""
    encoder_layers: int = Field(default=2, ge=1, le=64)
    """Layers of an LSTM as the encoder."""

    @model_validator(mode="after")
    def _encoder_settings_agree(self) -> PTuningSettings:
        fields = PTuningSettings.model_fields
        if self.encoder != "lstm" and self.encoder_layers != fields["encoder_layers"].default:
            raise ValueError(f"encoder_layers is of an LSTM, and the encoder is {self.encoder}")
        if self.encoder == "none" and self.encoder_hidden_size != fields["encoder_hidden_size"].default:
            raise ValueError("encoder_hidden_size is of an encoder, and there is none")
        return self


class _Stated(StatedVectors):
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    encoder_hidden_size: int | None = Field(default=None, ge=1, le=65536)
    encoder_num_layers: int = Field(default=2, ge=1, le=64)

    def settings(self) -> PTuningSettings:
        number, hidden = self.num_virtual_tokens, self.encoder_hidden_size
        if hidden is None:
            return PTuningSettings(virtual_tokens=number, encoder="none")
        if self.encoder_reparameterization_type == "MLP":  # of which PEFT ignores the number of layers
            return PTuningSettings(virtual_tokens=number, encoder_hidden_size=hidden)
        layers = self.encoder_num_layers
        return PTuningSettings(virtual_tokens=number, encoder="lstm", encoder_hidden_size=hidden, encoder_layers=layers)


class PTuning(PromptEmbeddings):
    """The method `p-tuning`. Parameters: those of the encoder, under PEFT's names; of a result that was read, which has no encoder,
    `prompt_embeddings` [n, width]."""

    name: ClassVar = "p-tuning"
    Settings: ClassVar = PTuningSettings
    peft_type: ClassVar = "P_TUNING"
    Stated: ClassVar = _Stated

    settings: PTuningSettings

    def __init__(self, settings: PTuningSettings | None = None) -> None:
        super().__init__(settings)
        self._has_encoder = self.settings.encoder != "none"

    def start(self, in_front: InFront, key: mx.array) -> Parameters:
        shape = self.virtual_tokens, in_front.width
        if not self._has_encoder:
            return {PROMPT: mx.random.normal(shape, key=key)}
        return draw_encoder(shape, _encoder_arrays(self.settings, in_front.width), key)

    def vectors(self, parameters: Parameters) -> mx.array:
        if PROMPT in parameters:
            return parameters[PROMPT]
        states = parameters[EMBEDDING]
        if self.settings.encoder == "lstm":
            for layer in range(self.settings.encoder_layers):
                states = _lstm_layer(states, parameters, layer)
        first, *others = _HEADS[self.settings.encoder]
        states = linear(states, parameters, first)
        for name in others:
            states = linear(nn.relu(states), parameters, name)
        return states

    def decayed(self, name: str) -> bool:
        return is_decayed(name)

    def peft_settings(self, base_model: str) -> dict[str, Any]:
        settings = self.settings
        return {
            "encoder_dropout": 0.0,
            "encoder_hidden_size": None if settings.encoder == "none" else settings.encoder_hidden_size,
            "encoder_num_layers": settings.encoder_layers,
            "encoder_reparameterization_type": "LSTM" if settings.encoder == "lstm" else "MLP",
        }

    @classmethod
    def read(cls, folder: Path) -> tuple[Self, Parameters]:
        method, parameters = super().read(folder)
        method._has_encoder = False
        return method, parameters

    def decides(self, where: Path) -> dict[str, Any]:
        return PTuningSettings(virtual_tokens=self.virtual_tokens, encoder="none").model_dump()

    def agrees(self, model: nn.Module, name: str, given: Any) -> bool:
        return bool(given == self.decides(Path())[name])  # also of the encoder that the file names and does not hold

    def start_note(self) -> str:
        if self.settings.encoder != "none":
            return ""
        return "without an encoder: the virtual tokens themselves are trained, as --method prompt does"

    @property
    def title(self) -> str:
        return "p-tuning"

    def describe(self) -> str:
        settings = self.settings
        made = {
            "mlp": f"made by an MLP of width {settings.encoder_hidden_size}",
            "lstm": f"made by a bidirectional LSTM of {many(settings.encoder_layers, 'layer')} of width {settings.encoder_hidden_size}",
            "none": "trained without an encoder",
        }[settings.encoder]
        return f"p-tuning, {self.virtual_tokens} virtual tokens in front of each conversation, {made}"


def _encoder_arrays(settings: PTuningSettings, width: int) -> Iterator[Drawn]:
    hidden, features = settings.encoder_hidden_size, width
    inner = 2 * hidden if settings.encoder == "lstm" else hidden
    if settings.encoder == "lstm":
        for layer in range(settings.encoder_layers):
            for way in _WAYS:
                for kind, shape in (
                    ("weight_ih", (4 * hidden, features)),
                    ("weight_hh", (4 * hidden, hidden)),
                    ("bias_ih", (4 * hidden,)),
                    ("bias_hh", (4 * hidden,)),
                ):
                    yield Drawn(f"lstm_head.{kind}_l{layer}{way}", shape, 1 / math.sqrt(hidden))
            features = inner
    heads = _HEADS[settings.encoder]
    for name in heads:
        rows = width if name == heads[-1] else inner
        yield from linear_arrays(name, features, rows)
        features = rows


def _lstm_layer(states: mx.array, parameters: Parameters, layer: int) -> mx.array:
    """A layer of torch's bidirectional LSTM, [n, features] → [n, 2 · hidden]; both directions are computed at once.

    i, f, g, o = W x + b + U h + b'      c' = σ(f) c + σ(i) tanh(g)      h' = σ(o) tanh(c')
    """

    def both(kind: str) -> mx.array:
        return mx.stack([parameters[f"lstm_head.{kind}_l{layer}{way}"] for way in _WAYS])

    biases = both("bias_ih") + both("bias_hh")
    gates = mx.stack([states, states[::-1]]) @ both("weight_ih").swapaxes(1, 2) + biases[:, None]
    recurrent = both("weight_hh").swapaxes(1, 2)
    hidden = cell = mx.zeros((2, 1, recurrent.shape[1]))
    given = []
    for of_position in mx.split(gates, len(states), axis=1):
        i, f, g, o = mx.split(of_position + hidden @ recurrent, 4, axis=-1)
        cell = mx.sigmoid(f) * cell + mx.sigmoid(i) * mx.tanh(g)
        hidden = mx.sigmoid(o) * mx.tanh(cell)
        given.append(hidden)
    forward, backward = mx.concatenate(given, axis=1)
    return mx.concatenate([forward, backward[::-1]], axis=1)
