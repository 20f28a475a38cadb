"""Cross-entropy over supervised positions only, in chunks, with its gradient computed in the forward pass.

    hidden_states [positions, hidden] ─► a hundred rows at a time ─► head ─► logits [chunk, vocabulary] ─► loss, dL/dh

No positions × vocabulary tensor ever exists: a chunk's logits become its loss and its gradient at once, and backward is one
multiplication. Knows nothing of the body, or of where the positions come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_sft.operations.exponential import exponential

HeadParameters = dict[str, mx.array]

Head = Callable[[HeadParameters, mx.array], mx.array]
"""`head(parameters, hidden_states[positions, hidden]) -> logits[positions, vocabulary]`."""

_CHUNK_BYTES = 128 * 2**20


def chunk_rows(vocabulary: int) -> int:
    """Rows whose float32 logits fit 128 MiB, at least 64: 220 for a vocabulary of 152k. More of them are multiplied no faster."""
    return max(64, min(1024, _CHUNK_BYTES // (4 * vocabulary)))


def chunk_choices(vocabulary: int) -> tuple[int, int, int]:
    """Chunks to choose among: the one that is as fast as any, and smaller ones, with which the head's weights are read more often."""
    rows = chunk_rows(vocabulary)
    return rows, rows // 2, rows // 8


def even_chunk(positions: int, chunk: int) -> int:
    """The chunk by which positions are cut into as few chunks as by this one, all of about one size: a small last one is slow."""
    return -(-positions // -(-positions // chunk))


def cross_entropy_sum(
    head: Head,
    parameters: HeadParameters,
    hidden_states: mx.array,
    targets: mx.array,
    weights: mx.array,
    chunk: int,
) -> mx.array:
    """Σ weights · (log Σ exp(logits) − logits[target]), differentiable in the hidden states and the head's parameters.

    Args:
        head: Hidden states to logits.
        parameters: The trainable arrays that the head uses; empty where it is frozen.
        hidden_states: [positions, hidden], those that predict a supervised token; at least one.
        targets: [positions], the tokens that they predict.
        weights: [positions] float32; 0 leaves a position out.
        chunk: Positions whose logits exist at a time, at most.

    Returns:
        A float32 scalar.
    """

    chunk = even_chunk(targets.shape[0], chunk)

    # Every array comes in as an argument: a closure over a traced array breaks `mx.compile`.
    @mx.custom_function
    def fused(
        parameters: HeadParameters, hidden_states: mx.array, targets: mx.array, weights: mx.array
    ) -> tuple[mx.array, HeadParameters, mx.array]:
        loss = mx.array(0.0)
        for_parameters = {name: mx.zeros_like(value) for name, value in parameters.items()}
        for_hidden: list[mx.array] = []
        for start in range(0, targets.shape[0], chunk):
            rows = slice(start, start + chunk)
            states = _after([loss, *for_parameters.values(), *for_hidden[-1:]], hidden_states[rows])
            chunk_loss, chunk_parameters, chunk_hidden = _chunk_loss_and_gradients(
                head, parameters, states, targets[rows], weights[rows]
            )
            loss = loss + chunk_loss
            for name, gradient in chunk_parameters.items():
                for_parameters[name] = for_parameters[name] + gradient
            for_hidden.append(chunk_hidden)
        return loss, for_parameters, mx.concatenate(for_hidden)

    @fused.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        _, for_parameters, for_hidden = outputs
        scale = cotangents[0]
        return (
            {name: scale * gradient for name, gradient in for_parameters.items()},
            scale.astype(for_hidden.dtype) * for_hidden,
            *map(mx.zeros_like, primals[2:]),
        )

    outputs: Any = fused(parameters, hidden_states, targets, weights)
    loss: mx.array = outputs[0]
    return loss


def _chunk_loss_and_gradients(
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
    names = list(parameters)

    def flat_head(hidden_states: mx.array, *values: mx.array) -> mx.array:
        return head(dict(zip(names, values, strict=True)), hidden_states)

    _, (for_hidden, *for_values) = mx.vjp(
        flat_head, [hidden_states, *parameters.values()], [for_logits.astype(logits.dtype)]
    )
    return (weights * losses).sum(), dict(zip(names, for_values, strict=True)), for_hidden


def evaluate_positions(
    head: Head, hidden_states: mx.array, targets: mx.array, weights: mx.array, chunk: int
) -> tuple[mx.array, mx.array]:
    """The weighted sum of losses, and the weighted count of positions whose likeliest token is the target; no gradients."""
    loss, correct = mx.array(0.0), mx.array(0.0)
    chunk = even_chunk(targets.shape[0], chunk)
    for start in range(0, targets.shape[0], chunk):
        rows = slice(start, start + chunk)
        logits = head({}, _after([loss, correct], hidden_states[rows])).astype(mx.float32)
        losses, _, _ = _losses(logits, targets[rows])
        loss = loss + (weights[rows] * losses).sum()
        correct = correct + (weights[rows] * (logits.argmax(-1) == targets[rows])).sum()
    return loss, correct


def _after(results: list[mx.array], hidden_states: mx.array) -> mx.array:
    """The hidden states, once the results of the chunk before are there: left to itself, MLX computes many side by side."""
    states: list[mx.array] = mx.depends([hidden_states], results)
    return states[0]


def _losses(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Losses [positions], e = exp(l − max l) [positions, vocabulary] and Σe [positions, 1]."""
    highest = logits.max(axis=-1, keepdims=True)
    exponentials = exponential(logits - highest)
    total = exponentials.sum(axis=-1, keepdims=True)
    target_logits = mx.take_along_axis(logits, targets[:, None], axis=-1)
    losses = (mx.log(total) + highest - target_logits)[:, 0]
    return losses, exponentials, total
