"""Full fine-tuning: every floating weight, embeddings and head included, or those of some layers.

The parameters are float32 masters, and the model computes with them in its own precision; or they are the model's own weights in
bfloat16, each step of which is rounded stochastically.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten
from numpy.typing import NDArray

from mlx_sft.errors import USAGE, UserError
from mlx_sft.methods import Method, Parameters, Rows, WeightEdit
from mlx_sft.methods.layers import LayersSettings, chosen_layers, layer_number, layer_prefixes, written_layers
from mlx_sft.model.head import HEAD_WEIGHT, floating_weights, repeated_layers
from mlx_sft.model.linears import is_quantized
from mlx_sft.model.names import transformers_name
from mlx_sft.safetensors_file import StoredTensor, open_safetensors, read_arrays, read_rows, write_arrays
from mlx_sft.writing import make_folder, write_file_with

WEIGHTS_FILE = "model.safetensors"

_EMBEDDINGS = "model.embed_tokens.weight"

_NOT_DECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


@dataclass(frozen=True, kw_only=True)
class Replacement(WeightEdit):
    """W → the trained weight, whose rows are read from its file as they are asked for."""

    trained: StoredTensor

    def rows(self, base: Rows, start: int, stop: int, expert: int | None = None) -> NDArray[np.float32]:
        if expert is None:
            return read_rows(self.trained, start, stop)
        experts, rows, *rest = self.trained.shape
        flat = replace(self.trained, shape=(experts * rows, *rest))
        return read_rows(flat, expert * rows + start, expert * rows + stop)


def is_decayed(name: str) -> bool:
    """As transformers' Trainer, whose patterns these are: weight decay for all but norms and biases."""
    return _NOT_DECAYED.search(name.lower()) is None


class FullSettings(LayersSettings):
    """What of the model is trained, and in which precision it is kept."""

    master_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which trained weights are kept: bfloat16 takes half the memory; each step is rounded stochastically."""


class Full(Method):
    """The method `full`. Parameters: every floating weight under its name in transformers, such as `model.norm.weight`; of some
    layers those that are in them."""

    name: ClassVar = "full"
    Settings: ClassVar = FullSettings
    frozen_base: ClassVar = False
    mergeable: ClassVar = True
    folder: ClassVar = "weights"
    usual_rate_factor: ClassVar = (
        0.1  # Thinking Machines (2025), LoRA without regret: on 14 models LoRA's best is ten times this one's
    )
    learning_rates: ClassVar = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)

    settings: FullSettings

    def __init__(self, settings: FullSettings | None = None) -> None:
        super().__init__(settings)
        self._places: dict[str, tuple[str, mx.Dtype]] = {}

    def for_new_tokens(self, token_ids: Sequence[int], *, from_adapter: bool) -> dict[str, Any]:
        if token_ids and self.settings.layers is not None:
            what = "--layers trains no embeddings, so that new tokens would mean nothing"
            raise UserError(what, where="add_tokens", hint="leave --layers out", exit_code=USAGE)
        return {}

    def attach(self, model: nn.Module, seed: int) -> Parameters:
        """Return float32 masters of the weights, or those that the model has in bfloat16 as they are; nothing here is random.

        Raises:
            UserError: Where they are quantized, the model does not have the layers, or computes in another precision than bfloat16.
        """
        if any(is_quantized(module) for module in model.modules()):
            hint = "train adapters on it with --method lora, or give the original"
            raise UserError("the weights of this model are quantized, and cannot be trained", hint=hint)
        weights = self._trained(model)
        self._places = {transformers_name(path): (path, weight.dtype) for path, weight in weights.items()}
        if self.settings.master_dtype == "float32":
            return {transformers_name(path): weight.astype(mx.float32) for path, weight in weights.items()}
        if all(weight.dtype != mx.bfloat16 for weight in weights.values()):
            what = (
                "--master-dtype bfloat16 is for a model that computes in bfloat16, whose weights it takes as they are"
            )
            raise UserError(what, where="master_dtype", hint="give --dtype bfloat16", exit_code=USAGE)
        # What a model has in float32 all the same, such as the decay of a recurrence, stays so.
        return {
            transformers_name(path): weight if weight.dtype == mx.bfloat16 else weight.astype(mx.float32)
            for path, weight in weights.items()
        }

    def _trained(self, model: nn.Module) -> dict[str, mx.array]:
        """The weights that are trained by their MLX names, no longer frozen."""
        layers, weights = self.settings.layers, floating_weights(model)
        if layers is None:
            model.unfreeze()
            return weights
        prefixes = layer_prefixes(model)
        chosen = chosen_layers(layers, len(prefixes))
        for number in chosen:
            repeated_layers(model)[number].unfreeze()
        within = tuple(prefixes[number] for number in chosen)
        return {path: weight for path, weight in weights.items() if transformers_name(path).startswith(within)}

    def bind(self, model: nn.Module, parameters: Parameters, key: mx.array | None = None) -> None:
        places = [(*self._places[name], value) for name, value in parameters.items()]
        model.update(tree_unflatten([(path, value.astype(dtype)) for path, dtype, value in places]))

    def decayed(self, name: str) -> bool:
        return is_decayed(name)

    def changed_shapes(self, parameters: Parameters) -> dict[str, tuple[int, ...]]:
        return {name: value.shape for name, value in parameters.items()}

    def changed_weight(self, name: str, weight: mx.array, parameters: Parameters) -> mx.array:
        return parameters[name].astype(mx.float32)

    def of_checkpoint(self, kept: Parameters) -> tuple[Full, Parameters]:
        """For a model of any precision."""
        return Full(FullSettings(layers=self.settings.layers)), kept

    @classmethod
    def edits(cls, folder: Path) -> dict[str, WeightEdit]:
        trained = open_safetensors(folder / WEIGHTS_FILE).tensors
        edits: dict[str, WeightEdit] = {one.name: Replacement(shape=one.shape, trained=one) for one in trained}
        # A checkpoint may store a tied head besides the embeddings; a stale copy would no longer be tied.
        if _EMBEDDINGS in edits and HEAD_WEIGHT not in edits:
            edits[HEAD_WEIGHT] = replace(edits[_EMBEDDINGS], optional=True)
        return edits

    def write(self, folder: Path, parameters: Parameters, base_model: str, revision: str | None = None) -> None:
        make_folder(folder)
        write_file_with(folder / WEIGHTS_FILE, lambda path: write_arrays(path, parameters, {"format": "mlx"}))

    @classmethod
    def read(cls, folder: Path) -> tuple[Full, Parameters]:
        parameters = {name: mx.array(value) for name, value in read_arrays(folder / WEIGHTS_FILE)}
        numbers = [layer_number(name) for name in parameters]
        layers = None if None in numbers else written_layers(number for number in numbers if number is not None)
        return cls(FullSettings(layers=layers)), parameters

    @property
    def title(self) -> str:
        return "full fine-tuning"

    def describe(self) -> str:
        return f"every weight of the layers `{self.settings.layers}`" if self.settings.layers else "every weight"
