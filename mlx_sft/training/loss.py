"""Cross-entropy over supervised positions only, in chunks, with its gradient computed in the forward pass.

    hidden_states [positions, hidden] ─► some rows at a time ─► head ─► logits [chunk, vocabulary] ─► loss, dL/dh

No positions × vocabulary tensor ever exists: a chunk's logits become its loss and its gradient at once, and backward is one
multiplication. Where the head is frozen and can be computed in tiles of the vocabulary, there are not even the logits of a chunk, but
those of a tile: the softmax runs along as in FlashAttention (Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models",
https://arxiv.org/abs/2411.09009). On a GPU tiles would move each logit five times as often, and MLX's own kernel takes the whole vocabulary
at once. Knows nothing of the body, or of where the positions come from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import mlx.core as mx

from mlx_sft.cpu.elementwise import exponential, row_sums
from mlx_sft.model.order import after
from mlx_sft.model.tiles import TiledHead

HeadParameters = dict[str, mx.array]

Head = Callable[[HeadParameters, mx.array], mx.array]
"""`head(parameters, hidden_states[positions, hidden]) -> logits[positions, vocabulary]`."""

HeadWay = Literal["fused", "tiles", "whole"]
"""How the loss of some positions is computed: by MLX's kernel from all logits, from those of a tile at a time, or from all in float32."""

_CHUNK_BYTES = 128 * 2**20
_FUSED_ROWS = 512


def chunk_rows(columns: int, way: HeadWay = "tiles") -> int:
    """Rows whose float32 logits fit 128 MiB, from 64 to 1,024: 220 for 152k logits a row. More of them are multiplied no faster.

    By MLX's kernel it is 512 rows or more: on a GPU fewer would be a matrix too small for it.

    Args:
        columns: Logits of a row that exist at once, of a tile or of the whole vocabulary.
    """
    return max(_FUSED_ROWS if way == "fused" else 64, min(1024, _CHUNK_BYTES // (4 * columns)))


def chunk_choices(columns: int, way: HeadWay = "tiles") -> tuple[int, int, int]:
    """Chunks to choose among: the one that is as fast as any, and smaller ones, with which the head's weights are read more often."""
    rows = chunk_rows(columns, way)
    return rows, rows // 2, rows // 8


def even_chunk(positions: int, chunk: int) -> int:
    """The chunk by which positions are cut into as few chunks as by this one, all of about one size: a small last one is slow."""
    return -(-positions // -(-positions // chunk))


def cross_entropy_sum(
    head: Head | TiledHead,
    parameters: HeadParameters,
    hidden_states: mx.array,
    targets: mx.array,
    weights: mx.array,
    chunk: int,
    *,
    fused: bool = False,
) -> mx.array:
    """Σ weights · (log Σ exp(logits) − logits[target]), differentiable in the hidden states and the head's parameters.

    Args:
        head: Hidden states to logits; one in tiles must be frozen.
        parameters: The trainable arrays that the head uses; empty where it is frozen.
        hidden_states: [positions, hidden], those that predict a supervised token; at least one.
        targets: [positions], the tokens that they predict.
        weights: [positions] float32; 0 leaves a position out.
        chunk: Positions whose logits exist at a time, at most.
        fused: Whether MLX's kernel computes it, where the head is whole.

    Returns:
        A float32 scalar.
    """

    chunk = even_chunk(targets.shape[0], chunk)
    way = _fused if fused else _at_once
    of_chunk = partial(_by_tiles, head) if isinstance(head, TiledHead) else partial(way, head)

    # Every array comes in as an argument: a closure over a traced array breaks `mx.compile`.
    @mx.custom_function
    def computed(
        parameters: HeadParameters, hidden_states: mx.array, targets: mx.array, weights: mx.array
    ) -> tuple[mx.array, HeadParameters, mx.array]:
        loss = mx.array(0.0)
        for_parameters = {name: mx.zeros(value.shape) for name, value in parameters.items()}
        for_hidden: list[mx.array] = []
        for start in range(0, targets.shape[0], chunk):
            rows = slice(start, start + chunk)
            states = after([loss, *for_parameters.values(), *for_hidden[-1:]], hidden_states[rows])
            chunk_loss, chunk_parameters, chunk_hidden = of_chunk(parameters, states, targets[rows], weights[rows])
            loss = loss + chunk_loss
            for name, gradient in chunk_parameters.items():
                for_parameters[name] = for_parameters[name] + gradient
            for_hidden.append(chunk_hidden)
        # Added up in float32, and rounded once.
        rounded = {name: gradient.astype(parameters[name].dtype) for name, gradient in for_parameters.items()}
        return loss, rounded, mx.concatenate(for_hidden)

    @computed.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        _, for_parameters, for_hidden = outputs
        scale = cotangents[0]
        return (
            {name: scale.astype(gradient.dtype) * gradient for name, gradient in for_parameters.items()},
            scale.astype(for_hidden.dtype) * for_hidden,
            *map(mx.zeros_like, primals[2:]),
        )

    outputs: Any = computed(parameters, hidden_states, targets, weights)
    loss: mx.array = outputs[0]
    return loss


def _at_once(
    head: Head,
    parameters: HeadParameters,
    hidden_states: mx.array,
    targets: mx.array,
    weights: mx.array,
) -> tuple[mx.array, HeadParameters, mx.array]:
    """One exponential a logit: with e = exp(l − max l), the loss is log Σe + max l − l_y and dL/dl is e / Σe − [y]."""
    logits = head(parameters, hidden_states)
    precise = logits.astype(mx.float32)
    losses, exponentials, total = _losses(precise, targets)
    for_logits = exponentials * (weights[:, None] / total)
    for_logits = for_logits.at[mx.arange(targets.shape[0]), targets].add(-weights)
    flat = [hidden_states, *parameters.values()]
    _, (for_hidden, *for_values) = mx.vjp(_of_arrays(head, parameters), flat, [for_logits.astype(logits.dtype)])
    return (weights * losses).sum(), dict(zip(parameters, for_values, strict=True)), for_hidden


def _fused(
    head: Head,
    parameters: HeadParameters,
    hidden_states: mx.array,
    targets: mx.array,
    weights: mx.array,
) -> tuple[mx.array, HeadParameters, mx.array]:
    """The same by MLX's kernel, which reads the logits as they are and sums them up in float32."""
    logits_of = _of_arrays(head, parameters)

    def losses_of(*flat: mx.array) -> mx.array:
        return mx.fast.cross_entropy(logits_of(*flat), targets)

    (losses,), (for_hidden, *for_values) = mx.vjp(losses_of, [hidden_states, *parameters.values()], [weights])
    return (weights * losses).sum(), dict(zip(parameters, for_values, strict=True)), for_hidden


def _of_arrays(head: Head, parameters: HeadParameters) -> Callable[..., mx.array]:
    """The head as a function of hidden states and of the values of its parameters, one after another."""
    names = list(parameters)

    def flat_head(hidden_states: mx.array, *values: mx.array) -> mx.array:
        return head(dict(zip(names, values, strict=True)), hidden_states)

    return flat_head


def fused_holds(head: Head, hidden_states: mx.array) -> bool:
    """Whether MLX's kernel gives what is computed here of some hidden states [positions, hidden], the loss of each and the gradient."""
    positions, vocabulary = head({}, hidden_states).shape
    targets = mx.arange(positions) * 7919 % vocabulary
    for weights in mx.eye(positions):  # one after another: a sum would hide what is wrong with one
        (loss, _, gradient), (plain, _, expected) = (
            way(head, {}, hidden_states, targets, weights) for way in (_fused, _at_once)
        )
        losses_agree = mx.abs(loss - plain) <= 1e-4 * mx.abs(plain)
        gradients_agree = mx.abs(gradient - expected).max() <= 2e-2 * mx.abs(expected).max()
        if not (losses_agree.item() and gradients_agree.item()):
            return False
    return True


def _by_tiles(
    head: TiledHead,
    parameters: HeadParameters,
    hidden_states: mx.array,
    targets: mx.array,
    weights: mx.array,
) -> tuple[mx.array, HeadParameters, mx.array]:
    """The same, with Σe and (e W) added up over tiles; both shrink where a later tile has a higher logit."""
    highest, total = _before_any(targets)
    for_hidden = mx.zeros(hidden_states.shape)
    for tile in head.tiles:
        of_tile = partial(head.logits, tile=tile)
        states = after([total, for_hidden], hidden_states)
        logits = of_tile(states)
        before, (highest, exponentials) = highest, _exponentials(logits, highest)
        _, (gradient,) = mx.vjp(of_tile, [states], [exponentials.astype(logits.dtype)])
        shrunk = exponential(before - highest)
        total = shrunk * total + row_sums(exponentials)
        for_hidden = shrunk * for_hidden + gradient
    of_targets = partial(head.target_logits, targets=targets)
    ones = mx.ones((targets.shape[0], 1), hidden_states.dtype)
    (target_logits,), (for_targets,) = mx.vjp(of_targets, [hidden_states], [ones])
    losses = (mx.log(total) + highest - target_logits)[:, 0]
    gradients = weights[:, None] * (for_hidden / total - for_targets)
    return (weights * losses).sum(), {}, gradients.astype(hidden_states.dtype)


def _before_any(targets: mx.array) -> tuple[mx.array, mx.array]:
    """The highest logit and Σe of each position, [positions, 1], before any tile; finite, so that a tile of −∞ leaves them as they are."""
    positions = (targets.shape[0], 1)
    return mx.full(positions, mx.finfo(mx.float32).min), mx.zeros(positions)


def _exponentials(logits: mx.array, highest: mx.array) -> tuple[mx.array, mx.array]:
    """The highest logit so far, and e = exp(l − that) of a tile, in float32."""
    precise = logits.astype(mx.float32)
    highest = mx.maximum(highest, precise.max(axis=-1, keepdims=True))
    return highest, exponential(precise - highest)


def position_losses(
    head: Head | TiledHead, hidden_states: mx.array, targets: mx.array, chunk: int, *, fused: bool = False
) -> tuple[mx.array, mx.array]:
    """The loss −log p(target) and the likeliest token of each position, [positions], chunk after chunk; no gradients."""
    of_chunk = (
        partial(_evaluate_by_tiles, head) if isinstance(head, TiledHead) else partial(_evaluate_at_once, head, fused)
    )
    chunk = even_chunk(targets.shape[0], chunk)
    found: list[tuple[mx.array, mx.array]] = []
    for start in range(0, targets.shape[0], chunk):
        rows = slice(start, start + chunk)
        found.append(of_chunk(after(found[-1] if found else (), hidden_states[rows]), targets[rows]))
    return mx.concatenate([losses for losses, _ in found]), mx.concatenate([likeliest for _, likeliest in found])


def _evaluate_at_once(head: Head, fused: bool, hidden_states: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Losses and likeliest tokens, [positions]."""
    logits = head({}, hidden_states)
    losses = mx.fast.cross_entropy(logits, targets) if fused else _losses(logits.astype(mx.float32), targets)[0]
    return losses, logits.argmax(-1)


def _evaluate_by_tiles(head: TiledHead, hidden_states: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """The same; of tokens that are equally likely, the first."""
    highest, total = _before_any(targets)
    likeliest = mx.zeros(targets.shape, mx.uint32)
    for tile in head.tiles:
        logits = head.logits(after([total, likeliest], hidden_states), tile)
        before, (highest, exponentials) = highest, _exponentials(logits, highest)
        total = exponential(before - highest) * total + row_sums(exponentials)
        likeliest = mx.where((highest > before)[:, 0], logits.argmax(-1) + tile.start, likeliest)
    target_logits = head.target_logits(hidden_states, targets)
    return (mx.log(total) + highest - target_logits)[:, 0], likeliest


def _losses(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Losses [positions], e = exp(l − max l) [positions, vocabulary] and Σe [positions, 1]."""
    highest = logits.max(axis=-1, keepdims=True)
    exponentials = exponential(logits - highest)
    total = exponentials.sum(axis=-1, keepdims=True)
    target_logits = mx.take_along_axis(logits, targets[:, None], axis=-1)
    losses = (mx.log(total) + highest - target_logits)[:, 0]
    return losses, exponentials, total
