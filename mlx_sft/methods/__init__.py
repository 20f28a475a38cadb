"""What is trained. A method attaches to a frozen model, hands out its parameters by name, and binds them for a forward pass.

A further method is one more file with a subclass of `Method`, and a line in `ENTRIES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from mlx_sft.config import TrainConfig
from mlx_sft.errors import USAGE, UserError
from mlx_sft.files import read_json
from mlx_sft.gate import checked
from mlx_sft.registry import METHODS
from mlx_sft.safetensors_file import read_arrays, write_arrays
from mlx_sft.settings import Settings as NoSettings
from mlx_sft.writing import make_folder, write_file, write_file_with

ENTRIES = {
    "lora": "mlx_sft.methods.lora:Lora",
    "full": "mlx_sft.methods.full:Full",
    "prompt": "mlx_sft.methods.prompt:Prompt",
    "p-tuning": "mlx_sft.methods.p_tuning:PTuning",
    "bottleneck": "mlx_sft.methods.bottleneck:BottleneckAdapters",
    "prefix": "mlx_sft.methods.prefix:Prefix",
}

Parameters = dict[str, mx.array]
"""Trainable arrays by name, flat: float32, or what a method keeps in bfloat16."""

Rows = Callable[[int, int], NDArray[np.float32]]
"""`rows(start, stop)`: these rows of a tensor, float32."""

_PARAMETERS, _SETTINGS = "parameters.safetensors", "method.json"


@dataclass(frozen=True, kw_only=True)
class WeightEdit:
    """What training made of one weight of the model, a few rows at a time, so that no whole weight need be in memory.

    Attributes:
        shape: The weight's: [out, in], or [experts, out, in] for the experts of a layer; None for the one that the checkpoint has.
        optional: Whether a checkpoint may lack this weight, as it may a copy of tied embeddings.
        at_once: Whether all rows are asked for at once.
        alone: Whether it is of embeddings and not of a head that is tied to them, or of the head alone.
    """

    shape: tuple[int, ...] | None
    optional: bool = False
    at_once: bool = False
    alone: bool = False

    def rows(self, base: Rows, start: int, stop: int, expert: int | None = None) -> NDArray[np.float32]:
        """The new rows `start` to `stop`, float32; of one expert's matrix where the checkpoint has a tensor for each."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class WholeWeight(WeightEdit):
    """The edit of a method that says no more than `changed_weight`; the weight is in memory as a whole while it is written."""

    method: Method
    parameters: Parameters
    name: str

    def rows(self, base: Rows, start: int, stop: int, expert: int | None = None) -> NDArray[np.float32]:
        if expert is not None:
            raise NotImplementedError("a method that changes experts has `edits` of its own")
        return np.array(self.method.changed_weight(self.name, mx.array(base(start, stop)), self.parameters), np.float32)


class Method:
    """One method. `attach` and `bind` are all that a method must have; the rest says how it differs from an adapter of modules.

    Attributes:
        name: By which the configuration chooses it.
        Settings: Its settings, each of which becomes an option.
        settings: The chosen ones.
        frozen_base: Whether the model's own weights stay as they are, so that they may be quantized.
        mergeable: Whether what it trains can be written into the model's weights; `changed_shapes`, `changed_weight` and `edits`
            say how. A run of a method that is not is refused by every export with merged weights.
        unmergeable: Why not, behind the method's name.
        alone: The export format in which its result goes out without the base.
        mlx_lm: The module that writes and reads its result in mlx-lm's form; None where mlx-lm has no such adapter.
        peft: Whether the files of its result are PEFT's, so that PEFT opens them.
        in_peft_generate: Further arguments without which PEFT's `generate` does not give what was trained, for the model card.
        starts_in_trl: Whether PEFT's form of its parameters at the start is one that TRL goes on from.
        usual_rate_factor: The learning rate that suits it where none is given, in parts of LoRA's.
        learning_rates: The peaks that `compare` tries, rising: a range in which one is good, on small models and on large ones.
        variants: Settings that have a name of their own there, by that name.
        short_names: Of settings, as they may be written there.
        folder: What the folder of its result is called in a run.
        begun: Whether the parameters come from a checkpoint, so that of those that `attach` gives the shapes alone matter.
    """

    name: ClassVar[str]
    Settings: ClassVar[type[NoSettings]] = NoSettings
    frozen_base: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    unmergeable: ClassVar[str] = "changes no weight of the model, so that nothing can be merged into it"
    alone: ClassVar[str] = "peft"
    mlx_lm: ClassVar[Any] = None
    peft: ClassVar[bool] = False
    in_peft_generate: ClassVar[str] = ""
    starts_in_trl: ClassVar[bool] = False
    usual_rate_factor: ClassVar[float] = 1.0
    learning_rates: ClassVar[tuple[float, ...]] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    short_names: ClassVar[Mapping[str, str]] = {}
    folder: ClassVar[str] = "adapter"
    begun: bool = False

    def __init__(self, settings: Any = None) -> None:
        self.settings: Any = settings if settings is not None else self.Settings()

    # Training

    @property
    def uses_dropout(self) -> bool:
        """Whether `bind` is to be given a random key in training."""
        return False

    @property
    def virtual_tokens(self) -> int:
        """Positions that `run_body` computes in front of each row: they take time and memory, and are not counted by --max-length."""
        return 0

    @property
    def keys_in_front(self) -> int:
        """Keys and values in front of those of each row in the attention of every layer, made of the parameters: they take no pass
        through the layers, and are not counted by --max-length."""
        return 0

    @property
    def most_positions(self) -> int | None:
        """Positions up to which a row is exact, with those in front of it; rows that have a limit are not joined."""
        return None

    def read_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take from the tokenizer what the settings need of it; called before `attach` where training starts."""

    def for_new_tokens(self, token_ids: Sequence[int], *, from_adapter: bool) -> dict[str, Any]:
        """The settings that change where the tokenizer gets tokens with these ids, if any.

        Args:
            from_adapter: Whether an existing adapter decides over the settings.

        Raises:
            UserError: If nothing that is trained would tell these tokens from each other.
        """
        if token_ids and self.frozen_base:
            what = f"--method {self.name} trains no embeddings, so that new tokens would mean nothing"
            raise UserError(
                what, where="add_tokens", hint="give --method lora with --train-new-tokens", exit_code=USAGE
            )
        return {}

    def attach(self, model: nn.Module, seed: int) -> Parameters:
        """Prepare a frozen model and return the parameters as training starts with them; raises `UserError` where it cannot.

        Settings may become what they mean on this model.
        """
        raise NotImplementedError

    def bind(self, model: nn.Module, parameters: Parameters, key: mx.array | None = None) -> None:
        """Put parameters (all, or some of them) into the model; a random key switches dropout on."""
        raise NotImplementedError

    def rounded(self, parameters: Parameters) -> Parameters:
        """What the model computes with in place of the parameters, where it is not float32: made once a step, and bound in their place.

        It is linear in each parameter, and `unrounded` makes of the gradients with respect to it those of the parameters, float32.
        """
        return parameters

    def unrounded(self, gradients: Parameters) -> Parameters:
        """See `rounded`."""
        return gradients

    def run_body(self, body: Callable[..., mx.array], token_ids: mx.array) -> mx.array:
        """The model's body on [rows, width] tokens → hidden states [rows, width, hidden], with the parameters that are bound.

        A method with virtual tokens calls `body(token_ids, input_embeddings=...)` and cuts their states off; one with a prefix
        gives `body(token_ids, cache=...)`.
        """
        return body(token_ids)

    def decayed(self, name: str) -> bool:
        """Whether weight decay applies to this parameter."""
        return True

    def rate(self, name: str, peak: float) -> float:
        """The peak learning rate of this parameter, where that of the run is `peak`; it follows the same course."""
        return peak

    @property
    def fixed(self) -> Parameters:
        """What a checkpoint keeps beside the parameters, by other names: what is not trained, nor computed again to the last bit."""
        return {}

    def take_up(self, kept: Parameters) -> Parameters:
        """Take up what a checkpoint keeps, parameters and what is `fixed`; the parameters of it are returned."""
        return kept

    def of_checkpoint(self, kept: Parameters) -> tuple[Method, Parameters]:
        """What `read` would give of the result that a run has as it stands in a checkpoint."""
        return self, kept

    def drops(self, name: str) -> bool:
        """Whether there is dropout on what this parameter is multiplied with."""
        return self.uses_dropout

    def in_head(self, name: str) -> bool:
        """Whether the output head may use this parameter, which is in none of the repeated layers."""
        return True

    def start_note(self) -> str:
        """What a person should know of how training starts; empty where there is nothing."""
        return ""

    def release(self, model: nn.Module) -> None:
        """Let go of what only `detach` needs; training calls it, and takes nothing off."""

    @staticmethod
    def detach(model: nn.Module) -> Callable[[], None]:
        """Take everything that the method attached off a model; calling the result puts it back."""
        return lambda: None

    # After training

    def generation_cache(self, model: nn.Module) -> list[Any] | None:
        """A new key/value cache, with which generation starts; None for an empty one. Raises `UserError` where it cannot start."""
        if type(self).run_body is not Method.run_body:
            what = f"--method {self.name} runs the model in a way of its own, and does not say how generation starts"
            raise UserError(
                what, hint="whoever wrote it can add `generation_cache`; `mlx-sft eval` measures it as it is"
            )
        return None

    def changed_shapes(self, parameters: Parameters) -> Mapping[str, tuple[int, ...] | None]:
        """transformers' name of every weight of the model that the parameters change, and its shape; None where they do not tell it."""
        return {}

    def changed_weight(self, name: str, weight: mx.array, parameters: Parameters) -> mx.array:
        """What the parameters make of one of those weights; float32, not yet rounded."""
        raise NotImplementedError

    def scaled(self, parameters: Parameters, strength: float) -> Parameters:
        """The parameters with which what is added to the model is multiplied with `strength`; raises `UserError` where none are."""
        what = f"--strength scales what is added to a model's own results, and --method {self.name} adds nothing of that kind"
        raise UserError(what, hint="leave --strength out", exit_code=USAGE)

    @classmethod
    def edits(cls, folder: Path) -> dict[str, WeightEdit]:
        """What the result in `folder` makes of the model's weights, by their names in transformers."""
        method, parameters = cls.read(folder)
        return {
            name: WholeWeight(shape=shape, at_once=True, method=method, parameters=parameters, name=name)
            for name, shape in method.changed_shapes(parameters).items()
        }

    # Files

    def of_model(self, model: nn.Module, trained: Parameters, where: Path) -> Parameters:
        """What `read` gave, as this model has it, where a file says it in a form that only the model makes clear.

        Raises:
            UserError: If it cannot be for this model.
        """
        return trained

    def write(self, folder: Path, parameters: Parameters, base_model: str, revision: str | None = None) -> None:
        """Write the result; each file is the old or the new one at every instant.

        Args:
            folder: Made where it is not there.
            base_model: Name or path by which others find the base.
            revision: Its commit on the Hub, where it is known.
        """
        make_folder(folder)
        write_file_with(folder / _PARAMETERS, lambda path: write_arrays(path, parameters, {"format": "mlx"}))
        stated = {"method": self.name, "base_model": base_model, "revision": revision}
        write_file(
            folder / _SETTINGS, json.dumps(stated | {"settings": self.settings.model_dump(mode="json")}, indent=2)
        )

    def written_bytes(self, parameters: Parameters) -> int:
        """What `write` takes on the disk for these parameters, but for a few kilobytes."""
        return sum(value.nbytes for value in parameters.values())

    @classmethod
    def read(cls, folder: Path) -> tuple[Method, Parameters]:
        """What `write` wrote, float32; raises `UserError` where it is not whole."""
        stated = read_json(checked(folder, for_libraries=False) / _SETTINGS)
        try:
            method = cls(cls.Settings(**stated["settings"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"its settings cannot be read: {error}", where=str(folder / _SETTINGS)) from error
        return method, {name: mx.array(value) for name, value in read_arrays(folder / _PARAMETERS)}

    @classmethod
    def recognizes(cls, folder: Path) -> bool:
        """Whether a folder holds a result of this method, written here or by PEFT."""
        return (folder / _SETTINGS).is_file() and read_json(folder / _SETTINGS).get("method") == cls.name

    @classmethod
    def base_model(cls, folder: Path) -> str:
        """The name or path of the base that a result says it belongs to; an empty string where it says none."""
        stated = read_json(folder / _SETTINGS).get("base_model")
        return stated if isinstance(stated, str) else ""

    def decides(self, where: Path) -> dict[str, Any]:
        """The settings that a result on disk decides over when training starts from it; raises `UserError` where it cannot start."""
        decided: dict[str, Any] = self.settings.model_dump()
        return decided

    def agrees(self, model: nn.Module, name: str, given: Any) -> bool:
        """Whether a setting that was given means on this model what the result on disk says."""
        return bool(given == getattr(self.settings, name))

    def not_in_trl(self) -> str:
        """Why TRL cannot train it with these settings as it is trained here; empty where it can."""
        return ""

    # Words

    @property
    def title(self) -> str:
        """What the method is called in a sentence."""
        return self.name

    def describe(self) -> str:
        """What a model card says of the method and its settings, on one line; names are in backticks."""
        return self.title


def make_method(config: TrainConfig) -> Method:
    """The method that a configuration asks for."""
    kind: type[Method] = METHODS[config.method]
    return kind(config.settings(kind.Settings))


def for_new_tokens(config: TrainConfig, token_ids: Sequence[int]) -> TrainConfig:
    """The configuration for a tokenizer that has got tokens with these ids; raises `UserError` where they would not be trained."""
    from_adapter = config.init_adapter is not None or config.resume_from_peft is not None
    changes = make_method(config).for_new_tokens(token_ids, from_adapter=from_adapter)
    return config.model_copy(update=changes) if changes else config


def as_attached(config: TrainConfig, method: Method) -> TrainConfig:
    """The configuration with a method's settings as they became when it was attached to a model."""
    settings = {name: getattr(method.settings, name) for name in type(method.settings).model_fields}
    changes = {name: value for name, value in settings.items() if getattr(config, name) != value}
    return config.model_copy(update=changes) if changes else config


def method_in(folder: Path) -> type[Method]:
    """The method whose result a folder holds; where no method knows it, the default one, which says what is missing."""
    default: type[Method] = METHODS[TrainConfig.model_fields["method"].default]
    others = (entry for _, entry in METHODS.items() if entry is not default)  # which takes any adapter for its own
    return next((entry for entry in others if entry.frozen_base and entry.recognizes(folder)), default)


__all__ = [
    "ENTRIES",
    "Method",
    "Parameters",
    "Rows",
    "WeightEdit",
    "as_attached",
    "for_new_tokens",
    "make_method",
    "method_in",
]
