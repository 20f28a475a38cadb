"""The gradient of one micro-batch, and of a step made of several: token-weighted, so that the cut cannot matter.

    gradient of a step = Σ over its supervised positions of weight · d(−log p)/dθ, divided by the objective's normalizer

A micro-batch that fails raises what `failures.py` has; `out_of_memory.py` says what is tried then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_sft.data.batches import Batch
from mlx_sft.errors import UserError
from mlx_sft.methods import Method, Parameters
from mlx_sft.model.head import SplitModel, training_mode
from mlx_sft.model.tiles import TiledHead, tiled_head
from mlx_sft.objectives import Objective, Weighting
from mlx_sft.objectives.sft import SFT
from mlx_sft.training.evaluation import Evaluation
from mlx_sft.training.failures import failures_noticed
from mlx_sft.training.gradient_sum import GradientSum
from mlx_sft.training.loss import (
    Head,
    HeadWay,
    chunk_rows,
    cross_entropy_sum,
    fused_holds,
    position_losses,
)
from mlx_sft.training.neftune import Draw, Neftune
from mlx_sft.training.ranks import ALONE
from mlx_sft.training.recompute import Mode, Recomputation
from mlx_sft.training.shapes import Shape, compiled_shape

_PROBE = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])

_SMALL = 0.02
"""A number like those of a model's weights."""

_Gradient = Callable[..., tuple[mx.array, Parameters]]


class StepGradient(NamedTuple):
    """What a step gives: the objective's value, the gradients by name, and the objective's metrics; all arrays are evaluated.

    Gradients are float32; those of a lone micro-batch are as its parameters are.
    """

    loss: mx.array
    gradients: Parameters
    metrics: Mapping[str, float]


class GradientComputer:
    """Losses and gradients of a split model under a method.

    Args:
        objective: What is minimized; SFT where None.
        recompute: What the backward pass computes again.
        compiled: Shapes whose micro-step is compiled; others run as they are.
        head_chunk: Positions that go through the head at once; where None, as many as are fast.
        neftune_alpha: Of the noise on the embeddings in training; 0 for none.

    Attributes:
        tiled_head: The head in tiles of the vocabulary; None where it cannot be had so, or MLX's own kernel is used.
        composes_attention: Whether attention is composed of plain operations.
        ranks: The processes among which micro-batches are shared out.
        trace_seconds: What the first run of each compiled shape took, in which it is traced; one for each trace.
    """

    def __init__(
        self,
        split: SplitModel,
        method: Method,
        vocabulary: int,
        objective: Objective | None = None,
        *,
        recompute: Mode = "off",
        compiled: Collection[Shape] = (),
        head_chunk: int | None = None,
        neftune_alpha: float = 0.0,
    ) -> None:
        self.ranks = ALONE
        self._split = split
        self._neftune = Neftune(split.model, neftune_alpha) if neftune_alpha else None
        self._method = method
        self._vocabulary = vocabulary
        self.objective = objective or SFT()
        split.run_body = method.run_body
        split.model.eval()  # but while gradients are taken
        self._fused = mx.default_device() == mx.Device(mx.gpu) and self._fused_holds()
        self.tiled_head = None if self._fused else tiled_head(split)
        self._head_chunk: int | None = None
        self.composes_attention = False
        self.mode = recompute
        self._recomputation = Recomputation(split, recompute)
        self.trace_seconds: list[float] = []
        self.configure(recompute, compiled, head_chunk)

    def compose_attention(self) -> None:
        """Compose attention of plain operations from now on."""
        self.composes_attention = True
        self._recomputation = Recomputation(self._split, self.mode, composes_attention=True)
        self.configure(self.mode, self.compiled)

    def configure(self, recompute: Mode, compiled: Collection[Shape] = (), head_chunk: int | None = None) -> None:
        """Compute from now on in this mode, compile these shapes, and take so many positions through the head at once (None: as before)."""
        if recompute != self.mode:
            self.mode = recompute
            composes = self.composes_attention
            self._recomputation = Recomputation(self._split, recompute, composes_attention=composes)
        self._head_chunk = head_chunk or self._head_chunk
        self.compiled = frozenset(compiled)
        self._traced: set[Shape] = set()
        self._gradient: _Gradient = mx.value_and_grad(self._loss)
        self._compiled_gradient: _Gradient = mx.compile(mx.value_and_grad(self._loss))
        self._added = mx.compile(self._add) if self.compiled else self._add

    def gradient(
        self,
        parameters: Parameters,
        batches: Sequence[Batch],
        key: mx.array | None = None,
        before_each: Callable[[], None] = lambda: None,
        weighting: Weighting | None = None,
    ) -> StepGradient:
        """The objective over a step's supervised positions, and its gradient.

        Args:
            parameters: The trainable arrays.
            batches: The micro-batches of the step.
            key: Random key of the step, for its dropout and noise, where there are any; None for neither.
            before_each: Called before each micro-batch; what it raises ends the step, and nothing has changed.
            weighting: What the positions weigh; the objective says it where None.

        Raises:
            OutOfMemory, Interrupted: If one of them fails; nothing has changed then.
        """
        of_dropout = key if self._method.uses_dropout else None
        keys = mx.random.split(of_dropout, len(batches) + 1) if of_dropout is not None else [None] * len(batches)
        draws = self._draws(batches, key)
        self.ranks.told_of(batches, "gradient", key)
        between = before_each if not self.ranks.sharded else lambda: None  # none leaves the others within a micro-batch
        try:
            with training_mode(self._split.model):
                if weighting is None:
                    weighting = self._weigh(batches, self._first_pass(parameters, batches, draws, keys, between))
                # Not those of the head, whose gradients are sums over its chunks.
                rounded = self._method.rounded(parameters) | self._of_head(parameters)
                weighs = [own_weights.any() for own_weights in weighting.weights]
                needed = [
                    index for index in range(len(batches)) if weighs[index] or not any(weighs)
                ]  # others' are zero
                mine = self.ranks.share([batch.token_ids.size for batch in batches])
                total = GradientSum(self.ranks, self._added, rounded)
                with total.of_all(needed):
                    if self.ranks.size > 1:
                        between()  # also where there is no share for this process
                    for index in needed:
                        if not mine[index]:
                            continue
                        between()
                        weights = (weighting.weights[index] / weighting.normalizer).astype(np.float32)
                        self._timed_step(total, index, rounded, batches[index], weights, keys[index], draws[index])
                    if self.ranks.sharded:
                        before_each()
        finally:
            self.bind(parameters)
        loss = total.loss if weighting.loss is None else mx.array(weighting.loss)
        return StepGradient(loss, total.gradients, weighting.metrics)

    @property
    def head_way(self) -> HeadWay:
        """How the head's loss is computed where the head is frozen."""
        return "fused" if self._fused else "whole" if self.tiled_head is None else "tiles"

    @property
    def virtual_tokens(self) -> int:
        """Positions in front of each row, of which a batch says nothing."""
        return self._method.virtual_tokens

    def bind(self, parameters: Parameters) -> None:
        """Put parameters into the model, without dropout."""
        self._method.bind(self._split.model, parameters)

    def keeps_rows_apart(self, parameters: Parameters, *, shared: bool = False) -> bool:
        """Whether the rows of a micro-batch may be joined, end to end; it is tried with no parameter at zero, where it would do nothing.

        Args:
            shared: And whether what some begin with alike may be computed once.
        """
        if self._method.most_positions is not None:
            return False
        keys = mx.random.split(mx.random.key(0), max(1, len(parameters)))
        moved = {
            name: value if value.any().item() else _SMALL * mx.random.normal(value.shape, value.dtype, key=key)
            for (name, value), key in zip(parameters.items(), keys, strict=False)
        }
        self.bind(moved)
        try:
            return self._recomputation.keeps_rows_apart(shared=shared)
        finally:
            self.bind(parameters)

    def evaluate(self, parameters: Parameters, batches: Iterable[Batch]) -> Evaluation:
        """The objective and the accuracy over all micro-batches, without dropout or gradients.

        Raises:
            OutOfMemory, Interrupted: If one of them fails.
        """
        self.bind(parameters)
        batches = list(batches)
        first_pass = self.objective.first_pass
        weighting = None if first_pass else self._weigh(batches, None)
        found = self._found(parameters, batches)
        log_probs = [log_p for log_p, _ in found]
        if weighting is None:
            weighting = self._weigh(batches, log_probs)
        # What a target weighs in the accuracy: as in the loss, where that is known without a first pass.
        counted = weighting.counted or ([batch.weights for batch in batches] if first_pass else weighting.weights)
        return Evaluation.of(batches, weighting, found, counted)

    def _found(
        self, parameters: Parameters, batches: Sequence[Batch]
    ) -> list[tuple[NDArray[np.float32], NDArray[np.uint32]]]:
        """log p of the targets of micro-batches, and the likeliest tokens; each process computes a share of them."""
        self.ranks.told_of(batches, "evaluate")
        found = self.ranks.joined(batches, lambda index: self._position_log_probs(parameters, batches[index]), 2)
        return [(log_p, likeliest.astype(np.uint32)) for log_p, likeliest in found]

    def example_log_probs(self, parameters: Parameters, batch: Batch) -> NDArray[np.float64]:
        """[rows] log p of each row's targets, summed with their weights, by the parameters that are bound.

        Raises:
            OutOfMemory, Interrupted: If it fails.
        """
        return batch.summed(self._position_log_probs(parameters, batch)[0])

    def _weigh(self, batches: Sequence[Batch], log_probs: list[NDArray[np.float32]] | None) -> Weighting:
        """What the objective says; raises `UserError` where it is not of these micro-batches."""
        weighting, name = self.objective.weigh(batches, log_probs), self.objective.name
        expected = [len(batch.targets) for batch in batches]
        given = [len(weights) for weights in weighting.weights]
        if given != expected:
            what = f"--objective {name} gives weights for {given} positions of micro-batches that have {expected}"
            raise UserError(what, hint="one array a micro-batch, with a number for each of its `targets`")
        if not weighting.normalizer > 0:
            raise UserError(f"--objective {name} divides by {weighting.normalizer}", hint="a normalizer is above 0")
        return replace(weighting, metrics={of: float(value) for of, value in weighting.metrics.items()})

    def _first_pass(
        self,
        parameters: Parameters,
        batches: Sequence[Batch],
        draws: Sequence[Draw | None],
        keys: Sequence[mx.array | None] | mx.array,
        before_each: Callable[[], None],
    ) -> list[NDArray[np.float32]] | None:
        """log p of every target as the model is now, with the dropout and noise of the step; None where the objective does not need it."""
        if not self.objective.first_pass:
            return None

        def computed(index: int) -> NDArray[np.float32]:
            before_each()
            self._method.bind(self._split.model, parameters, keys[index])
            return self._position_log_probs(parameters, batches[index], draws[index])[:1]

        return [log_p for (log_p,) in self.ranks.joined(batches, computed, 1)]

    def _draws(self, batches: Sequence[Batch], key: mx.array | None) -> Sequence[Draw | None]:
        return self._neftune.draw(batches, key) if self._neftune and key is not None else [None] * len(batches)

    def _position_log_probs(
        self, parameters: Parameters, batch: Batch, draw: Draw | None = None
    ) -> NDArray[np.float32]:
        """[2, positions] log p of the targets of a micro-batch, and the likeliest tokens, which float32 holds exactly."""
        head = self._head_for(parameters)
        with self.ranks.of_parts(), failures_noticed(batch):
            hidden_states = self._states_of(batch, draw)
            targets, chunk = mx.array(batch.targets), self._chunk(head)
            losses, likeliest = position_losses(head, hidden_states, targets, chunk, fused=self._fused)
            mx.eval(losses, likeliest)
        return np.stack([-np.array(losses), np.array(likeliest).astype(np.float32)])

    def _states_of(self, batch: Batch, draw: Draw | None) -> mx.array:
        """The hidden states that predict the targets of a micro-batch, without dropout but for that of the parameters that are bound."""
        self._recomputation.rows.spans = batch.spans
        with self._recomputation.active():
            return self._supervised_states(mx.array(batch.token_ids), mx.array(batch.positions), draw)

    def _add(self, total: Parameters, gradients: Parameters) -> Parameters:
        """The sum of some micro-batches' gradients, float32; `total` is empty before the first, whose own are the sum then."""
        gradients = self._method.unrounded(gradients)
        if not total:
            return gradients
        return {name: total[name].astype(mx.float32) + gradient for name, gradient in gradients.items()}

    def micro_step(
        self,
        parameters: Parameters,
        batch: Batch,
        weights: NDArray[np.float32],
        key: mx.array | None,
        draw: Draw | None = None,
    ) -> tuple[mx.array, Parameters]:
        """Σ weights · −log p(target) over a micro-batch, and its gradient, not yet evaluated, with respect to parameters or what
        the method has rounded them to."""
        shape = compiled_shape(batch, self.compiled)
        self._recomputation.rows.spans = batch.spans
        padding = shape[2] - len(batch.targets) if shape else 0
        function = self._compiled_gradient if shape else self._gradient
        return function(
            parameters,
            mx.array(batch.token_ids),
            mx.array(np.pad(batch.positions, (0, padding))),
            mx.array(np.pad(batch.targets, (0, padding))),
            mx.array(np.pad(weights, (0, padding))),
            key,
            draw,
        )

    def _timed_step(self, total: GradientSum, index: int, *of_step: Any) -> None:
        """A micro-step is added to the sum; what its first run of a compiled shape takes is noted apart."""
        batch: Batch = of_step[1]
        started = time.perf_counter()
        with self.ranks.of_parts(), failures_noticed(batch):
            total.add(index, lambda: self.micro_step(*of_step))
        seconds, shape = time.perf_counter() - started, compiled_shape(batch, self.compiled)
        if shape and shape not in self._traced:
            self._traced.add(shape)
            self.trace_seconds.append(seconds)
        else:
            self.ranks.took(seconds, batch.token_ids.size)

    def _loss(
        self,
        parameters: Parameters,
        token_ids: mx.array,
        positions: mx.array,
        targets: mx.array,
        weights: mx.array,
        key: mx.array | None,
        draw: Draw | None,
    ) -> mx.array:
        self._method.bind(self._split.model, parameters, key)
        with self._recomputation.active():
            hidden_states = self._supervised_states(token_ids, positions, draw)
        head = self._head_for(parameters)
        return cross_entropy_sum(
            head,
            self._of_head(parameters),
            hidden_states,
            targets,
            weights,
            self._chunk(head),
            fused=self._fused,
        )

    def _supervised_states(self, token_ids: mx.array, positions: mx.array, draw: Draw | None) -> mx.array:
        with self._neftune.added(draw) if self._neftune else nullcontext():
            hidden_states = self._split.hidden_states(token_ids)
        return hidden_states.reshape(-1, hidden_states.shape[-1])[positions]

    def _of_head(self, parameters: Parameters) -> Parameters:
        """The parameters that the head may use."""
        outside = self._split.outside_layers(parameters)
        return {name: value for name, value in outside.items() if self._method.in_head(name)}

    def head_is_frozen(self, parameters: Parameters) -> bool:
        """Whether training these leaves the head as it is."""
        return not self._of_head(parameters)

    def _head_for(self, parameters: Parameters) -> Head | TiledHead:
        """In tiles where it can be, which is where it is frozen."""
        return self.tiled_head if self.tiled_head is not None and self.head_is_frozen(parameters) else self._head

    def _chunk(self, head: Head | TiledHead) -> int:
        columns = head.columns if isinstance(head, TiledHead) else self._vocabulary
        return self._head_chunk or chunk_rows(columns, self.head_way)

    def _fused_holds(self) -> bool:
        states = self._split.hidden_states(_PROBE)
        return fused_holds(lambda _, hidden: self._split.logits(hidden), states.reshape(-1, states.shape[-1]))

    def _head(self, parameters: Parameters, hidden_states: mx.array) -> mx.array:
        if parameters:
            self._method.bind(self._split.model, parameters)
        return self._split.logits(hidden_states)


def to_float(scalar: mx.array) -> float:
    return float(scalar.item())  # type: ignore[arg-type]
