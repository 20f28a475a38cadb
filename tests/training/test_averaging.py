"""What several processes exchange is a sum that is weighted already: the mean of their means would be the gradient of other rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_sft.config import TrainConfig
from mlx_sft.data.batches import Batch, MicroBatch, collate
from mlx_sft.data.dataset import Examples
from mlx_sft.methods import Parameters
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.model.head import SplitModel
from mlx_sft.model.load import load_model
from mlx_sft.objectives import Weighting
from mlx_sft.objectives.sft import SFT
from mlx_sft.training.step import GradientComputer

Computed = tuple[float, Parameters]


@pytest.fixture
def gradient(make_base: Callable[..., Path]) -> Callable[..., Computed]:
    """`gradient(batches, of=batches)`: loss and gradient of some micro-batches, divided by the supervised tokens of those in `of`."""
    split = SplitModel(load_model(str(make_base("qwen3")), "float32").model)
    method = Lora(TrainConfig(data="-", rank=4).settings(LoraSettings))
    random = np.random.default_rng(1)
    parameters = {
        name: value + mx.array(random.normal(0, 0.05, value.shape).astype(np.float32))
        for name, value in method.attach(split.model, seed=0).items()
    }
    computer = GradientComputer(split, method, vocabulary=264)

    def computed(batches: Sequence[Batch], of: Sequence[Batch]) -> Computed:
        weighting = Weighting([batch.weights for batch in batches], SFT().weigh(of).normalizer)
        found = computer.gradient(parameters, batches, weighting=weighting)
        return found.loss.item(), found.gradients

    return computed


def combined(parts: Sequence[Computed], weight: float) -> Computed:
    """The sum of what each process has, times a weight."""
    names = parts[0][1]
    return weight * sum(loss for loss, _ in parts), {
        name: weight * sum(gradients[name] for _, gradients in parts) for name in names
    }


def far(one: Parameters, other: Parameters) -> float:
    """The length of the difference of two gradients, beside that of the second."""
    difference, whole = (
        sum(float((array * array).sum()) for array in arrays)
        for arrays in ([one[name] - other[name] for name in other], other.values())
    )
    return float(np.sqrt(difference / whole))


def test_a_sum_of_weighted_gradients_is_the_step_of_one_machine_and_a_mean_of_means_is_not(
    gradient: Callable[..., Computed], examples: Examples
) -> None:
    batches = [collate(examples, MicroBatch((row,), int(length))) for row, length in enumerate(examples.needed_lengths)]
    supervised = [len(batch.targets) for batch in batches]
    fewest = int(np.argmin(supervised))
    shares = [[batches[fewest]], [batch for index, batch in enumerate(batches) if index != fewest]]
    tokens = [sum(len(batch.targets) for batch in share) for share in shares]
    assert tokens[1] > 5 * tokens[0]  # a mean of means would count each of the few as much as five of the many

    loss, one_machine = gradient(batches, of=batches)
    ours = combined([gradient(share, of=batches) for share in shares], 1.0)
    means = combined([gradient(share, of=share) for share in shares], 1 / len(shares))

    assert ours[0] == pytest.approx(loss, rel=1e-6)
    assert far(ours[1], one_machine) < 1e-6
    assert abs(means[0] - loss) > 0.01 * loss
    assert far(means[1], one_machine) > 0.5
