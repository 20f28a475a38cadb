"""Virtual tokens: trained vectors in the place of the embeddings of tokens, in front of everything that a row has.

    v1 v2 ... vn │ <bos> system, user, assistant ...      positions 0 to n - 1 │ n, n + 1, ...
        │                  │
     as they are     embed_tokens ─► the layers ─► their states, without those of the virtual tokens

The model's own code runs on n further tokens, with an object in the place of its embeddings that returns the vectors for these. So
positions, masks and sliding windows are those of a text that is n tokens longer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlx_sft.errors import UserError
from mlx_sft.model.blocks import InPlaceOf, replaced_children
from mlx_sft.model.head import agree_within, embedding_names, floating_weights, language_model
from mlx_sft.model.outline import is_outline

_SCALED_INSIDE = ("gemma", "minicpm3")
"""How the names of families begin whose embeddings transformers multiplies inside of `embed_tokens`, so that vectors that are given in
their place are not multiplied; mlx-lm does it behind them (transformers 5.24)."""

_PROBE, _IN_FRONT = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]]), 3

_HINT = "train adapters on it with --method lora"


class _Seen(Exception):
    """The first layer was reached, with this input."""


class EmbeddingsOf:
    """The embeddings of a model, and what can be put in the place of their result.

    Args:
        model: A frozen model.

    Attributes:
        width: Numbers of an embedding.

    Raises:
        UserError: If the model has no embeddings that are known.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, owner = model, language_model(model)
        modules = dict(owner.named_modules())
        path = next((path for path in sorted(embedding_names()) if path in modules), None)
        if path is None:
            what = "the embeddings of this model are not found, which virtual tokens and --neftune-alpha need"
            raise UserError(what, hint=f"{_HINT}, without noise")
        before, _, self._name = path.rpartition(".")
        self._body, self._embedding = modules[before], modules[path]
        self._dtype = next(iter(floating_weights(model).values())).dtype
        self.width = int(self._embedding(mx.zeros((1,), mx.int32)).shape[-1])
        inside = str(getattr(getattr(owner, "args", None), "model_type", "")).startswith(_SCALED_INSIDE)
        self._scale = self._scale_of_body() if inside and not is_outline(model) else 1.0

    def noisy(self, noise: mx.array) -> AbstractContextManager[None]:
        """Within the block noise [rows, width, numbers], of what transformers' `embed_tokens` gives, is added to the embeddings."""

        def noisy(token_ids: mx.array) -> mx.array:
            found: mx.array = self._embedding(token_ids)
            return found + (noise / self._scale).astype(found.dtype)

        return self._embedding_replaced(noisy)

    def _scale_of_body(self) -> float:
        """What the body multiplies embeddings with before its first layer."""
        layers = self._body.layers
        first, ones = layers[0], mx.ones((1, 1, self.width), self._dtype)

        def see(x: mx.array, *_: Any, **__: Any) -> mx.array:
            raise _Seen(x)

        layers[0] = InPlaceOf(first, see)
        try:
            with self._embedding_replaced(lambda *_: ones):
                self._body(mx.zeros((1, 1), mx.int32))
        except _Seen as seen:
            return float(seen.args[0].astype(mx.float32).mean().item())
        finally:
            layers[0] = first
        return 1.0

    def _embedding_replaced(self, call: Callable[..., mx.array]) -> AbstractContextManager[None]:
        """Within the block this gives the embeddings of tokens."""
        return replaced_children(self._body, {self._name: InPlaceOf(self._embedding, call)})


class InFront(EmbeddingsOf):
    """Puts virtual tokens in front of what a model computes.

    Raises:
        UserError: If the model has no embeddings that are known, or needs more of a token than its embedding.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.vocabulary = int(self._embedding.weight.shape[0])
        if not is_outline(model):
            self._refuse_where_inexact()

    def embeddings(self, token_ids: mx.array) -> mx.array:
        """[tokens, width] float32: what transformers' `embed_tokens` gives for these tokens."""
        found: mx.array = self._embedding(token_ids)
        return (found * mx.array(self._scale, found.dtype)).astype(mx.float32)

    def run(self, vectors: mx.array, run: Callable[[mx.array], mx.array], token_ids: mx.array) -> mx.array:
        """What `run` computes of tokens [rows, width] with vectors [n, width] in front of each row, without the positions of these.

        Args:
            vectors: Float32.
            run: The model, or its body: [rows, n + width] → [rows, n + width, ...].
        """
        rows, number = len(token_ids), len(vectors)
        longer = mx.concatenate([mx.zeros((rows, number), token_ids.dtype), token_ids], axis=1)
        # Of float32, so that the gradients of all rows are added up in it.
        in_front = mx.broadcast_to((vectors / self._scale)[None], (rows, *vectors.shape)).astype(self._dtype)
        embed: Callable[[mx.array], mx.array] = getattr(self._body, self._name)  # which may add noise
        embeddings = mx.concatenate([in_front, embed(token_ids)], axis=1)
        with self._embedding_replaced(lambda *_: embeddings):
            return run(longer)[:, number:]

    def cache(self, vectors: mx.array) -> list[Any]:
        """mlx-lm's cache of keys and values once it has seen the virtual tokens alone."""
        cache: list[Any] = make_prompt_cache(self._model)
        embeddings = (vectors / self._scale)[None].astype(self._dtype)
        with self._embedding_replaced(lambda *_: embeddings):
            self._model(mx.zeros((1, len(vectors)), mx.int32), cache=cache)
        mx.eval([part.state for part in cache])
        return cache

    def _refuse_where_inexact(self) -> None:
        """Compare the embeddings of tokens as virtual tokens with the tokens themselves."""
        whole = self._body(_PROBE)
        vectors = self.embeddings(_PROBE[0, :_IN_FRONT])
        found = self.run(vectors, self._body, _PROBE[:, _IN_FRONT:])
        tolerance = 1e-4 if self._dtype == mx.float32 else 2e-2
        if not agree_within(found, whole[:, _IN_FRONT:], tolerance):
            what = "this model computes with more of a token than its embedding, so that virtual tokens have no place in it"
            raise UserError(what, where="method", hint=_HINT)
