"""What a step takes in memory, predicted from what is kept, what is trained and how large a micro-batch is.

    peak = weights + what is trained + what is kept for the backward pass + what passes at the highest point

Every count names what it is of; the tests hold the sum against what MLX measures. Knows nothing of machines or choices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_sft.model.head import SplitModel
from mlx_sft.model.names import transformers_name
from mlx_sft.model.tiles import COLUMNS
from mlx_sft.training.counts import LayerCounts, count_layers
from mlx_sft.training.loss import chunk_rows, even_chunk
from mlx_sft.training.recompute import Mode

MODES: tuple[Mode, ...] = ("off", "light", "layers", "blocks")
"""From the fastest to the one that keeps least."""

_OVERSHOT = 0.1
"""Of what passes, what one operation takes."""

_OPTIMIZER_BYTES = 12
"""A parameter in float32, and AdamW's two moments."""

_STATES_A_POSITION = 3.0
"""Hidden states of supervised positions: gathered, and their gradients, chunk by chunk and put together."""

_SUMS_A_POSITION = 2.0
"""In float32: their gradients as they run along from tile to tile."""


@dataclass(frozen=True)
class _Passing:
    """How many arrays exist at once at the highest points.

    Attributes:
        chunk: Of the size of a chunk's logits, or those of a tile of it.
        next_chunk: Of the one after it.
        features: In a layer's backward pass, for each of its features.
        again: The same where the layer is computed again for it.
        norms: Besides, then, for each width of a norm.
    """

    chunk: float
    next_chunk: float
    features: float
    again: float
    norms: float


_NEEDED = _Passing(chunk=4.4, next_chunk=0.0, features=1.1, again=1.5, norms=7.0)
_AHEAD = _Passing(chunk=5.0, next_chunk=5.5, features=2.0, again=2.5, norms=6.0)
"""What must exist, and what does where MLX makes room for operations ahead of their computation and nothing holds it back."""

_SCORES_LIGHT, _SCORES_AGAIN = 2.25, 1.5
"""Of scores, where attention keeps them: what passes when they are computed again alone, and besides what is kept with their layer."""


@dataclass(frozen=True)
class Prediction:
    """The parts of a step's peak, in bytes.

    Attributes:
        weights: Of the model, but for those that are trained as they are.
        trained: Parameters, the optimizer's state, and gradients that are added up.
        kept: Until the backward pass has used it.
        passing: The head's logits or a layer's backward pass, whichever is larger.
    """

    weights: int
    trained: int
    kept: int
    passing: int

    @property
    def peak(self) -> int:
        return self.weights + self.trained + self.kept + self.passing

    @property
    def limit(self) -> int:
        """What to hold MLX to, so that the peak is as predicted: it looks at its limit before an operation makes room, not after it."""
        return self.peak - int(_OVERSHOT * self.passing)


@dataclass(frozen=True)
class Footprint:
    """A model under a method, as far as memory goes.

    Attributes:
        layers: From the lowest trained one upwards; below it nothing is kept.
        below: Those that are computed forward only.
        weights: Bytes, but for those that are trained as they are.
        trainable: Numbers that are trained.
        itemsize: Bytes of a number in the model's precision.
        hidden: Width of its hidden states.
        vocabulary: Width of its logits.
        columns: Of a position's logits, those that exist at once.
        accumulates: Whether a step may have several micro-batches, whose gradients are added up.
        held: Whether MLX is held to the prediction, and so does not make room ahead of its computation.
        correction: What a measurement found what grows with the tokens to be, beside what is counted.
    """

    layers: tuple[LayerCounts, ...]
    below: tuple[LayerCounts, ...]
    weights: int
    trainable: int
    itemsize: int
    hidden: int
    vocabulary: int
    columns: int
    accumulates: bool = True
    held: bool = True
    correction: float = 1.0

    @classmethod
    def of(
        cls,
        split: SplitModel,
        parameters: Mapping[str, mx.array],
        vocabulary: int,
        *,
        tiled: bool,
        fused: bool,
        accumulates: bool = True,
    ) -> Footprint:
        """Of a model that a method is attached to, loaded or outlined.

        Args:
            parameters: The trainable arrays by name.
            tiled: Whether the head can be had in tiles of the vocabulary; it is where nothing but layers is trained.
            fused: Whether the device computes attention and norms in one piece, as GPUs do.
            accumulates: Whether a step may have several micro-batches.
        """
        weights: dict[str, mx.array] = tree_flatten(split.model.parameters(), destination={})  # type: ignore[assignment]
        held = {transformers_name(path): weight for path, weight in weights.items()}
        # Parameters of the model's own precision are not there twice.
        shared = sum(held[name].nbytes for name in parameters if name in held and held[name].dtype == mx.float32)
        layers = count_layers(split, fused=fused)
        lowest = next((index for index, layer in enumerate(layers) if layer.trained), len(layers))
        outside = split.outside_layers(parameters)
        if any("embed" in name for name in outside):
            lowest = 0
        return cls(
            layers=tuple(layers[lowest:]),
            below=tuple(layers[:lowest]),
            weights=weight_bytes(split) - shared,
            trainable=sum(array.size for array in parameters.values()),
            itemsize=split.model_dtype().size,
            hidden=max((layer.states for layer in layers), default=0) if split.body_name else vocabulary,
            vocabulary=vocabulary,
            columns=min(COLUMNS, vocabulary) if tiled and not outside else vocabulary,
            accumulates=accumulates,
            held=not fused,
        )

    def corrected(self, correction: float) -> Footprint:
        return replace(self, correction=correction)

    def predict(
        self,
        mode: Mode,
        tokens: int,
        *,
        width: int | None = None,
        supervised: int | None = None,
        head_chunk: int | None = None,
    ) -> Prediction:
        """The peak of a step's largest micro-batch.

        Args:
            tokens: Rows times width.
            width: Of a row; all tokens in one where None.
            supervised: Positions that predict a supervised token; where None, all and in chunks of the full size, so that more
                tokens never take less.
            head_chunk: Positions that go through the head at once; as many as are fast where None.
        """
        kept, work = self._of_layers(mode, tokens, tokens if width is None else width)
        rows = head_chunk or chunk_rows(self.columns)
        if supervised is None:
            positions, chunk = tokens, min(tokens, rows)
        else:
            positions, chunk = supervised, even_chunk(supervised, rows)
        states = (tokens + _STATES_A_POSITION * positions) * self.hidden * self.itemsize
        arrays = self._passing
        at_once = chunk * self.columns
        logits = arrays.chunk * at_once + arrays.next_chunk * min(positions * self.vocabulary - at_once, at_once)
        sums = _SUMS_A_POSITION * chunk * self.hidden if self.columns < self.vocabulary else 0
        passing = max(states + 4 * (logits + sums), work)
        # The gradient comes to be while what was kept goes.
        kept = max(kept * self.correction, 4 * self.trainable)
        trained = (_OPTIMIZER_BYTES + (4 if self.accumulates else 0)) * self.trainable
        return Prediction(self.weights, trained, int(kept), int(passing * self.correction))

    def most_tokens(self, mode: Mode, limit: int, most: int, head_chunk: int | None = None) -> int:
        """The most tokens of one row, at most `most`, whose peak is within a limit; 0 where not even one is."""

        def fits(tokens: int) -> bool:
            return self.predict(mode, tokens, head_chunk=head_chunk).peak <= limit

        if fits(most):
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def _of_layers(self, mode: Mode, tokens: int, width: int) -> tuple[float, float]:
        """What the layers keep, and the most that passes in one layer's backward pass."""
        size = tokens * self.itemsize
        if not self.layers:
            return 0.0, 0.0
        if mode == "off":
            return (
                size * sum(layer.off + width * layer.scores for layer in self.layers),
                size * max(self._passing.features * layer.features for layer in self.layers),
            )
        if mode == "light":
            return (
                size * sum(layer.light for layer in self.layers),
                size * max(self._light(layer, width) for layer in self.layers),
            )
        number = len(self.layers)
        if mode == "blocks":
            block = math.ceil(math.sqrt(number))
            number = math.ceil(number / block) + block
        return (
            size * number * max(layer.states for layer in self.layers),
            size * max(self._again(layer, width) for layer in self.layers),
        )

    @property
    def _passing(self) -> _Passing:
        return _NEEDED if self.held else _AHEAD

    def _light(self, layer: LayerCounts, width: int) -> float:
        """What passes for each token in a layer's backward pass, where what lies between its products is computed again."""
        return self._passing.features * layer.features + _SCORES_LIGHT * width * layer.scores

    def _again(self, layer: LayerCounts, width: int) -> float:
        """What a layer keeps and what passes, for each token, where the whole of it is computed again."""
        scores = (1 + _SCORES_AGAIN) * width * layer.scores
        return layer.off + scores + self._passing.again * layer.features + self._passing.norms * layer.norms


def weight_bytes(split: SplitModel) -> int:
    """Of all arrays of the model."""
    arrays: dict[str, mx.array] = tree_flatten(split.model.parameters(), destination={})  # type: ignore[assignment]
    return sum(array.nbytes for array in arrays.values())
