"""A prefix of keys and values: each layer's attention looks at n entries that no layer computes, in front of what a row has.

    layer i:   queries of the row                    q1 q2 q3
               keys and values      k1 ... kn │ k(q1) k(q2) k(q3)       positions 0 to n - 1 │ n, n + 1, n + 2
                                    prefix      the row

The model's own code runs, with an object in the place of mlx-lm's cache of each layer. The prefix itself lies in the module of the
layer's attention, as a weight of it: so it is an argument wherever a layer is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlx_sft.errors import UserError
from mlx_sft.model.blocks import InPlaceOf, replaced_children
from mlx_sft.model.head import agree_within, floating_weights, repeated_layers
from mlx_sft.model.outline import is_outline

_KEYS, _VALUES = "prefix_keys", "prefix_values"

_PROBE, _IN_FRONT = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]]), 3

_HINT = "train adapters on it with --method lora"


class _InPlaceOfCache:
    """What mlx-lm's code asks a layer's cache for, of one that holds n entries and takes up none.

    Attributes:
        offset: n, which is the position of a row's first token.
    """

    def __init__(self, offset: int) -> None:
        self.offset = offset

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> Any:
        """Which keys each of so many queries sees: the prefix, and its own row's up to itself."""
        if return_array or (window_size is not None and self.offset + length > window_size):
            return create_causal_mask(length, self.offset, window_size=window_size)
        return "causal" if length > 1 else None


class _Watch(_InPlaceOfCache):
    """Of an empty cache; notes what attention computes."""

    def __init__(self) -> None:
        super().__init__(0)
        self.found: list[tuple[mx.array, mx.array]] = []

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.found.append((keys, values))
        return keys, values


class _Prefix(_InPlaceOfCache):
    """Of a cache that holds the prefix that lies in a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(int(module[_KEYS].shape[1]))
        self._module = module

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """[rows, heads, length, d] → [rows, heads, n + length, d]."""
        return self._behind(_KEYS, keys), self._behind(_VALUES, values)

    def _behind(self, name: str, own: mx.array) -> mx.array:
        # Repeated in float32, so that the gradients of all rows are added up in it.
        prefix = mx.broadcast_to(self._module[name][None], (len(own), *self._module[name].shape))
        return mx.concatenate([prefix.astype(own.dtype), own], axis=2)


def _noting(child: Any, cache: Any, found: list[Any]) -> InPlaceOf:
    """In the place of a layer's child: notes it where it is given the layer's cache."""

    def call(*args: Any, **kwargs: Any) -> Any:
        if any(value is cache for value in (*args, *kwargs.values())):
            found.append(child)
        return child(*args, **kwargs)

    return InPlaceOf(child, call)


class KeyValuePrefix:
    """Where a prefix goes in a model.

    Args:
        model: A frozen model.

    Attributes:
        shape: Of one entry: [2 · layers, kv_heads, head_dim], of each layer the keys and the values.
        window: The shortest of its sliding windows; None where it has none.

    Raises:
        UserError: If it has a layer without keys and values of its own, layers of several shapes, or positions that are not known.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        windows = _windows(model)
        self.window = min(windows, default=None)
        self._modules, entries = _attention(model)
        shapes = {tuple(array.shape[i] for i in (1, 3)) for entry in entries for array in entry}
        if len(shapes) > 1:
            what = f"its layers have keys and values of several shapes (heads and width {sorted(shapes)}), and a prefix has one"
            raise _refused(what)
        ((kv_heads, head_dim),) = shapes
        self.shape = (2 * len(self._modules), kv_heads, head_dim)
        self._dtype = next(iter(floating_weights(model).values())).dtype
        if not is_outline(model):
            self._refuse_where_inexact()

    def put(self, prefix: mx.array) -> None:
        """Put a prefix [n, 2 · layers, kv_heads, head_dim] into the model's attention.

        (Its order is that of `get_prompt` in `peft_model.py`: `view(n, 2 · layers, heads, d)`, then `permute`; PEFT 0.21.2.)
        """
        by_layer = prefix.transpose(1, 2, 0, 3)
        # The gradient of a split is one concatenation; that of an index would be an array of the whole for each layer.
        parts = [part.squeeze(0) for part in mx.split(by_layer, len(by_layer))]
        for module, keys, values in zip(self._modules, parts[::2], parts[1::2], strict=True):
            module[_KEYS], module[_VALUES] = keys, values

    def caches(self) -> list[Any]:
        """For `cache=` of the model or of its body, once a prefix is in it."""
        return [_Prefix(module) for module in self._modules]

    def generation_cache(self) -> list[Any]:
        """mlx-lm's own cache with the prefix in it, in the model's precision."""
        caches: list[Any] = make_prompt_cache(self._model)
        for cache, module in zip(caches, self._modules, strict=True):
            cache.update_and_fetch(*(module[name][None].astype(self._dtype) for name in (_KEYS, _VALUES)))
        mx.eval([part.state for part in caches])
        return caches

    def of_tokens(self, token_ids: Sequence[int]) -> mx.array:
        """[tokens, 2 · layers, kv_heads, head_dim] float32: what the model's own cache holds once it has read these tokens."""
        watches = [_Watch() for _ in self._modules]
        self._model(mx.array([list(token_ids)]), cache=watches)
        entries = [array[0].astype(mx.float32) for watch in watches for array in watch.found[0]]
        return mx.stack(entries).transpose(2, 0, 1, 3)

    def _refuse_where_inexact(self) -> None:
        """Compare a text whose beginning is a prefix with the text itself."""
        whole = self._model(_PROBE)[:, _IN_FRONT:]
        undo = remove(self._model)
        self.put(self.of_tokens(_PROBE[0, :_IN_FRONT].tolist()))  # type: ignore[arg-type]
        found = self._model(_PROBE[:, _IN_FRONT:], cache=self.caches())
        tolerance = 1e-4 if self._dtype == mx.float32 else 2e-2
        holds = agree_within(found, whole, tolerance)
        remove(self._model)
        undo()
        if not holds:
            raise _refused("it computes a text whose beginning is in its cache as another one")


def remove(model: nn.Module) -> Callable[[], None]:
    """Take a prefix out of a model's attention; calling the result puts it back."""
    taken = [
        (module, {name: module.pop(name) for name in (_KEYS, _VALUES)})
        for _, module in model.named_modules()
        if _KEYS in module
    ]

    def put_back() -> None:
        for module, arrays in taken:
            for name, array in arrays.items():
                module[name] = array

    return put_back


def _windows(model: nn.Module) -> list[int]:
    """The sliding windows of a model's layers, each of which must have a cache of keys and values of its own."""
    caches: list[Any] = make_prompt_cache(model)
    for number, cache in enumerate(caches):
        if not isinstance(cache, KVCache | RotatingKVCache):
            kind = type(cache).__name__
            raise _refused(
                f"layer {number} keeps no keys and values of all positions (linear attention, convolution, Mamba; mlx-lm's {kind})"
            )
    layers = len(repeated_layers(model))
    if len(caches) != layers:
        raise _refused(
            f"of its {layers} layers only {len(caches)} have keys and values of their own; others share these"
        )
    return [cache.max_size for cache in caches if isinstance(cache, RotatingKVCache)]


def _attention(model: nn.Module) -> tuple[list[nn.Module], list[tuple[mx.array, mx.array]]]:
    """The module of each layer's attention, and the keys and values of a probe there, which are not computed."""
    layers = repeated_layers(model)
    watches = [_Watch() for _ in layers]
    given: list[list[nn.Module]] = [[] for _ in layers]
    with ExitStack() as held:
        for layer, watch, found in zip(layers, watches, given, strict=True):
            children = {
                name: _noting(child, watch, found)
                for name, child in layer.children().items()
                if isinstance(child, nn.Module)
            }
            held.enter_context(replaced_children(layer, children))
        model(_PROBE, cache=watches)
    for number, (watch, found) in enumerate(zip(watches, given, strict=True)):
        if len(watch.found) != 1 or len(found) != 1:
            raise _refused(f"layer {number} has no keys and values of its own that are known")
    modules = [found[0] for found in given]
    if len(set(map(id, modules))) < len(modules):
        raise _refused("several of its layers are one and the same")
    return modules, [watch.found[0] for watch in watches]


def _refused(why: str) -> UserError:
    return UserError(f"a prefix has no place in this model: {why}", where="method", hint=_HINT)
