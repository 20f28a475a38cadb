"""Gemma 3n, computed as transformers does.

Three things differ in mlx-lm's code. Its later layers take the keys and values of earlier ones from a cache, and compute others where
there is none, as in training. It clips weights and writes them back while it computes, where transformers clips them in training alone.
And body and head are one, so that the logits of every position would be kept.
"""

from __future__ import annotations

import re
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma3n
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention

Weights = dict[str, mx.array]
KeysAndValues = tuple[mx.array, mx.array]
State = tuple[mx.array, dict[str, KeysAndValues]]
"""What goes from layer to layer: the AltUp streams [streams, rows, width, hidden], and by type of layer the keys and values that the latest
layer with its own has computed. They are arguments and results, so that gradients go through them where layers are recomputed."""

_OF_KEYS_AND_VALUES = ("k_proj", "v_proj", "k_norm", "v_norm")
_LEAST_SQUARE = 1e-5
_WHOLE, _TEXT = "model.language_model.", "language_model.model."


class _Attention(gemma3n.Gemma3nAttention):
    """Attention with keys and values of its own, or of an earlier layer; then it has no weights for them."""

    def __init__(self, args: Any, number: int, is_shared: bool) -> None:
        super().__init__(args, number, is_shared)
        if is_shared:
            for name in _OF_KEYS_AND_VALUES:
                delattr(self, name)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None, offset: Any = 0, shared: Any = None) -> Any:
        """What it adds, and its keys and values."""
        heads = (*x.shape[:2], -1, self.head_dim)
        queries = self.rope(self.q_norm(self.q_proj(x).reshape(heads)).swapaxes(1, 2), offset=offset)
        if not self.is_kv_shared_layer:
            keys = self.rope(self.k_norm(self.k_proj(x).reshape(heads)).swapaxes(1, 2), offset=offset)
            values = self.v_norm(self.v_proj(x).reshape(heads)).swapaxes(1, 2)
            shared = (keys, values) if cache is None else cache.update_and_fetch(keys, values)
        out = scaled_dot_product_attention(queries, shared[0], shared[1], cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(out.swapaxes(1, 2).reshape(*x.shape[:2], -1)), shared


class _AltUp(gemma3n.Gemma3nAltUp):
    """Alternating updates (Baykal et al. 2023, https://arxiv.org/abs/2301.13310) in the model's precision, with the weights as they are."""

    def predict(self, x: mx.array) -> mx.array:
        count = self.config.altup_num_inputs
        routed = self.compute_router_modalities(x[self.config.altup_active_idx]).astype(x.dtype)
        mixing = self.prediction_coefs(routed).reshape(*routed.shape[:-1], count, count).swapaxes(-1, -2)
        return mx.matmul(x.transpose(1, 2, 3, 0), mixing).transpose(3, 0, 1, 2) + x

    def correct(self, predictions: mx.array, activated: mx.array) -> mx.array:
        routed = self.compute_router_modalities(activated).astype(activated.dtype)
        shares = (self.correction_coefs(routed) + 1.0).transpose(2, 0, 1)[..., None]
        innovation: mx.array = activated - predictions[self.config.altup_active_idx]
        return innovation * shares + predictions


class Gemma3nLayer(gemma3n.Gemma3nDecoderLayer):
    """A layer that hands on its keys and values."""

    self_attn: Any
    altup: Any

    def __init__(self, args: Any, number: int, is_shared: bool) -> None:
        super().__init__(args, number, is_shared)
        self.self_attn, self.altup = _Attention(args, number, is_shared), _AltUp(args)
        self._kind = args.layer_types[number]

    def __call__(
        self, x: Any, mask: Any = None, cache: Any = None, per_layer_input: Any = None, offset: Any = 0
    ) -> Any:
        """`State` → `State`."""
        streams, shared = x
        predictions = self.altup.predict(streams)
        active = predictions[self.config.altup_active_idx]
        normed = self.input_layernorm(active)
        attention, keys_and_values = self.self_attn(normed, mask, cache, offset, shared.get(self._kind))
        beside = active + self.post_attention_layernorm(attention) + self.laurel(normed)
        hidden = beside * 2.0**-0.5
        hidden = hidden + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(hidden)))
        corrected = self.altup.correct(predictions, hidden)
        first = corrected[self.config.altup_active_idx]
        if self.config.altup_correct_scale:
            first = first * self.altup.correct_output_scale
        first = self.per_layer_projection(nn.gelu_approx(self.per_layer_input_gate(first)) * per_layer_input)
        corrected = mx.concatenate([corrected[:1], corrected[1:] + self.post_per_layer_input_norm(first)])
        return corrected, shared | {self._kind: keys_and_values}


class _Body(gemma3n.LanguageModel):
    def __init__(self, args: Any) -> None:
        super().__init__(args)
        numbers = range(args.num_hidden_layers)
        self.layers: list[Any] = [Gemma3nLayer(args, n, n >= self.first_kv_shared_layer_idx) for n in numbers]

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:  # type: ignore[override]  # token ids alone
        x = self.embed_tokens(inputs) * self.hidden_size**0.5
        of_layers = self.project_per_layer_inputs(x, self.get_per_layer_inputs(inputs))
        caches = cache or [None] * len(self.layers)
        masks = {
            "full_attention": create_attention_mask(x, caches[self.first_full_idx]),
            "sliding_attention": create_attention_mask(
                x, caches[self.first_sliding_idx], window_size=self.sliding_window
            ),
        }
        offset = 0 if caches[0] is None else caches[0].offset
        others = [_of_magnitude(project(x), x) for project in self.altup_projections]
        state: State = (mx.stack([x, *others]), {})
        for number, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
            of_layer = caches[self.layer_idx_to_cache_idx[number]]
            state = layer(state, masks[kind], of_layer, of_layers[:, :, number], offset)
        x, *streams = state[0]
        others = [
            _of_magnitude(project(stream), x)
            for project, stream in zip(self.altup_unembed_projections, streams, strict=True)
        ]
        normed: mx.array = self.norm(mx.mean(mx.stack([x, *others]), axis=0))
        return normed


def _of_magnitude(x: mx.array, like: mx.array) -> mx.array:
    """`x` with the mean square of `like` along the last axis. It has a gradient where `like` is zeros, too: a padding token's."""
    square, wanted = (mx.mean(one.astype(mx.float32) ** 2, axis=-1, keepdims=True) for one in (x, like))
    factor = mx.sqrt(mx.maximum(wanted, 1e-30)) / mx.sqrt(mx.maximum(square, _LEAST_SQUARE))
    return x * factor.astype(x.dtype)


class _LanguageModel(nn.Module):
    def __init__(self, args: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.args, self.model = args, _Body(args)

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        logits = self.model.embed_tokens.as_linear(self.model(inputs, cache))
        capped: mx.array = gemma3n.logit_softcap(self.args.final_logit_softcapping, logits)
        return capped

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers


class Gemma3n(nn.Module):
    """The text of a checkpoint that can also see and hear; its logits are those of every position, [rows, width, vocabulary]."""

    def __init__(self, args: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.args, self.model_type = args, args.model_type
        self.language_model = _LanguageModel(gemma3n.TextConfig.from_dict(args.text_config))

    def __call__(self, inputs: mx.array, cache: Any = None) -> mx.array:
        return self.language_model(inputs, cache)

    @property
    def layers(self) -> list[nn.Module]:
        return self.language_model.layers

    def make_cache(self) -> list[Any]:
        """A cache for each layer with keys and values of its own."""
        caches: list[Any] = self.language_model.model.make_cache()  # type: ignore[no-untyped-call]
        return caches

    def sanitize(self, weights: Weights) -> Weights:
        """The text's tensors under the names here, without those that layers with shared keys and values would have for their own."""
        parameters = {_TEXT + name.removeprefix(_WHOLE): w for name, w in weights.items() if name.startswith(_WHOLE)}
        text = self.args.text_config
        return {name: weight for name, weight in parameters.items() if not is_shared_away(name, text)}


def is_shared_away(name: str, settings: dict[str, Any]) -> bool:
    """Whether a tensor is for keys or values of a layer that takes those of an earlier one; nothing reads what older checkpoints store."""
    found = _OF_LAYER.search(name)
    first = settings.get("num_hidden_layers", 0) - (settings.get("num_kv_shared_layers") or 0)
    return found is not None and 0 < first <= int(found[1])


_OF_LAYER = re.compile(rf"\blayers\.(\d+)\.self_attn\.({'|'.join(_OF_KEYS_AND_VALUES)})\.")
