"""Falcon-H1 with its multipliers in the forward pass, as transformers has them.

mlx-lm multiplies them into the weights while it reads them, some into the wrong ones: keys lack theirs, values get none.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import falcon_h1

from mlx_sft.errors import UserError

Weights = dict[str, mx.array]
_FIRST_CONVOLUTION = "model.layers.0.mamba.conv1d.weight"


class _Mixer(falcon_h1.FalconH1Mixer):
    """The state space. What comes out of `in_proj` is multiplied part by part."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)  # type: ignore[no-untyped-call]
        self._parts = falcon_h1.compute_mup_vector(args)

    def __call__(self, x: mx.array, cache: Any = None, mask: mx.array | None = None) -> mx.array:
        inner, states = self.intermediate_size, self.groups_time_state_size
        projected = self.in_proj(x) * self._parts.astype(x.dtype)
        gate, convolved, dt = mx.split(projected, [inner, inner + self.conv_dim], axis=-1)
        hidden, b, c = mx.split(self._conv(convolved, cache, mask), [inner, inner + states], axis=-1)
        y = self._ssm(hidden, b, c, dt, cache, mask=mask)
        if cache:
            cache.advance(y.shape[1])
        result: mx.array = self.out_proj(nn.silu(gate) * y)
        return result


class _MLP(falcon_h1.FalconH1MLP):
    def __init__(self, args: Any) -> None:
        super().__init__(args)  # type: ignore[no-untyped-call]
        self._of_gate, self._of_result = args.mlp_multipliers

    def __call__(self, x: mx.array) -> mx.array:
        gate = nn.silu(self.gate_proj(x) * self._of_gate)
        result: mx.array = self.down_proj(gate * self.up_proj(x)) * self._of_result
        return result


class FalconH1Layer(falcon_h1.FalconH1DecoderLayer):
    """Attention and a state space beside each other, then the MLP."""

    def __init__(self, args: Any) -> None:
        super().__init__(args)  # type: ignore[no-untyped-call]
        self.mamba, self.feed_forward = _Mixer(args), _MLP(args)
        self.self_attn.scale *= args.key_multiplier
        self._args = args

    def __call__(self, h: mx.array, cache: Any, attn_mask: Any, mamba_mask: Any) -> mx.array:
        args, x = self._args, self.input_layernorm(h)
        states = self.mamba(x * args.ssm_in_multiplier, cache=cache[0], mask=mamba_mask) * args.ssm_out_multiplier
        attention = self.self_attn(x * args.attention_in_multiplier, mask=attn_mask, cache=cache[1])
        h = h + states + attention * args.attention_out_multiplier
        result: mx.array = h + self.feed_forward(self.pre_ff_layernorm(h))
        return result


class _Embedding(nn.Embedding):
    def __init__(self, args: Any) -> None:
        super().__init__(args.vocab_size, args.hidden_size)
        self._multiplier = args.embedding_multiplier

    def __call__(self, x: mx.array) -> mx.array:
        result: mx.array = super().__call__(x) * self._multiplier  # type: ignore[no-untyped-call]
        return result

    def as_linear(self, x: mx.array) -> mx.array:
        """The head of a tied model; mlx-lm's code divides its logits by the multiplier, which its embedding has in it."""
        result: mx.array = super().as_linear(x) * self._multiplier  # type: ignore[no-untyped-call]
        return result


class _Head(nn.Linear):
    def __init__(self, args: Any) -> None:
        super().__init__(args.hidden_size, args.vocab_size, bias=False)
        self._multiplier = args.lm_head_multiplier

    def __call__(self, x: mx.array) -> mx.array:
        result: mx.array = super().__call__(x) * self._multiplier
        return result


def with_multipliers(model: Any) -> None:
    """Put modules that multiply in the place of mlx-lm's; the weights are not loaded yet."""
    args = model.args
    model.model.layers = [FalconH1Layer(args) for _ in model.model.layers]
    model.model.embed_tokens = _Embedding(args)
    if "lm_head" in model:
        model.lm_head = _Head(args)


def unmultiplied(weights: Weights, where: str) -> Weights:
    """The tensors as mlx-lm's code takes them without multiplying them: with the convolutions turned.

    Raises:
        UserError: For a folder that mlx-lm wrote, whose weights are multiplied already.
    """
    convolution = weights.get(_FIRST_CONVOLUTION)
    if convolution is not None and convolution.shape[-1] <= convolution.shape[1]:
        hint = "give the original checkpoint"
        raise UserError("mlx-lm has multiplied the weights of this checkpoint, some wrongly", where=where, hint=hint)
    return {
        name: weight.transpose(0, 2, 1) if name.endswith("conv1d.weight") else weight
        for name, weight in weights.items()
    }
