"""A causal language model split into body and head; the split is used only where both give what the whole gives.

    token_ids ─► body ─► hidden_states ─► head ─► logits

The split needs no knowledge of the family: the head is the model's own code, run with its body replaced by an object that
returns given hidden states. So soft-capping, scaled logits and tied embeddings are whatever the model makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_sft.model.blocks import InPlaceOf, replaced_children

_BODY_NAMES = ("model", "transformer", "backbone")

HEAD, HEAD_WEIGHT = "lm_head", "lm_head.weight"
"""transformers' name of the output head, also of one that is tied, and that of its matrix."""
EMBEDDING_NAMES = ("embed_tokens", "wte", "tok_embeddings", "embeddings")
"""Names of the embedding in a body, which is the output matrix too where there is no other."""

EMBEDDING_KINDS = (nn.Embedding, nn.QuantizedEmbedding)
"""The modules that embed tokens."""

_NESTED = "language_model"
"""The name of the language model in a model that can also see or hear."""


class SplitModel:
    """A causal model as `logits(hidden_states(token_ids))`.

    Attributes:
        model: The whole model.
        body_name: The attribute that holds the body; None where the model cannot be split. Then `hidden_states` is the whole
            model and `logits` the identity: as exact, but the logits of every position are kept.
        run_body: How the body is run: `run_body(body, token_ids)`; as it is, or as the method that is trained wants it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.run_body: Callable[[Any, mx.array], mx.array] = lambda body, token_ids: body(token_ids)
        # Where it is nested, the whole has a property for the body, which cannot be replaced.
        self._owner = language_model(model)
        self.body_name = next((name for name in _BODY_NAMES if self._is_body(name)), None)
        if self.body_name is not None and not self._holds_on_probe():
            self.body_name = None

    @property
    def layers(self) -> list[nn.Module]:
        """The repeated layers, as the list that the model itself goes through."""
        owner = self._owner if self.body_name is None else self.body
        layers: list[nn.Module] = owner.layers
        return layers

    @property
    def layers_prefix(self) -> str:
        """The beginning of the names of the layers' parameters in transformers, such as `model.layers.`."""
        return f"{self.body_name}.layers." if self.body_name else ""

    def outside_layers(self, parameters: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """The trained parameters that are in none of the repeated layers; the head may use them."""
        return {name: value for name, value in parameters.items() if not name.startswith(self.layers_prefix)}

    @property
    def body(self) -> nn.Module:
        """What gives the hidden states; the whole model where it cannot be split."""
        if self.body_name is None:
            return self.model
        body: nn.Module = self._owner[self.body_name]
        return body

    def hidden_states(self, token_ids: mx.array) -> mx.array:
        """[rows, width] → [rows, width, hidden]."""
        return self.run_body(self.body, token_ids)

    def logits(self, hidden_states: mx.array) -> mx.array:
        """[positions, hidden] → [positions, vocabulary]."""
        if self.body_name is None:
            return hidden_states
        states = hidden_states[None]
        with replaced_children(self._owner, {self.body_name: InPlaceOf(self.body, lambda *_, **__: states)}):
            logits: mx.array = self._owner(mx.zeros(states.shape[:2], mx.int32))
        return logits.squeeze(0)  # an index would be a gather, whose gradient is a scatter over all logits

    def output_matrix(self) -> tuple[nn.Module, str] | None:
        """The module that holds the output matrix, and the matrix's name in it; None where no known name is found."""
        if self.body_name is None:
            return None
        places = ((self._owner, HEAD), *((self.body, name) for name in EMBEDDING_NAMES))
        return next(((holder, name) for holder, name in places if name in holder), None)

    def _is_body(self, name: str) -> bool:
        body = self._owner.get(name)
        return isinstance(body, nn.Module) and isinstance(getattr(body, "layers", None), list)

    def _holds_on_probe(self) -> bool:
        """Compare with the unsplit model on a few tokens, with right padding."""
        token_ids = mx.array([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 0, 0]])
        whole = self.model(token_ids)
        try:
            hidden_states: Any = self.hidden_states(token_ids)
            if not isinstance(hidden_states, mx.array) or hidden_states.ndim != 3:
                return False
            parts = self.logits(hidden_states.reshape(-1, hidden_states.shape[-1]))
        except (TypeError, ValueError, AttributeError):
            return False
        if parts.size != whole.size:
            return False
        return self.agree(parts.reshape(whole.shape), whole)

    def agree(self, found: mx.array, expected: mx.array) -> bool:
        """Whether two results are equal within the model's precision."""
        return agree_within(found, expected, 1e-4 if self.model_dtype() == mx.float32 else 2e-2)

    def model_dtype(self) -> mx.Dtype:
        """The precision of the model's first floating weight; `load_model` gives all of them the same."""
        return next(iter(floating_weights(self.model).values())).dtype


def language_model(model: nn.Module) -> nn.Module:
    """The language model in a model that can also see or hear; else the model itself."""
    found: nn.Module = model.get(_NESTED, model)
    return found


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of a model of mlx-lm's, split or not."""
    layers: list[nn.Module] = language_model(model).layers
    return layers


def embedding_names() -> set[str]:
    """The names that embeddings of tokens may have."""
    return {f"{body}.{name}" for body in _BODY_NAMES for name in EMBEDDING_NAMES}


def tied_embedding(model: nn.Module) -> str | None:
    """The name in transformers of the embedding that is the output matrix too; None where there is a matrix of its own."""
    owner = language_model(model)
    if HEAD in owner or getattr(getattr(owner, "args", None), "tie_word_embeddings", True) is False:
        return None
    paths = embedding_names()
    found = (path for path, module in owner.named_modules() if isinstance(module, EMBEDDING_KINDS) and path in paths)
    return next(found, None)


def agree_within(found: mx.array, expected: mx.array, tolerance: float) -> bool:
    """Whether no number of a result is off by more than a share of the largest that is expected."""
    found, expected = found.astype(mx.float32), expected.astype(mx.float32)
    return bool((mx.abs(found - expected).max() <= tolerance * mx.abs(expected).max()).item())


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Within the block a model is in training mode, and after it in evaluation mode: by that mlx-lm chooses kernels with a gradient."""
    model.train()
    try:
        yield
    finally:
        model.eval()


def floating_weights(model: nn.Module) -> dict[str, mx.array]:
    """Every floating weight of a model by its MLX name."""
    return {name: w for name, w in weights_of(model).items() if mx.issubdtype(w.dtype, mx.floating)}


def weights_of(model: nn.Module) -> dict[str, mx.array]:
    """Every weight of a model by its MLX name."""
    return dict(tree_flatten(model.parameters()))
