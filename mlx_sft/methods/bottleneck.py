"""Bottleneck adapters: h + scale · up(act(down(x))) behind parts of each layer, in the files of the `adapters` library (AdapterHub, 1.3.0).

```
adapter_config.json   the library's settings: of double_seq_bn (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751), seq_bn (Pfeiffer
                      et al. 2020, https://arxiv.org/abs/2005.00247) or par_bn (He et al. 2022, https://arxiv.org/abs/2110.04366)
adapter.safetensors   model.layers.0.output_adapters.adapters.mlx_sft.adapter_down.0.weight [inner, width] and .bias [inner],
                      .adapter_up.weight [width, inner] and .bias [width], float32; .attention_adapters. where they follow attention
```
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlx_sft.errors import UserError
from mlx_sft.files import read_json, to_json
from mlx_sft.gate import checked
from mlx_sft.methods import Method, Parameters
from mlx_sft.methods.bottleneck_layers import (
    AFTER_ATTENTION,
    AFTER_MLP,
    HINT,
    Bottleneck,
    Reads,
    adapted_layer,
    places,
    plain_layer,
    try_layers,
)
from mlx_sft.methods.full import is_decayed
from mlx_sft.methods.layers import LayersSettings, chosen_layers, layer_number, layer_prefixes, written_layers
from mlx_sft.methods.peft_base import peft_base
from mlx_sft.methods.peft_files import CONFIG, read_config
from mlx_sft.model.head import floating_weights, repeated_layers
from mlx_sft.safetensors_file import SafetensorsFile, open_safetensors, read_float32, write_arrays
from mlx_sft.settings import first_problem
from mlx_sft.writing import make_folder, write_file, write_file_with

WEIGHTS = "adapter.safetensors"

Activation = Literal["relu", "leakyrelu", "gelu", "gelu_new", "swish", "tanh", "sigmoid"]

_NAME = "mlx_sft"
"""Of the adapter, in the names of its tensors."""

_TENSOR = re.compile(
    r"(.+\.(?:attention|output)_adapters)\.adapters\.([^.]+)\.(adapter_(?:down\.0|up)\.(?:weight|bias))"
)

_SAME_ACTIVATION = {"silu": "swish", "gelu_pytorch_tanh": "gelu_new"}
_OLD_ACTIVATION = {"gelu": "gelu_new", "gelu_orig": "gelu"}
"""Names in files without a version, and their names since."""


class BottleneckSettings(LayersSettings):
    """Settings of the method `bottleneck`."""

    bottleneck_form: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """Where adapters stand: houlsby, after attention and after the MLP; pfeiffer, after the MLP alone; parallel, beside the MLP."""
    reduction_factor: float = Field(default=16, ge=0.01)
    """How many times narrower than the hidden states the bottleneck is."""
    activation: Activation = "relu"
    """The function inside: relu, leakyrelu, gelu, gelu_new (by tanh), swish, tanh or sigmoid."""
    bottleneck_scale: float = Field(default=1.0, gt=0)
    """What an adapter adds is multiplied with this."""
    bottleneck_init: Literal["identity", "bert"] = "identity"
    """How adapters start: identity (the second matrix at zero, so that the model is as it was), or bert (both from N(0, 0.02), as the
    adapters library does)."""

    @property
    def names(self) -> tuple[str, ...]:
        """What a layer calls the adapters that it gets."""
        return (AFTER_ATTENTION, AFTER_MLP) if self.bottleneck_form == "houlsby" else (AFTER_MLP,)

    @property
    def reads(self) -> Reads:
        """What the adapters read."""
        forms: dict[str, Reads] = {"houlsby": "output", "pfeiffer": "sum", "parallel": "residual"}
        return forms[self.bottleneck_form]

    def inner(self, width: int) -> int:
        """Width of the bottleneck: at least 1."""
        return max(1, int(width // self.reduction_factor))


class _Stated(BaseModel):
    """What is read of the library's settings; those that would compute otherwise have the one value that does not."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    architecture: None = None
    mh_adapter: bool
    output_adapter: Literal[True]
    is_parallel: bool = False
    original_ln_before: bool = False
    original_ln_after: Literal[True] = True
    residual_before_ln: Literal[True] = True
    adapter_residual_before_ln: Literal[False] = False
    ln_before: Literal[False] = False
    ln_after: Literal[False] = False
    use_gating: Literal[False] = False
    phm_layer: Literal[False] = False
    inv_adapter: None = None
    reduction_factor: Annotated[float, Field(ge=0.01)]
    non_linearity: str
    scaling: Annotated[float, Field(gt=0)] = 1.0
    init_weights: str = "bert"
    leave_out: list[int] = Field(default_factory=list)

    @property
    def form(self) -> str | None:
        """By our name; None for another one."""
        forms = {(True, False, False): "houlsby", (False, False, True): "pfeiffer"}
        return forms.get((self.mh_adapter, self.is_parallel, self.original_ln_before), self._parallel)

    @property
    def _parallel(self) -> str | None:
        return "parallel" if self.is_parallel and not self.mh_adapter else None


class BottleneckAdapters(Method):
    """The method `bottleneck`.

    Parameters, of each layer: `<layer>.output_adapters.adapter_down.0.weight` [inner, width] and `.adapter_up.weight` [width, inner], each
    with a `.bias`; with the form houlsby those of `<layer>.attention_adapters` too.
    """

    name: ClassVar = "bottleneck"
    Settings: ClassVar = BottleneckSettings
    alone: ClassVar = "adapters"
    unmergeable: ClassVar = "trains functions that are not linear, which no weight of the model can stand for"

    settings: BottleneckSettings

    def __init__(self, settings: BottleneckSettings | None = None) -> None:
        super().__init__(settings)
        self._modules: dict[str, Bottleneck] = {}
        self._dtype = mx.float32
        self._leave_out: list[int] = []
        """Layers without adapters."""

    def attach(self, model: nn.Module, seed: int) -> Parameters:
        """Put the adapters into the layers.

        Raises:
            UserError: If nothing of its layers is known to be attention or an MLP, or these stand otherwise than adapters need.
        """
        self._dtype = next(iter(floating_weights(model).values())).dtype
        layers, found = repeated_layers(model), places(model, self.settings.names)
        chosen = set(chosen_layers(self.settings.layers, len(layers)))
        self._leave_out = [number for number in range(len(layers)) if number not in chosen]
        paths = {id(module): path for path, module in model.named_modules()}
        self._modules = {}
        for number, prefix in enumerate(layer_prefixes(model)):
            adapters = {name: self._module(width) for name, width in found[number].items() if number in chosen}
            if adapters:
                self._modules |= {f"{prefix}{name}": adapter for name, adapter in adapters.items()}
                adapted = adapted_layer(layers[number], adapters, self.settings.reads)
                model.update_modules(tree_unflatten([(paths[id(layers[number])], adapted)]))
        if not self._modules:
            raise UserError(
                "no layer of this model has a part that an adapter is known to follow", where="method", hint=HINT
            )
        try_layers(model)
        parameters = self._start(seed)
        self.bind(model, parameters)
        return parameters

    def _module(self, width: int) -> Bottleneck:
        settings = self.settings
        return Bottleneck(width, settings.inner(width), settings.activation, settings.bottleneck_scale)

    def _start(self, seed: int) -> Parameters:
        """Biases are zero. `identity` is the library's `mam_adapter`: torch's kaiming_uniform_(a=sqrt(5)), and zero."""
        parameters: Parameters = {}
        keys = mx.random.split(mx.random.key(seed), 2 * max(len(self._modules), 2))
        for number, (name, module) in enumerate(self._modules.items()):
            down, up = keys[2 * number], keys[2 * number + 1]
            for part, value in module.arrays().items():
                if self.settings.bottleneck_init == "bert" and part.endswith("weight"):
                    value = mx.random.normal(value.shape, scale=0.02, key=up if "up" in part else down)
                elif part == "adapter_down.0.weight":
                    bound = 1 / math.sqrt(value.shape[1])
                    value = mx.random.uniform(-bound, bound, value.shape, key=down)
                parameters[f"{name}.{part}"] = value
        return parameters

    def bind(self, model: nn.Module, parameters: Parameters, key: mx.array | None = None) -> None:
        for name, module in self._modules.items():
            names = {part: f"{name}.{part}" for part in module.arrays()}
            given = [(part, parameters[name]) for part, name in names.items() if name in parameters]
            module.update(tree_unflatten(given))

    def rounded(self, parameters: Parameters) -> Parameters:
        return {name: value.astype(self._dtype) for name, value in parameters.items()}

    def unrounded(self, gradients: Parameters) -> Parameters:
        return {name: value.astype(mx.float32) for name, value in gradients.items()}

    def decayed(self, name: str) -> bool:
        return is_decayed(name)

    @staticmethod
    def detach(model: nn.Module) -> Callable[[], None]:
        taken = {path: module for path, module in model.named_modules() if plain_layer(module) is not None}
        for path, module in taken.items():
            model.update_modules(tree_unflatten([(path, plain_layer(module))]))

        def again() -> None:
            for path, module in taken.items():
                model.update_modules(tree_unflatten([(path, module)]))

        return again

    def scaled(self, parameters: Parameters, strength: float) -> Parameters:
        """With strength times what each adapter adds in its place."""
        return {name: strength * value if ".adapter_up." in name else value for name, value in parameters.items()}

    def write(self, folder: Path, parameters: Parameters, base_model: str, revision: str | None = None) -> None:
        settings, base = self.settings, peft_base(base_model)
        make_folder(folder)
        arrays = {_stored(name): value for name, value in parameters.items()}
        write_file_with(folder / WEIGHTS, lambda path: write_arrays(path, arrays, {"format": "pt"}))
        form = settings.bottleneck_form
        config = {
            "config": {
                "architecture": None,
                "mh_adapter": form == "houlsby",
                "output_adapter": True,
                "is_parallel": form == "parallel",
                "original_ln_before": form == "pfeiffer",
                "original_ln_after": True,
                "residual_before_ln": True,
                "reduction_factor": settings.reduction_factor,
                "non_linearity": settings.activation,
                "scaling": settings.bottleneck_scale,
                "init_weights": "bert" if settings.bottleneck_init == "bert" else "mam_adapter",
                "leave_out": self._leave_out,
            },
            "hidden_size": max(value.shape[0] for name, value in parameters.items() if name.endswith("up.bias")),
            "model_name": base_model,
            "model_type": base.opening.family if base is not None and base.opening is not None else None,
            "name": _NAME,
            "revision": revision,
            "version": "adapters.1.3.0",
        }
        write_file(folder / CONFIG, to_json(config))

    @classmethod
    def read(cls, folder: Path) -> tuple[BottleneckAdapters, Parameters]:
        config, where = read_config(folder / CONFIG), str(folder / CONFIG)
        if not _is_bottleneck(config):
            what = f"it is no file of the adapters library's bottlenecks, which --method {cls.name} reads"
            raise UserError(what, where=where, hint="give the --method that it was trained with")
        try:
            stated = _Stated.model_validate(config["config"])
        except ValidationError as error:
            raise UserError(first_problem(error), where=where, hint=_READ) from error
        if stated.form is None:
            what = "it stands where none of these forms does: double_seq_bn, seq_bn and par_bn"
            raise UserError(what, where=where, hint=_READ)
        activation = stated.non_linearity.lower()
        activation = activation if config.get("version") else _OLD_ACTIVATION.get(activation, activation)
        parameters = _read_tensors(folder)
        numbers = {number for name in parameters if (number := layer_number(name)) is not None}
        try:
            settings = BottleneckSettings.model_validate(
                {
                    "bottleneck_form": stated.form,
                    "reduction_factor": stated.reduction_factor,
                    "activation": _SAME_ACTIVATION.get(activation, activation),
                    "bottleneck_scale": stated.scaling,
                    "bottleneck_init": "bert" if stated.init_weights == "bert" else "identity",
                    "layers": written_layers(numbers) if stated.leave_out else None,
                }
            )
        except ValidationError as error:
            raise UserError(first_problem(error), where=where, hint=_READ) from error
        method = cls(settings)
        method._leave_out = stated.leave_out
        return method, parameters

    @classmethod
    def recognizes(cls, folder: Path) -> bool:
        return (folder / CONFIG).is_file() and _is_bottleneck(read_json(checked(folder) / CONFIG))

    @classmethod
    def base_model(cls, folder: Path) -> str:
        stated = read_config(folder / CONFIG).get("model_name")
        return stated if isinstance(stated, str) else ""

    def decides(self, where: Path) -> dict[str, Any]:
        return self.settings.model_dump(exclude={"bottleneck_init"})

    def agrees(self, model: nn.Module, name: str, given: Any) -> bool:
        if name != "layers":
            return super().agrees(model, name, given)
        number = len(repeated_layers(model))
        return chosen_layers(given, number) == chosen_layers(self.settings.layers, number)

    @property
    def title(self) -> str:
        return "bottleneck"

    def describe(self) -> str:
        settings = self.settings
        where = {"houlsby": "after attention and MLP", "pfeiffer": "after the MLP", "parallel": "beside the MLP"}
        scale = f", scaled by {settings.bottleneck_scale:g}" if settings.bottleneck_scale != 1 else ""
        layers = f" of the layers `{settings.layers}`" if settings.layers else ""
        return (
            f"bottleneck adapters {where[settings.bottleneck_form]}{layers}, reduction factor {settings.reduction_factor:g}, "
            f"with `{settings.activation}`{scale}"
        )


_READ = "bottlenecks of plain matrices with a fixed scale are read, as double_seq_bn, seq_bn and par_bn make them"


def _is_bottleneck(config: Mapping[str, Any]) -> bool:
    inner = config.get("config")
    return isinstance(inner, dict) and "reduction_factor" in inner and inner.get("architecture") is None


def _stored(name: str) -> str:
    """`model.layers.0.output_adapters.adapter_up.bias` → the library's name of the same tensor."""
    return re.sub(r"_adapters\.", rf"_adapters.adapters.{_NAME}.", name, count=1)


def _read_tensors(folder: Path) -> Parameters:
    path = folder / WEIGHTS
    if not path.is_file() and (folder / "pytorch_adapter.bin").is_file():
        hint = "save it again with `save_adapter(..., use_safetensors=True)`"
        raise UserError(
            "pytorch_adapter.bin is a pickle, which could run code and is not read", where=str(folder), hint=hint
        )
    file: SafetensorsFile = open_safetensors(path)
    parameters: Parameters = {}
    for tensor in file.tensors:
        found = _TENSOR.fullmatch(tensor.name)
        if found is None or f"{found[1]}.{found[3]}" in parameters:
            what = f"{tensor.name} is no tensor of one bottleneck adapter"
            raise UserError(what, where=str(path), hint=_READ)
        parameters[f"{found[1]}.{found[3]}"] = mx.array(read_float32(tensor))
    return parameters
