"""Where mlx-lm's code for a family computes, or reads, another model than the checkpoint is: what is computed here instead.

Each entry is measured beside transformers. What cannot be put right here is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.gemma3_text import Gemma3Model

from mlx_sft.errors import UserError
from mlx_sft.model.falcon_h1 import FalconH1Layer, unmultiplied, with_multipliers
from mlx_sft.model.gemma3n import Gemma3n
from mlx_sft.model.head import language_model, repeated_layers

Weights = dict[str, mx.array]
Settings = dict[str, Any]


class GeluMLP(nn.Module):
    """down(gelu(gate(x)) · up(x)), or out(gelu(in(x))), with the GELU that the settings name.

    mlx-lm's code for these families has the exact one where the settings say `tanh`, or the other way round.
    """

    def __init__(self, mlp: nn.Module, names: tuple[str, ...], gelu: Callable[[mx.array], mx.array]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        for name in names:
            self[name] = mlp[name]
        self._names, self._gelu = names, gelu

    def __call__(self, x: mx.array) -> mx.array:
        first, *factor, last = (self[name] for name in self._names)
        hidden = self._gelu(first(x))
        result: mx.array = last(hidden * factor[0](x) if factor else hidden)
        return result


class GroupedGatedRMSNorm(nn.Module):
    """The norm of x · silu(gate), of each group of numbers by itself. mlx-lm's code for these families takes all groups together."""

    def __init__(self, norm: Any, groups: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weight, self._eps, self._groups = norm.weight, norm.eps, groups

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        gated = x.astype(mx.float32) * nn.silu(gate.astype(mx.float32))
        groups = gated.reshape(*gated.shape[:-1], self._groups, -1)
        normed: mx.array = mx.fast.rms_norm(groups, None, self._eps).reshape(gated.shape)
        weighted: mx.array = self.weight * normed.astype(x.dtype)
        return weighted


class BiasedRouting(nn.Module):
    """ERNIE 4.5's experts, chosen by their probability and a bias of each, and weighted by the probability alone.

    mlx-lm's code throws the bias away.
    """

    def __init__(self, block: Any, least: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gate, self.switch_mlp, self.gate_act = block.gate, block.switch_mlp, block.gate_act
        if block.shared_experts is not None:
            self.shared_experts = block.shared_experts
        self.moe_statics = _RoutingBias(block.gate.weight.shape[0])
        self._chosen, self._least = block.k, least

    def __call__(self, x: mx.array) -> mx.array:
        probabilities = self.gate_act(self.gate(x).astype(mx.float32))
        biased = probabilities + self.moe_statics.e_score_correction_bias.squeeze()
        chosen = mx.stop_gradient(mx.argpartition(-biased, kth=self._chosen - 1, axis=-1)[..., : self._chosen])
        weights = mx.take_along_axis(probabilities, chosen, axis=-1)
        weights = weights / mx.maximum(weights.sum(axis=-1, keepdims=True), self._least)
        y = self.switch_mlp(x, chosen)
        y = (y * weights[..., None]).sum(axis=-2).astype(y.dtype)
        result: mx.array = y + self.shared_experts(x) if "shared_experts" in self else y
        return result


class Gemma3Body(Gemma3Model):
    """Gemma 3's, with embeddings multiplied by the root of their width as the type of the weights has it.

    mlx-lm's code takes bfloat16's of it whatever the type: 34 instead of 33.94 for a width of 1,152.
    """

    _as_in_mlx_lm = False

    def give_mlx_form(self) -> None:
        """From now on multiply as mlx-lm does, also in float32, where the weights are bfloat16: then it is the same number."""
        self._as_in_mlx_lm = self.norm.weight.dtype == mx.bfloat16

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        embeddings = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        own = str(embeddings.dtype).rpartition(".")[2]
        right, taken = (float(np.array(self.args.hidden_size**0.5, dtype)) for dtype in (own, ml_dtypes.bfloat16))
        if right != taken and not self._as_in_mlx_lm:
            embeddings = embeddings * (right / taken)
        states: mx.array = super().__call__(inputs, cache, embeddings)
        return states


class _RoutingBias(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.e_score_correction_bias = mx.zeros((1, experts))


CORRECTED = (GeluMLP, GroupedGatedRMSNorm, BiasedRouting, FalconH1Layer, Gemma3n)
"""Modules by which a model is computed here otherwise than mlx-lm does."""


def corrected(model: nn.Module, settings: Settings, where: str) -> nn.Module:
    """The model with modules that compute what transformers does in the place of mlx-lm's that do not; weights are not loaded yet.

    Args:
        model: Made from `settings`, translated.
        where: The checkpoint, for a message.

    Raises:
        UserError: For a model that is known to be computed otherwise, and is not computed here either.
    """
    settings = settings.get("text_config") or settings
    family = settings.get("model_type")
    for families, applies, what in _COMPUTED_OTHERWISE:
        if family in families and applies(settings):
            hint = "a newer mlx-lm may compute it as transformers does; until then it cannot be trained exactly"
            what = f"mlx-lm computes models of type {family} otherwise than transformers: {what}"
            raise UserError(what, where=where, hint=hint)
    if family in _OTHER_GELU and (gelu := _GELUS.get(_activation(settings))) is not None:
        for layer in repeated_layers(model):
            layer.mlp = GeluMLP(layer.mlp, _OTHER_GELU[family], gelu)
    if family == "gemma3n_text":
        return Gemma3n(model.args)
    if family == "gemma3_text":
        owner = language_model(model)
        owner.model = Gemma3Body(owner.args)
    if family == "falcon_h1":
        with_multipliers(model)
    if family in _GATED_NORMS:
        for mixer in [module for module in model.modules() if getattr(module, "n_groups", 1) > 1]:
            mixer.norm = GroupedGatedRMSNorm(mixer.norm, mixer.n_groups)
    if family == "ernie4_5_moe" and settings.get("moe_use_aux_free", True):
        for layer in repeated_layers(model):
            if "switch_mlp" in layer.mlp:
                layer.mlp = BiasedRouting(layer.mlp, settings.get("moe_norm_min", 1e-12))
    return model


def before_reading(weights: Weights, settings: Settings, where: str) -> Weights:
    """The tensors of a checkpoint in a form that mlx-lm's `sanitize` for its family knows; `where` is the checkpoint, for a message."""
    family = settings.get("model_type")
    if family == "gpt_oss":
        return dict(_plain_experts(weights))
    if family == "falcon_h1":
        return unmultiplied(weights, where)
    if family == "qwen3_5_moe":
        return _stacked_experts(weights)
    if family == "qwen3_vl_moe":
        return _turned_experts(weights, settings["text_config"]["hidden_size"])
    return weights


def _turned_experts(weights: Weights, hidden_size: int) -> Weights:
    """Qwen3-VL's experts as [experts, in, out], also from a checkpoint that transformers 5 wrote, which has them the other way."""

    def turned(name: str, weight: mx.array) -> mx.array:
        is_down = name.endswith(".experts.down_proj")
        if not is_down and not name.endswith(".experts.gate_up_proj"):
            return weight
        return weight if weight.shape[-1 if is_down else -2] == hidden_size else weight.swapaxes(-1, -2)

    return {name: turned(name, weight) for name, weight in weights.items()}


def _plain_experts(weights: Weights) -> Iterator[tuple[str, mx.array]]:
    """gpt-oss in bfloat16: [experts, in, out] → [experts, out, in], gate and up taken apart. mlx-lm reads them packed in mxfp4 alone."""
    if not any(name.endswith(".experts.gate_up_proj") for name in weights):
        yield from weights.items()
        return
    for name, weight in weights.items():
        experts, found, part = name.rpartition(".experts.")
        of = f"{experts}{found}"
        match part if found else "":
            case "gate_up_proj":
                yield f"{of}gate_proj.weight", weight[..., ::2].swapaxes(-1, -2)
                yield f"{of}up_proj.weight", weight[..., 1::2].swapaxes(-1, -2)
            case "gate_up_proj_bias":
                yield f"{of}gate_proj.bias", weight[..., ::2]
                yield f"{of}up_proj.bias", weight[..., 1::2]
            case "down_proj":
                yield f"{of}down_proj.weight", weight.swapaxes(-1, -2)
            case "down_proj_bias":
                yield f"{of}down_proj.bias", weight
            case _:
                yield name, weight


def _stacked_experts(weights: Weights) -> Weights:
    """Experts of a tensor each → stacks of them under mlx-lm's names."""
    found: dict[str, dict[int, mx.array]] = {}
    for name in [name for name in weights if _EXPERT.search(name)]:
        before, number, after = _EXPERT.split(name)
        found.setdefault(f"{before}.switch_mlp.{after}", {})[int(number)] = weights.pop(name)
    return weights | {name: mx.stack([each[n] for n in sorted(each)]) for name, each in found.items()}


_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def _activation(settings: Settings) -> Any:
    names = ("hidden_activation", "hidden_act", "activation_function")
    return next((settings[name] for name in names if settings.get(name) is not None), None)


_GELUS: dict[Any, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
}
"""By transformers' name."""

_OTHER_GELU: dict[Any, tuple[str, ...]] = {
    "gemma": ("gate_proj", "up_proj", "down_proj"),
    "gpt_bigcode": ("c_fc", "c_proj"),
    "gpt_neox": ("dense_h_to_4h", "dense_4h_to_h"),
    "starcoder2": ("c_fc", "c_proj"),
}
"""Families whose code has one GELU, whatever the settings say; the products of their MLP in the order in which they are computed."""

_GATED_NORMS = ("granitemoehybrid", "mamba2")
"""Families whose layers of state spaces end in a gated norm."""

_COMPUTED_OTHERWISE: list[tuple[tuple[str, ...], Callable[[Settings], bool], str]] = [
    (
        ("jamba",),
        lambda settings: settings.get("num_experts", 1) > 1,
        "the weights of the chosen experts are made to sum to one",
    ),
    (("minicpm3",), lambda _: True, "its logits are others"),
    (
        ("phimoe",),
        lambda settings: settings.get("num_experts_per_tok", 2) != 2,
        "transformers chooses two experts, whatever it says",
    ),
    (("mistral4",), lambda _: True, "the scores of its attention are scaled by YaRN's factor"),
    (
        ("falcon_h1",),
        lambda settings: bool(settings.get("mamba_rms_norm")),
        "its gated norm is over all groups at once",
    ),
]
"""Types of models, when this applies to one, and what is computed otherwise."""
