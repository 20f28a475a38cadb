"""The chunked loss is the plain loss: in value, in gradient, and at the edges of its chunks."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_sft.model.head import SplitModel
from mlx_sft.model.tiles import TiledHead, tiled_head
from mlx_sft.training.loss import chunk_rows, cross_entropy_sum, even_chunk, position_losses

HIDDEN, VOCABULARY = 5, 11


def _head(parameters: dict[str, mx.array], hidden_states: mx.array) -> mx.array:
    return hidden_states @ parameters["weight"].T


def _reference(hidden: np.ndarray, weight: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """The definition, in float64."""
    logits = hidden @ weight.T
    highest = logits.max(-1)
    logsumexp = highest + np.log(np.exp(logits - highest[:, None]).sum(-1))
    return float((weights * (logsumexp - logits[np.arange(len(targets)), targets])).sum())


def _by_finite_differences(function: object, at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    gradient = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        moved = at.copy()
        moved[index] = at[index] + step
        above = function(moved)
        moved[index] = at[index] - step
        gradient[index] = (above - function(moved)) / (2 * step)
    return gradient


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    # Values that float32 holds exactly, so that both sides start from the same numbers.
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32).astype(np.float64)


def test_gradient_by_finite_differences_with_rows_of_no_one_and_all_positions_supervised() -> None:
    width = 6
    states, weight = _random(3, width, HIDDEN), _random(VOCABULARY, HIDDEN, seed=1)
    supervised = [(1, 4), *((2, i) for i in range(width))]  # of row 0 none, of row 1 one, of row 2 all
    positions = np.array([row * width + column for row, column in supervised])
    targets = np.random.default_rng(2).integers(0, VOCABULARY, len(positions))
    weights = np.linspace(0.5, 1.5, len(positions)).astype(np.float32).astype(np.float64)

    def ours(states: mx.array, weight: mx.array) -> mx.array:
        chosen = states.reshape(-1, HIDDEN)[mx.array(positions)]
        return cross_entropy_sum(
            _head, {"weight": weight}, chosen, mx.array(targets), mx.array(weights.astype(np.float32)), chunk=3
        )

    def exact(states: np.ndarray, weight: np.ndarray) -> float:
        return _reference(states.reshape(-1, HIDDEN)[positions], weight, targets, weights)

    loss, (for_states, for_weight) = mx.value_and_grad(ours, argnums=(0, 1))(
        mx.array(states.astype(np.float32)), mx.array(weight.astype(np.float32))
    )

    assert loss.dtype == mx.float32
    assert loss.item() == pytest.approx(exact(states, weight), rel=1e-6)
    numeric = _by_finite_differences(lambda moved: exact(moved, weight), states)
    np.testing.assert_allclose(np.array(for_states), numeric, atol=2e-6)
    assert not np.array(for_states)[0].any()
    assert np.abs(np.array(for_states)[2]).min(-1).all()
    numeric = _by_finite_differences(lambda moved: exact(states, moved), weight)
    np.testing.assert_allclose(np.array(for_weight), numeric, atol=2e-6)


@pytest.mark.parametrize("positions", [1, 7, 8, 9, 16, 17])
def test_the_edges_of_chunks_leave_no_trace(positions: int) -> None:
    hidden, weight = (mx.array(_random(n, HIDDEN, seed=n).astype(np.float32)) for n in (positions, VOCABULARY))
    targets = mx.array(np.arange(positions) % VOCABULARY)
    weights = mx.array(np.linspace(0.1, 1, positions).astype(np.float32))

    def plain(weight: mx.array, hidden: mx.array) -> mx.array:
        return (weights * nn.losses.cross_entropy(hidden @ weight.T, targets)).sum()

    def chunked(weight: mx.array, hidden: mx.array) -> mx.array:
        return cross_entropy_sum(_head, {"weight": weight}, hidden, targets, weights, chunk=8)

    expected, expected_gradients = mx.value_and_grad(plain, argnums=(0, 1))(weight, hidden)
    loss, gradients = mx.value_and_grad(chunked, argnums=(0, 1))(weight, hidden)

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert mx.abs(ours - theirs).max().item() < 1e-6


def test_what_the_loss_is_multiplied_by_multiplies_its_gradient() -> None:
    hidden, weight = (mx.array(_random(n, HIDDEN, seed=n).astype(np.float32)) for n in (4, VOCABULARY))
    targets, weights = mx.array([0, 3, 3, 10]), mx.ones(4)

    def loss(hidden: mx.array, scale: float) -> mx.array:
        return scale * cross_entropy_sum(_head, {"weight": weight}, hidden, targets, weights, chunk=3)

    once, thrice = (mx.grad(loss)(hidden, scale) for scale in (1.0, 3.0))
    assert mx.abs(once).max().item() > 0.1
    assert mx.allclose(thrice, 3 * once, rtol=1e-6).item()


def test_a_position_of_weight_zero_counts_for_nothing() -> None:
    hidden, weight = (mx.array(_random(n, HIDDEN, seed=n).astype(np.float32)) for n in (4, VOCABULARY))
    targets = mx.array([0, 3, 3, 10])

    def loss(hidden: mx.array, rows: slice, weights: mx.array) -> mx.array:
        return cross_entropy_sum(_head, {"weight": weight}, hidden[rows], targets[rows], weights, chunk=3)

    alone, gradient_alone = mx.value_and_grad(loss)(hidden, slice(0, 3), mx.ones(3))
    padded, gradient_padded = mx.value_and_grad(loss)(hidden, slice(0, 4), mx.array([1.0, 1, 1, 0]))
    assert padded.item() == pytest.approx(alone.item(), rel=1e-6)
    assert mx.allclose(gradient_padded, gradient_alone, atol=1e-6).item()
    assert not gradient_padded[3].any().item()


@pytest.mark.parametrize("size", [1e4, 1e30])
def test_large_logits_do_not_overflow(size: float) -> None:
    hidden = mx.array([[size], [-size]])

    def loss(hidden: mx.array) -> mx.array:
        weight = {"weight": mx.array([[1.0], [-1.0], [0.0]])}
        return cross_entropy_sum(_head, weight, hidden, mx.array([0, 2]), mx.ones(2), chunk=1)

    value, gradient = mx.value_and_grad(loss)(hidden)
    # The first is certain and right; the second is certain of token 1 and wrong by `size`.
    assert value.item() == pytest.approx(size, rel=1e-6)
    assert gradient.tolist() == [[0.0], [-1.0]]


def test_half_precision_hidden_states_keep_their_precision_and_a_float32_loss() -> None:
    hidden = mx.array(_random(9, HIDDEN)).astype(mx.bfloat16)
    weight = mx.array(_random(VOCABULARY, HIDDEN, seed=1)).astype(mx.bfloat16)
    targets = mx.array(np.arange(9))

    def loss(hidden: mx.array) -> mx.array:
        return cross_entropy_sum(_head, {"weight": weight}, hidden, targets, mx.ones(9), chunk=4)

    value, gradient = mx.value_and_grad(loss)(hidden)
    logits = np.array((hidden @ weight.T).astype(mx.float32), np.float64)
    assert value.dtype == mx.float32
    assert value.item() == pytest.approx(_reference(logits, np.eye(VOCABULARY), np.arange(9), np.ones(9)), rel=1e-6)
    assert gradient.dtype == mx.bfloat16


class _Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = [nn.Linear(HIDDEN, HIDDEN)]

    def __call__(self, token_ids: mx.array) -> mx.array:
        return mx.tanh(self.layers[0](self.embed_tokens(token_ids)))


class SoftCapped(nn.Module):
    """A tied head that is scaled and soft-capped, as some families have it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _Body()

    def __call__(self, token_ids: mx.array) -> mx.array:
        return 2 * mx.tanh(self.model.embed_tokens.as_linear(self.model(token_ids)) * 3 / 2)


def test_a_soft_capped_head_is_learnt_through_as_it_is() -> None:
    mx.random.seed(0)
    model = SoftCapped()
    split = SplitModel(model)
    token_ids = mx.array([[1, 2, 3, 4, 5, 6, 7]])
    targets = mx.array([2, 3, 4, 5, 6, 7, 8])
    weight = model.model.embed_tokens.weight

    def plain(weight: mx.array) -> mx.array:
        model.model.embed_tokens.weight = weight
        return nn.losses.cross_entropy(model(token_ids)[0], targets).sum()

    def head(parameters: dict[str, mx.array], hidden_states: mx.array) -> mx.array:
        model.model.embed_tokens.weight = parameters["weight"]
        return split.logits(hidden_states)

    def chunked(weight: mx.array) -> mx.array:
        model.model.embed_tokens.weight = weight
        hidden_states = split.hidden_states(token_ids)[0]
        return cross_entropy_sum(head, {"weight": weight}, hidden_states, targets, mx.ones(7), chunk=3)

    assert split.body_name == "model"
    expected, expected_gradient = mx.value_and_grad(plain)(weight)
    loss, gradient = mx.value_and_grad(chunked)(weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert mx.abs(expected_gradient).max().item() > 0.1
    assert mx.allclose(gradient, expected_gradient, atol=1e-6).item()


def evaluate_positions(
    head: Any, hidden: mx.array, targets: mx.array, weights: mx.array, chunk: int
) -> tuple[mx.array, mx.array]:
    """The weighted sum of losses, and the weighted count of positions whose likeliest token is the target."""
    losses, likeliest = position_losses(head, hidden, targets, chunk)
    return (weights * losses).sum(), (weights * (likeliest == targets)).sum()


def test_evaluation_sums_losses_and_right_answers() -> None:
    hidden, weight = (mx.array(_random(n, HIDDEN, seed=n).astype(np.float32)) for n in (9, VOCABULARY))
    likeliest = (hidden @ weight.T).argmax(-1)
    targets = mx.where(mx.arange(9) < 5, likeliest, (likeliest + 1) % VOCABULARY)
    weights = mx.array([0.0, 1, 1, 1, 1, 1, 1, 1, 0])

    loss, correct = evaluate_positions(lambda _, h: h @ weight.T, hidden, targets, weights, chunk=4)

    plain = (weights * nn.losses.cross_entropy(hidden @ weight.T, targets)).sum()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert correct.item() == 4


def test_chunks_are_128_mebibytes_of_logits_and_never_too_small_for_a_matrix_product() -> None:
    assert chunk_rows(151_936) == 220
    assert chunk_rows(264) == 1024
    assert chunk_rows(10**6) == 64
    assert chunk_rows(151_936, "fused") == 512
    assert chunk_rows(264, "fused") == 1024


@pytest.mark.parametrize("case", ["frozen head", "trained head", "evaluation"])
def test_memory_does_not_grow_with_positions_times_vocabulary(case: str) -> None:
    vocabulary, chunk = 16_384, 64
    weight = mx.random.normal((vocabulary, 8))

    def loss(hidden: mx.array, weight: mx.array) -> mx.array:
        targets, weights = mx.zeros(len(hidden), mx.int32), mx.ones(len(hidden))
        if case == "trained head":
            return cross_entropy_sum(_head, {"weight": weight}, hidden, targets, weights, chunk)
        return cross_entropy_sum(lambda _, h: h @ weight.T, {}, hidden, targets, weights, chunk)

    def compute(hidden: mx.array) -> object:
        if case == "evaluation":
            targets, weights = mx.zeros(len(hidden), mx.int32), mx.ones(len(hidden))
            return evaluate_positions(lambda _, h: h @ weight.T, hidden, targets, weights, chunk)
        return mx.value_and_grad(loss, argnums=(0, 1) if case == "trained head" else 0)(hidden, weight)

    def peak(chunks: int) -> int:
        hidden = mx.random.normal((chunks * chunk, 8))
        mx.eval(hidden, weight)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(compute(hidden))
        return mx.get_peak_memory() - before

    few, many = peak(chunks=4), peak(chunks=24)
    one = 4 * chunk * vocabulary
    assert few > one
    assert many - few < 3 * one, "20 more chunks took more than 3 chunks of memory"


@pytest.mark.parametrize(("positions", "chunk"), [(1, 220), (220, 220), (221, 220), (674, 220), (7, 1), (1000, 300)])
def test_chunks_are_as_few_as_can_be_and_even(positions: int, chunk: int) -> None:
    even = even_chunk(positions, chunk)
    sizes = [min(even, positions - start) for start in range(0, positions, even)]
    assert len(sizes) == math.ceil(positions / chunk)
    assert max(sizes) <= chunk
    assert max(sizes) - min(sizes) < len(sizes)


class _Model(nn.Module):
    """Soft-capped logits of so many tokens."""

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.model = _Body()
        self.lm_head = nn.Linear(HIDDEN, vocabulary, bias=False)
        self.lm_head.weight = 3 * mx.random.normal((vocabulary, HIDDEN), key=mx.random.key(1))

    def __call__(self, token_ids: mx.array) -> mx.array:
        return 20 * mx.tanh(self.lm_head(self.model(token_ids)) / 20)


def _in_tiles(columns: int, model: _Model) -> tuple[SplitModel, TiledHead]:
    split = SplitModel(model)
    head = tiled_head(split)
    assert head is not None
    head.columns = columns
    return split, head


@pytest.mark.parametrize("columns", [1, 3, 5, 10, 11, 12])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_edges_of_tiles_leave_no_trace(columns: int, dtype: mx.Dtype) -> None:
    model = _Model()
    model.set_dtype(dtype)
    split, head = _in_tiles(columns, model)
    states = mx.array(_random(VOCABULARY, HIDDEN)).astype(dtype)
    targets, weights = mx.arange(VOCABULARY), mx.linspace(0, 1, VOCABULARY)

    def whole(states: mx.array) -> mx.array:
        return (weights * nn.losses.cross_entropy(split.logits(states).astype(mx.float32), targets)).sum()

    def tiled(states: mx.array) -> mx.array:
        return cross_entropy_sum(head, {}, states, targets, weights, chunk=4)

    (expected, expected_gradient), *found = (mx.value_and_grad(f)(states) for f in (whole, tiled, mx.compile(tiled)))
    tolerance = 1e-5 if dtype == mx.float32 else 2e-2
    for loss, gradient in found:
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
        assert gradient.dtype == dtype
        difference = mx.abs(gradient.astype(mx.float32) - expected_gradient.astype(mx.float32)).max()
        assert difference.item() <= tolerance * mx.abs(expected_gradient).max().item()


class _Uncapped(_Model):
    def __call__(self, token_ids: mx.array) -> mx.array:
        return self.lm_head(self.model(token_ids))


@pytest.mark.parametrize("highest_first", [False, True])
def test_far_logits_overflow_in_no_tile(highest_first: bool) -> None:
    """Those whose exponential is no float32 come in the first tile or in the last."""
    model = _Uncapped()
    split, head = _in_tiles(3, model)
    weight = mx.linspace(-90, 90, VOCABULARY * HIDDEN).reshape(VOCABULARY, HIDDEN)
    model.lm_head.weight = -weight if highest_first else weight
    states, targets, weights = mx.ones((VOCABULARY, HIDDEN)), mx.arange(VOCABULARY), mx.ones(VOCABULARY)

    def tiled(states: mx.array) -> mx.array:
        return cross_entropy_sum(head, {}, states, targets, weights, chunk=4)

    loss, gradient = mx.value_and_grad(tiled)(states)
    logits = split.logits(states)
    assert logits.max().item() > 400
    assert loss.item() == pytest.approx(nn.losses.cross_entropy(logits, targets).sum().item())
    assert mx.isfinite(gradient).all().item()


def test_tokens_that_cannot_be_make_no_difference() -> None:
    """A tile of −∞ alone, before and after others."""
    model = _Uncapped()
    split, head = _in_tiles(2, model)
    model.lm_head.bias = mx.array([-math.inf] * 4 + [0.0] * 3 + [-math.inf] * 4)
    states, targets, weights = mx.array(_random(3, HIDDEN)).astype(mx.float32), mx.array([4, 5, 6]), mx.ones(3)
    loss, gradient = mx.value_and_grad(lambda s: cross_entropy_sum(head, {}, s, targets, weights, 4))(states)
    expected = nn.losses.cross_entropy(split.logits(states)[:, 4:7], targets - 4).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert mx.isfinite(gradient).all().item()
    assert mx.allclose(mx.stack(evaluate_positions(head, states, targets, weights, 4))[0], expected).item()


@pytest.mark.parametrize("columns", [1, 4, 11])
def test_an_evaluation_in_tiles_is_that_of_the_whole(columns: int) -> None:
    model = _Model()
    weight = model.lm_head.weight
    equally_likely = mx.arange(VOCABULARY)[:, None] == 7
    model.lm_head.weight = mx.where(equally_likely, weight[2], weight)
    split, head = _in_tiles(columns, model)
    states = mx.concatenate([mx.array(_random(20, HIDDEN)).astype(mx.float32), 9 * weight[2:3], 9 * weight[2:3]])
    likeliest = split.logits(states).argmax(-1)
    assert likeliest[-1].item() == 2
    targets = mx.where(mx.arange(22) % 3 == 0, (likeliest + 1) % VOCABULARY, likeliest)
    targets[-2:] = mx.array([2, 7])
    weights = mx.linspace(0.5, 1, 22)

    found = evaluate_positions(head, states, targets, weights, chunk=6)
    expected = evaluate_positions(lambda _, states: split.logits(states), states, targets, weights, chunk=6)

    assert 0 < expected[1].item() < weights.sum().item()
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert found[1].item() == pytest.approx(expected[1].item(), rel=1e-6)


def test_the_gradient_of_a_head_in_bfloat16_is_added_up_in_float32_and_rounded_once() -> None:
    """Chunk by chunk in bfloat16, it would be off by eight times as much."""
    random = np.random.default_rng(0)
    weight = mx.array(random.normal(0, 0.1, (50, 64)).astype(np.float32)).astype(mx.bfloat16)
    states = mx.array(random.normal(1, 1, (256, 64)).astype(np.float32)).astype(mx.bfloat16)
    targets, weights = mx.zeros((256,), mx.int32), mx.ones((256,))

    def head(parameters: dict[str, mx.array], hidden_states: mx.array) -> mx.array:
        return hidden_states @ parameters["weight"].astype(mx.bfloat16).T

    def gradient(weight: mx.array) -> mx.array:
        of_weight = mx.grad(lambda it: cross_entropy_sum(head, {"weight": it}, states, targets, weights, chunk=1))
        return of_weight(weight)

    found, precise = gradient(weight), gradient(weight.astype(mx.float32))
    assert (found.dtype, precise.dtype) == (mx.bfloat16, mx.float32)
    error = mx.linalg.norm(found.astype(mx.float32) - precise) / mx.linalg.norm(precise)
    assert error.item() < 4e-3
