"""What a step takes in memory, predicted from what is kept, what is trained and how large a micro-batch is.

    peak = weights + what is trained + what is kept for the backward pass + what passes at the highest point

What a layer keeps is counted in `layer_counts.py`. The tests hold the sum against what MLX measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_sft.config import TrainConfig
from mlx_sft.methods import Method, Parameters
from mlx_sft.model.head import SplitModel
from mlx_sft.model.names import transformers_name
from mlx_sft.model.tiles import COLUMNS
from mlx_sft.optimizers import Optimizer
from mlx_sft.registry import OBJECTIVES, OPTIMIZERS
from mlx_sft.training.layer_counts import LayerCounts, count_layers
from mlx_sft.training.loss import HeadWay, chunk_choices, chunk_rows, even_chunk
from mlx_sft.training.recompute import Mode

MODES: tuple[Mode, ...] = ("off", "light", "layers", "blocks")
"""From the fastest to the one that keeps least."""

_OVERSHOT = 0.1
"""Of what passes, what one operation takes."""

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
        recomputed_multiplier: The same where the layer is recomputed for it.
        norms: Besides, then, for each width of a norm.
    """

    chunk: float
    next_chunk: float
    features: float
    recomputed_multiplier: float
    norms: float


_NEEDED = _Passing(chunk=4.4, next_chunk=0.0, features=1.1, recomputed_multiplier=1.5, norms=7.0)
_AHEAD = _Passing(chunk=5.0, next_chunk=5.5, features=2.0, recomputed_multiplier=2.5, norms=6.0)
"""What must exist, and what does where MLX makes room for operations ahead of their computation and nothing holds it back."""

_FUSED_LOGITS = 3.0
"""Of a chunk's logits and of the next one's, in the model's precision: they, their gradient, and what the head makes of them."""

_UNDER_WAY = 10 * 50 * 2**20
"""Bytes of commands that a GPU has not finished: MLX waits for the first of ten, and ends one where it holds 50 MB (0.32.4)."""

_TILE, _TILES = 1024, 3
_FLOATS_OF_ATTENDED, _FLOATS_OF_KEYS = 3.5, 2
"""In the backward pass of a GPU's attention: scores of so many queries and keys, and as many arrays of them; and in float32 for each
position, in widths of its result and of its keys (Metal, MLX 0.32.4)."""

_SCORES_LIGHT, _SCORES_RECOMPUTED = 2.25, 1.5
"""Of scores, where attention keeps them: what passes when they alone are recomputed, and besides what is kept with their layer."""

_STATES_KEPT = {"off": 2.2, "light": 0.9}
_STATES_PASSING = {"off": 1.2, "light": 1.0, "layers": 4.2, "blocks": 4.2}
"""Of the state of linear attention, in float32 for each token, where a loop goes over the positions (MLX 0.32.4)."""


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
        trained_bytes: What they are kept in; so is the gradient of a micro-batch, and the sum of several is float32.
        optimizer_state_bytes: Of the optimizer's state for all of them.
        itemsize: Bytes of a number in the model's precision.
        hidden: Width of its hidden states.
        vocabulary: Width of its logits.
        columns: Of a position's logits, those that exist at once.
        head: How the head's loss is computed.
        trains_weights: Whether weights of the model are trained as they are, and nothing else.
        adapters: Trained numbers that are none of the model's weights.
        trains_head: Whether something outside of the layers is trained, which the head may use.
        virtual_tokens: Positions in front of each row, of which its width says nothing.
        keys_in_front: Keys and values in front of each row, of which each row has a copy.
        in_front: Their numbers, of all layers; what is trained, or what is made of it.
        accumulates: Whether a step may have several micro-batches, whose gradients are added up.
        held: Whether MLX is held to the prediction, and so does not make room ahead of its computation.
        correction: What a measurement found what grows with the tokens to be, beside what is counted.
        fixed: Bytes that a checkpoint keeps beside what is trained.
    """

    layers: tuple[LayerCounts, ...]
    below: tuple[LayerCounts, ...]
    weights: int
    trainable: int
    trained_bytes: int
    optimizer_state_bytes: int
    itemsize: int
    hidden: int
    vocabulary: int
    columns: int
    head: HeadWay = "tiles"
    trains_weights: bool = False
    adapters: int = 0
    trains_head: bool = False
    virtual_tokens: int = 0
    keys_in_front: int = 0
    in_front: int = 0
    accumulates: bool = True
    held: bool = True
    correction: float = 1.0
    fixed: int = 0

    @classmethod
    def of(
        cls,
        config: TrainConfig,
        split: SplitModel,
        method: Method,
        parameters: Parameters,
        vocabulary: int,
        *,
        head: HeadWay,
        fused: bool,
        composes_attention: bool = False,
    ) -> Footprint:
        """Of a model that a method is attached to, loaded or outlined.

        Args:
            head: How its loss is computed; not in tiles where more than layers is trained.
            fused: Whether the device computes attention and norms in one piece, as GPUs do.
            composes_attention: Whether attention alone is composed of plain operations all the same.
        """
        weights: dict[str, mx.array] = tree_flatten(split.model.parameters(), destination={})  # type: ignore[assignment]
        held = {transformers_name(path): weight for path, weight in weights.items()}
        # Parameters of the model's own precision are not there twice.
        shared = sum(
            array.nbytes for name, array in parameters.items() if name in held and held[name].dtype == array.dtype
        )
        layers = count_layers(split, fused=fused, composes_attention=composes_attention)
        lowest = next((index for index, layer in enumerate(layers) if layer.trained), len(layers))
        outside, changed = split.outside_layers(parameters), method.changed_shapes(parameters)
        if any("embed" in name or name not in held for name in outside):
            lowest = 0  # a gradient goes through all layers: to the embedding, or to what a method puts before or between them
        in_head = any(map(method.in_head, outside))
        fixed = sum(array.nbytes for array in method.fixed.values())
        optimizer: type[Optimizer] = OPTIMIZERS[config.optimizer]
        shapes = {name: tuple(value.shape) for name, value in parameters.items()}
        return cls(
            layers=tuple(layers[lowest:]),
            below=tuple(layers[:lowest]),
            weights=weight_bytes(split) - shared + 2 * fixed,
            trainable=sum(array.size for array in parameters.values()),
            trained_bytes=sum(array.nbytes for array in parameters.values()),
            optimizer_state_bytes=optimizer.state_bytes(config.settings(optimizer.Settings), shapes),
            itemsize=split.model_dtype().size,
            hidden=max((layer.states for layer in layers), default=0) if split.body_name else vocabulary,
            vocabulary=vocabulary,
            columns=min(COLUMNS, vocabulary) if head == "tiles" and not in_head else vocabulary,
            head=head,
            trains_weights=parameters.keys() <= changed.keys(),
            adapters=sum(array.size for name, array in parameters.items() if name not in changed),
            trains_head=in_head,
            virtual_tokens=method.virtual_tokens,
            keys_in_front=method.keys_in_front,
            # The result of such a method is these alone, in float32.
            in_front=method.written_bytes(parameters) // 4 if method.keys_in_front else 0,
            accumulates=config.batch_size > 1 or OBJECTIVES[config.objective].compares,
            held=not fused,
            fixed=fixed,
        )

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
        rows = head_chunk or chunk_rows(self.columns, self.head)
        if supervised is None:
            positions, chunk = tokens, min(tokens, rows)
        else:
            positions, chunk = supervised, even_chunk(supervised, rows)
        width = tokens if width is None else width
        in_rows = -(-tokens // width)
        tokens += in_rows * self.virtual_tokens
        kept, work = self._of_layers(mode, tokens, width + self.virtual_tokens + self.keys_in_front)
        if self.keys_in_front and self.layers:  # of each row a copy, as long as what its layer keeps
            copies = in_rows * self.in_front * self.itemsize
            kept += copies if mode in ("off", "light") else 0
            kept += 8 * self.in_front if self.in_front != self.trainable else 0  # what was made, and its gradient
            work += copies / len(self.layers)
        states = (tokens + _STATES_A_POSITION * positions) * self.hidden * self.itemsize
        arrays = self._passing
        at_once = chunk * self.columns
        following = min(positions * self.vocabulary - at_once, at_once)
        logits = arrays.chunk * at_once + arrays.next_chunk * following
        if self.head == "fused":
            logits = _FUSED_LOGITS * (at_once + following) * self.itemsize / 4
        sums = _SUMS_A_POSITION * chunk * self.hidden if self.columns < self.vocabulary else 0
        passing = max(states + 4 * (logits + sums), work)
        passing += 0 if self.held else min(_UNDER_WAY, kept + passing)
        # The gradient comes to be while what was kept goes.
        kept = max(kept * self.correction, self.trained_bytes)
        sums = 4 * self.trainable if self.accumulates else 0
        trained = self.trained_bytes + sums + self.optimizer_state_bytes
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
        if not self.layers:
            return 0.0, 0.0
        number = len(self.layers)
        if mode == "blocks":
            block = math.ceil(math.sqrt(number))
            number = math.ceil(number / block) + block
        kept, passing = zip(*(self._of_layer(layer, mode, width) for layer in self.layers), strict=True)
        size = tokens * self.itemsize
        return size * (sum(kept) if mode in ("off", "light") else number * max(kept)), size * max(passing)

    def _of_layer(self, layer: LayerCounts, mode: Mode, width: int) -> tuple[float, float]:
        """What it keeps for each token, and what passes in its backward pass."""
        scores, arrays = width * layer.scores, self._passing
        recurrent = 4 / self.itemsize * layer.recurrent
        attention = self._attention_backward(layer, width) + _STATES_PASSING[mode] * recurrent
        states = _STATES_KEPT.get(mode, 0.0) * recurrent
        if mode == "off":
            return layer.off + scores + states, arrays.features * layer.features + attention
        if mode == "light":  # what lies between its products is recomputed
            return layer.light + states, arrays.features * layer.features + _SCORES_LIGHT * scores + attention
        recomputed = arrays.recomputed_multiplier * layer.features + arrays.norms * layer.norms
        return layer.states, layer.off + (1 + _SCORES_RECOMPUTED) * scores + recomputed + attention

    def _attention_backward(self, layer: LayerCounts, width: int) -> float:
        """What passes for each token in the backward pass of attention that the device computes in one piece."""
        if not layer.heads:
            return 0.0
        tiles = _TILES * layer.heads * min(width, _TILE) ** 2 / width
        return tiles + 4 / self.itemsize * (_FLOATS_OF_ATTENDED * layer.attended + _FLOATS_OF_KEYS * layer.keys)

    @property
    def checkpoint_bytes(self) -> int:
        """Of the parameters and the optimizer's state, on the disk."""
        return self.trained_bytes + self.optimizer_state_bytes + self.fixed

    @property
    def chunks(self) -> tuple[int, int, int]:
        """Positions that may go through the head at once, the most first."""
        return chunk_choices(self.columns, self.head)

    @property
    def _passing(self) -> _Passing:
        return _NEEDED if self.held else _AHEAD


def weight_bytes(split: SplitModel) -> int:
    """Of all arrays of the model."""
    arrays: dict[str, mx.array] = tree_flatten(split.model.parameters(), destination={})  # type: ignore[assignment]
    return sum(array.nbytes for array in arrays.values())
