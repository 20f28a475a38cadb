"""The gradient of one micro-batch, and one optimizer step made of several: token-weighted, so that the cut cannot matter.

    gradient of a step = Σ over its supervised tokens of weight · dL/dθ, divided by Σ weight, which the host knows beforehand

Knows nothing of files, schedules or evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_sft.data.batches import Batch, MicroBatch, collate, round_up
from mlx_sft.data.encode import Example
from mlx_sft.data.store import Examples
from mlx_sft.methods import Binder, Parameters
from mlx_sft.model.head import SplitModel
from mlx_sft.training.loss import chunk_rows, cross_entropy_sum, evaluate_positions
from mlx_sft.training.recompute import recomputed

Shape = tuple[int, int, int]
"""Rows, width and supervised positions of a micro-batch: what a compiled trace is for."""

_Gradient = Callable[..., tuple[mx.array, Parameters]]


@dataclass(frozen=True)
class Evaluation:
    """Sums over a set of examples.

    Attributes:
        loss: Weighted mean over supervised tokens, in nats.
        token_accuracy: Share of supervised tokens that are the likeliest, weighted alike.
    """

    loss: float
    token_accuracy: float
    tokens: int
    supervised_tokens: int


class Learner:
    """Losses and gradients of a split model under a method.

    Args:
        recompute: Gradient checkpointing.
        compiled: Shapes whose micro-step is compiled; others run as they are.
    """

    def __init__(
        self,
        split: SplitModel,
        method: Binder,
        vocabulary: int,
        *,
        recompute: bool = False,
        compiled: Collection[Shape] = (),
    ) -> None:
        self._split = split
        self._method = method
        self._recompute = recompute
        self._compiled = frozenset(compiled)
        self._chunk = chunk_rows(vocabulary)
        self._gradient: _Gradient = mx.value_and_grad(self._loss)
        self._compiled_gradient: _Gradient = mx.compile(mx.value_and_grad(self._loss))

    def gradient(
        self,
        parameters: Parameters,
        examples: Sequence[Example],
        micro_batches: Sequence[MicroBatch],
        key: mx.array | None = None,
    ) -> tuple[mx.array, Parameters]:
        """The weighted mean loss over a step's supervised tokens, Σ weight · loss / Σ weight, and its gradient.

        Args:
            parameters: The trainable arrays.
            micro_batches: A cut of the step.
            key: Random key of the step's dropout; None for no dropout.

        Returns:
            The loss, and gradients of the parameters' names and shapes; all float32 and evaluated.
        """
        batches = [collate(examples, micro_batch) for micro_batch in micro_batches]
        total_weight = sum(float(batch.weights.sum(dtype=np.float64)) for batch in batches)
        keys = mx.random.split(key, len(batches) + 1) if key is not None else [None] * len(batches)
        loss = mx.array(0.0)
        total: Parameters = {}
        for batch, batch_key in zip(batches, keys, strict=False):
            batch_loss, gradients = self._micro_step(parameters, batch, total_weight, batch_key)
            loss = loss + batch_loss
            total = {name: total[name] + g if total else g for name, g in gradients.items()}
            del gradients  # so that the sum can take its place
            mx.eval(loss, total)
        self._method.bind(self._split.model, parameters)
        return loss, total

    def evaluate(
        self,
        parameters: Parameters,
        examples: Sequence[Example],
        micro_batches: Sequence[MicroBatch],
    ) -> Evaluation:
        """Token-mean loss and accuracy over all examples, without dropout or gradients."""
        self._method.bind(self._split.model, parameters)
        loss, correct, weight, tokens, supervised = 0.0, 0.0, 0.0, 0, 0
        for micro_batch in micro_batches:
            batch = collate(examples, micro_batch)
            hidden_states = self._supervised_states(mx.array(batch.token_ids), mx.array(batch.positions))
            sums = evaluate_positions(
                self._head,
                hidden_states,
                mx.array(batch.targets),
                mx.array(batch.weights),
                self._chunk,
            )
            mx.eval(sums)
            loss += to_float(sums[0])
            correct += to_float(sums[1])
            weight += float(batch.weights.sum(dtype=np.float64))
            tokens += batch.tokens
            supervised += len(batch.targets)
        return Evaluation(loss / weight, correct / weight, tokens, supervised)

    def _micro_step(
        self, parameters: Parameters, batch: Batch, total_weight: float, key: mx.array | None
    ) -> tuple[mx.array, Parameters]:
        shape = padded_shape(batch)
        compiled = shape in self._compiled
        padding = shape[2] - len(batch.targets) if compiled else 0
        weights = (batch.weights / total_weight).astype(np.float32)
        function = self._compiled_gradient if compiled else self._gradient
        return function(
            parameters,
            mx.array(batch.token_ids),
            mx.array(np.pad(batch.positions, (0, padding))),
            mx.array(np.pad(batch.targets, (0, padding))),
            mx.array(np.pad(weights, (0, padding))),
            key,
        )

    def _loss(
        self,
        parameters: Parameters,
        token_ids: mx.array,
        positions: mx.array,
        targets: mx.array,
        weights: mx.array,
        key: mx.array | None,
    ) -> mx.array:
        self._method.bind(self._split.model, parameters, key)
        with recomputed(self._split.layers) if self._recompute else nullcontext():
            hidden_states = self._supervised_states(token_ids, positions)
        return cross_entropy_sum(
            self._head,
            self._head_parameters(parameters),
            hidden_states,
            targets,
            weights,
            self._chunk,
        )

    def _supervised_states(self, token_ids: mx.array, positions: mx.array) -> mx.array:
        hidden_states = self._split.hidden_states(token_ids)
        return hidden_states.reshape(-1, hidden_states.shape[-1])[positions]

    def _head_parameters(self, parameters: Parameters) -> Parameters:
        """Those outside the repeated layers; the head may use them."""
        prefix = self._split.layers_prefix
        if not prefix:
            return {}
        return {name: value for name, value in parameters.items() if not name.startswith(prefix)}

    def _head(self, parameters: Parameters, hidden_states: mx.array) -> mx.array:
        if parameters:
            self._method.bind(self._split.model, parameters)
        return self._split.logits(hidden_states)


def to_float(scalar: mx.array) -> float:
    return float(scalar.item())  # type: ignore[arg-type]


def padded_shape(batch: Batch) -> Shape:
    """The shape of a micro-batch with its supervised positions rounded up to the grid."""
    rows, width = batch.token_ids.shape
    return rows, width, round_up(len(batch.targets))


def planned_shape(examples: Examples, micro_batch: MicroBatch) -> Shape:
    """`padded_shape` of the batch that `collate` would make, without making it."""
    supervised = int(examples.supervised_tokens[list(micro_batch.rows)].sum())
    return len(micro_batch.rows), micro_batch.width, round_up(supervised)
