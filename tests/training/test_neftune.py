"""NEFTune: the noise is within the paper's bound, where transformers has it, and the same however a step is cut."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_sft.data.batches import JOINED, PADDED, Batch, Layout, collate, cut
from mlx_sft.data.dataset import Examples
from mlx_sft.data.example import Example
from mlx_sft.methods import Method
from mlx_sft.methods.full import Full
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.methods.prompt import Prompt, PromptSettings
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.training.checkpoint import dropout_key
from mlx_sft.training.neftune import Neftune
from mlx_sft.training.shapes import padded_shape
from mlx_sft.training.step import GradientComputer
from tests.parity import assert_close

pytestmark = pytest.mark.parity

ALPHA, KEY = 5.0, dropout_key(seed=0, step=3)
LENGTHS = (7, 12, 5, 9)


def _examples() -> Examples:
    rows = [np.arange(9, 9 + length, dtype=np.int32) for length in LENGTHS]
    weights = [np.array([0, 0, *[1] * (len(row) - 2)], np.float32) for row in rows]
    return Examples.of(Example(f"row {n}", row, own) for n, (row, own) in enumerate(zip(rows, weights, strict=True)))


def _batches(token_budget: int, layout: Layout = PADDED) -> list[Batch]:
    examples = _examples()
    return [collate(examples, part) for part in cut(range(4), examples.needed_lengths, token_budget, layout)]


def _gradient(
    base: Path,
    method: Method,
    batches: Sequence[Batch],
    alpha: float = ALPHA,
    *,
    compiled: bool = False,
    **options: Any,
) -> tuple[float, dict[str, np.ndarray], GradientComputer]:
    split = SplitModel(load_model(str(base), "float32").model)
    parameters = method.attach(split.model, seed=0)
    shapes = [padded_shape(batch) for batch in batches] if compiled else []
    computer = GradientComputer(split, method, 264, compiled=shapes, neftune_alpha=alpha, **options)
    loss, gradients, _ = computer.gradient(parameters, batches, KEY)
    return loss.item(), {name: np.array(value) for name, value in gradients.items()}, computer


@pytest.mark.parametrize(("family", "scale"), [("qwen3", 1.0), ("gemma3_text", 8.0)])
def test_it_is_uniform_noise_of_the_papers_size_where_transformers_adds_it(
    family: str, scale: float, make_base: Callable[..., Path], torch_model: Callable
) -> None:
    """Gemma's embeddings are scaled inside of transformers' `embed_tokens`, and so before the noise."""
    base, (batch,) = make_base(family, tied=True), _batches(1000)
    model = load_model(str(base), "float32").model
    neftune, token_ids = Neftune(model, ALPHA), mx.array(batch.token_ids)
    with neftune.added(neftune.draw([batch], KEY)[0]):
        noisy = model.model.embed_tokens(token_ids)
    noise = scale * np.array(noisy - model.model.embed_tokens(token_ids))
    for row, length in enumerate(batch.lengths):
        bound, own = ALPHA / math.sqrt(length * 64), noise[row, : length - 1]
        assert 0.97 * bound < np.abs(own).max() <= bound * (1 + 1e-5)
        assert own.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert abs(np.corrcoef(own) - np.eye(length - 1)).max() < 0.6
    theirs = torch_model(base)
    added = torch.nn.functional.pad(torch.tensor(noise), (0, 0, 0, 1))  # the last token of each predicts nothing
    hook = theirs.get_input_embeddings().register_forward_hook(lambda _, given, out: out + added)
    pad = torch.nn.utils.rnn.pad_sequence
    rows = [torch.arange(9, 9 + length) for length in batch.lengths]
    labels = [torch.cat([torch.full((2,), -100), row[2:]]) for row in rows]
    expected = theirs(pad(rows, batch_first=True), labels=pad(labels, batch_first=True, padding_value=-100)).loss
    expected.backward()
    hook.remove()
    loss, gradients, _ = _gradient(base, Full(), [batch])
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    name = "model.layers.0.self_attn.k_proj.weight"
    assert_close(gradients[name], dict(theirs.named_parameters())[name].grad)


@pytest.mark.parametrize(
    "method", [lambda: Lora(LoraSettings(rank=4)), lambda: Prompt(PromptSettings(virtual_tokens=3))]
)
def test_the_cut_and_the_way_of_computing_change_nothing(
    method: Callable[[], Method], make_base: Callable[..., Path]
) -> None:
    """Nor does it matter to evaluation, where there is none."""
    base = make_base("qwen3")
    loss, gradients, computer = _gradient(base, method(), _batches(30))
    without, _, plain = _gradient(base, method(), _batches(30), alpha=0.0)
    assert abs(loss - without) > 1e-3
    parameters = method().attach(load_model(str(base), "float32").model, seed=0)
    assert computer.evaluate(parameters, _batches(30)).loss == plain.evaluate(parameters, _batches(30)).loss
    ways: list[tuple[list[Batch], dict[str, Any]]] = [
        (_batches(1), {}),
        (_batches(1000), {}),
        (_batches(30), {"compiled": True}),
        (_batches(30), {"recompute": "blocks"}),
    ]
    if isinstance(method(), Lora):
        ways.append((_batches(1000, JOINED), {}))
    for batches, options in ways:
        again = _gradient(base, method(), batches, **options)
        assert again[0] == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients.items():
            np.testing.assert_allclose(again[1][name], gradient, atol=1e-5 * np.abs(gradient).max())


def test_each_step_and_each_conversation_has_noise_of_its_own(make_base: Callable[..., Path]) -> None:
    """One that a step has several times has other noise each time, the same in any cut."""
    (batch,) = _batches(1000)
    neftune = Neftune(load_model(str(make_base("qwen3")), "float32").model, ALPHA)
    keys = [np.array(neftune.draw([batch], dropout_key(0, step))[0][0]).reshape(-1, 2) for step in (1, 2)]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 2 * batch.token_ids.size

    def found(token_budget: int) -> list[np.ndarray]:
        examples, drawn = _examples(), []
        batches = [
            collate(examples, part) for part in cut([0, 1, 0, 2, 0], examples.needed_lengths, token_budget, PADDED)
        ]
        for one, (keys, _) in zip(batches, neftune.draw(batches, KEY), strict=True):
            drawn += [np.array(row)[: length - 1] for row, length in zip(keys, one.lengths, strict=True)]
        return drawn

    whole, in_parts = found(1000), found(1)
    assert all(map(np.array_equal, whole, in_parts))
    assert len(np.unique(np.concatenate(whole), axis=0)) == sum(map(len, whole))
