"""Layers with bottleneck adapters: h + scale · up(act(down(x))), where h is what attention or the MLP of a layer gives.

    residual r ─┬─► norm ─► attention or MLP ─► h ─► h + scale · up(act(down(x))) ─► (a norm, in Gemma 2 and 3) ─► + ─►
                └───────────────────────────────────────────────────────────────────────────────────────────────────┘

x is h, h + r or r, as `reads` says. A layer with adapters is an instance of a subclass of the layer's own class, with the same
children; the model's own layer stays as it is, and is what `plain_layer` gives back. Its parts are computed by whatever takes their
place while training, so that no fast path is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cache
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_sft.errors import UserError
from mlx_sft.model.blocks import InPlaceOf, replaced_children
from mlx_sft.model.head import repeated_layers

ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "relu": nn.relu,
    "leakyrelu": nn.leaky_relu,
    "gelu": nn.gelu,
    "gelu_new": nn.gelu_approx,
    "swish": nn.silu,
    "tanh": mx.tanh,
    "sigmoid": mx.sigmoid,
}
"""By the names that the `adapters` library gives them."""

AFTER_ATTENTION, AFTER_MLP = "attention_adapters", "output_adapters"
"""What a layer calls its adapters, as the `adapters` library does."""

Reads = Literal["output", "sum", "residual"]
"""What an adapter reads: h, h + r, or r."""

_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
"""Names of the modules that are followed by an adapter."""

_PROBE = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])

_LAYER, _READS = "_plain_layer", "_adapters_read"


class Bottleneck(nn.Module):
    """scale · up(act(down(x))): [..., width] → [..., width].

    Its parameters have the names that the `adapters` library gives them: `adapter_down.0.weight` [inner, width] and
    `adapter_up.weight` [width, inner], each with a `bias`. They are computed with in the precision of x.

    Args:
        width: Of hidden states.
        inner: Of the bottleneck.
    """

    def __init__(self, width: int, inner: int, activation: str, scale: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.adapter_down = [{"weight": mx.zeros((inner, width)), "bias": mx.zeros(inner)}]
        self.adapter_up = {"weight": mx.zeros((width, inner)), "bias": mx.zeros(width)}
        self._activation = ACTIVATIONS[activation]
        self._scale = scale

    @property
    def kept_numbers(self) -> int:
        """What it keeps of a token for the backward pass: its input, and the bottleneck before and after the activation."""
        inner, width = self.adapter_down[0]["weight"].shape
        return width + 2 * inner

    def arrays(self) -> dict[str, mx.array]:
        """Its parameters by their names."""
        arrays: dict[str, mx.array] = tree_flatten(self.parameters(), destination={})  # type: ignore[no-untyped-call, assignment]
        return arrays

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.reshape(
            -1, x.shape[-1]
        )  # of rows side by side a weight's gradient would be a product each, and their sum
        inner = self._activation(_linear(self.adapter_down[0], rows))
        result = _linear(self.adapter_up, inner)
        return (result if self._scale == 1 else self._scale * result).reshape(x.shape)


def _linear(weights: Mapping[str, mx.array], x: mx.array) -> mx.array:
    return mx.addmm(weights["bias"].astype(x.dtype), x, weights["weight"].T.astype(x.dtype))


def places(model: nn.Module, names: tuple[str, ...]) -> list[dict[str, int]]:
    """For each repeated layer the adapters that it may have, of these names, and the width of what each follows.

    The model is run on a few tokens to see it; nothing is computed.

    Raises:
        UserError: If a module that an adapter would follow is not called once in each pass.
    """
    layers = repeated_layers(model)
    seen: list[dict[str, list[int]]] = [{} for _ in layers]
    with ExitStack() as stack:
        for layer, found in zip(layers, seen, strict=True):
            for name in names:
                if (part := followed(layer, name)) is not None:
                    noting = _noting(layer[part], found.setdefault(name, []))
                    stack.enter_context(replaced_children(layer, {part: noting}))
        model(_PROBE)
    for number, found in enumerate(seen):
        for name in (name for name, widths in found.items() if len(widths) != 1):
            what = f"layer {number} calls its {followed(layers[number], name)} {len(found[name])} times, and an adapter follows one call"
            raise UserError(what, where="method", hint=HINT)
    return [{name: widths[0] for name, widths in found.items()} for found in seen]


HINT = "train adapters on its linear modules with --method lora"


def followed(layer: nn.Module, name: str) -> str | None:
    """The child of a layer that an adapter of this name follows; None where the layer has none."""
    known = _ATTENTION if name == AFTER_ATTENTION else _MLP
    return next((child for child in known if isinstance(layer.get(child), nn.Module)), None)


def adapted_layer(layer: nn.Module, adapters: Mapping[str, Bottleneck], reads: Reads) -> nn.Module:
    """The layer with these adapters, which shares its children."""
    kind = _with_adapters(type(layer))
    adapted: nn.Module = kind.__new__(kind)
    dict.update(adapted, layer | dict(adapters))
    vars(adapted).update(vars(layer) | {"_no_grad": set(layer._no_grad), _LAYER: layer, _READS: reads})
    return adapted


def plain_layer(layer: nn.Module) -> nn.Module | None:
    """The model's own layer in a layer with adapters; None for any other."""
    return vars(layer).get(_LAYER)


@cache
def _with_adapters(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Adapted, kind), {})


class _Adapted:
    """What comes before a layer's own class: its code runs with adapters behind its attention and its MLP."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls: list[_Called] = []
        parts = {str(followed(self, name)): name for name in (AFTER_ATTENTION, AFTER_MLP) if name in self}
        others = () if vars(self)[_READS] == "output" else self.children().items()
        replacements = {
            name: _part(child, getattr(self, name), calls)
            for name, child in others
            if isinstance(child, nn.Module) and not isinstance(child, Bottleneck) and name not in parts
        }
        for part, name in parts.items():
            adapter = _followed_by(getattr(self, name), vars(self)[_READS], calls)
            replacements[part] = _part(self[part], getattr(self, part), calls, adapter)
        with replaced_children(self, replacements):
            result = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if vars(self)[_READS] == "sum":
            _refuse_norm_behind(calls)
        return result


class _Called(NamedTuple):
    """A call of a layer's child in one pass. They tell where the residual is, and that it is where adapters need it.

    Attributes:
        given: Its input.
        result: What it gave, with what an adapter added.
        followed: Whether an adapter follows it.
    """

    given: mx.array
    result: mx.array
    followed: bool


def _part(module: nn.Module, run: Callable[..., Any], calls: list[_Called], adapter: Any = None) -> InPlaceOf:
    """In the place of a layer's child: notes each call of it, and puts an adapter behind it where there is one."""

    def call(x: mx.array, *args: Any, **kwargs: Any) -> Any:
        result = run(x, *args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        if adapter is not None:
            first = adapter(x, first)
        calls.append(_Called(x, first, adapter is not None))
        return (first, *result[1:]) if isinstance(result, tuple) else first

    return InPlaceOf(module, call)


def _followed_by(adapter: Bottleneck, reads: Reads, calls: list[_Called]) -> Callable[[mx.array, mx.array], mx.array]:
    """What an adapter makes of the input and the result of the module that it follows."""

    def follow(x: mx.array, result: mx.array) -> mx.array:
        if reads == "output":
            return result + adapter(result)
        residual = _residual(x, calls)
        return result + adapter(residual if reads == "residual" else result + residual)

    return follow


def _residual(x: mx.array, calls: list[_Called]) -> mx.array:
    """What a norm made x of, which is added to the result; x itself where there is no norm before.

    Raises:
        UserError: If attention has the same input, so that the MLP has no residual of its own.
    """
    if any(call.given is x for call in calls):
        what = "attention and MLP of this model stand side by side, so that the MLP has no residual of its own"
        raise UserError(what, where="bottleneck_form", hint="give --bottleneck-form houlsby")
    return next((call.given for call in calls if call.result is x), x)


def _refuse_norm_behind(calls: list[_Called]) -> None:
    """Raise `UserError` where the result of the MLP is normalized before it is added to the residual, so that their sum is nowhere."""
    results = [call.result for call in calls if call.followed]
    if any(call.given is result for call in calls for result in results):
        what = "this model normalizes what its MLP gives before it is added, so that no adapter can read the sum"
        raise UserError(what, where="bottleneck_form", hint="give --bottleneck-form houlsby or parallel")


def _noting(module: nn.Module, widths: list[int]) -> InPlaceOf:
    def run(*args: Any, **kwargs: Any) -> Any:
        result: Any = module(*args, **kwargs)
        widths.append(int((result[0] if isinstance(result, tuple) else result).shape[-1]))
        return result

    return InPlaceOf(module, run)


def try_layers(model: nn.Module) -> None:
    """Run a model with adapters on a few tokens, so that a layer in which they have no place says so; nothing is computed."""
    model(_PROBE)
