"""AdamW, clipping and the schedules are torch's and transformers', number for number."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)
from transformers.training_args import TrainingArguments

from mlx_sft.config import TrainConfig
from mlx_sft.optimizers import make_optimizer
from mlx_sft.optimizers.gradients import clip_scale, global_norm
from mlx_sft.training.schedule import learning_rate

pytestmark = pytest.mark.parity

SHAPES = {"a.weight": (4, 3), "norm.weight": (5,), "b.weight": (2, 2)}


def _config(**settings: object) -> TrainConfig:
    return TrainConfig(data="x.jsonl", **settings)


def _arrays(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: (scale * random.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def _mlx(arrays: dict[str, np.ndarray]) -> dict[str, mx.array]:
    return {name: mx.array(array) for name, array in arrays.items()}


def _decayed(name: str) -> bool:
    return "norm" not in name


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(
    ("steps", "warmup"), [(1, 0.0), (1, 1.0), (7, 0.0), (10, 0.03), (20, 0.25), (33, 0.1), (5, 1.0)]
)
def test_the_rate_of_every_step_is_transformers(scheduler: str, steps: int, warmup: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=3e-4)
    warmup_steps = TrainingArguments(warmup_steps=warmup if warmup < 1 else steps).get_warmup_steps(steps)
    if scheduler == "constant":
        schedule = get_constant_schedule_with_warmup(optimizer, warmup_steps)
    elif scheduler == "linear":
        schedule = get_linear_schedule_with_warmup(optimizer, warmup_steps, steps)
    else:
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup_steps, steps)
    config = _config(lr=3e-4, scheduler=scheduler, warmup=warmup)
    for step in range(1, steps + 1):
        assert learning_rate(config, step, steps) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-20)
        optimizer.step()
        schedule.step()


def test_ten_steps_are_torchs_with_decay_for_some() -> None:
    config = _config(lr=0.1, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-6)
    start = _arrays(0)
    torch_parameters = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in start.items()}
    groups = [
        {"params": [p for n, p in torch_parameters.items() if _decayed(n)], "weight_decay": 0.3},
        {"params": [p for n, p in torch_parameters.items() if not _decayed(n)], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6)
    parameters = _mlx(start)
    ours = make_optimizer(config, parameters, _decayed)
    for step in range(1, 11):
        # Small gradients, too: there epsilon and the correction of the bias show.
        gradients = _arrays(step, scale=10.0 ** (-step))
        rate = 0.1 / step
        for group in theirs.param_groups:
            group["lr"] = rate
        for name, parameter in torch_parameters.items():
            parameter.grad = torch.tensor(gradients[name])
        theirs.step()
        parameters = ours.update(parameters, _mlx(gradients), rate)
        assert list(parameters) == list(SHAPES)
        for name, parameter in torch_parameters.items():
            np.testing.assert_allclose(
                np.array(parameters[name]), parameter.detach().numpy(), rtol=1e-4, atol=2e-6, err_msg=f"{name} {step}"
            )


def test_the_first_step_moves_by_the_rate() -> None:
    """With bias correction; without it, the first update would be three times as large."""
    parameters = {"w": mx.array([0.0, 0.0])}
    updated = make_optimizer(_config(), parameters, _decayed).update(parameters, {"w": mx.array([1e-3, -1e3])}, 0.5)
    np.testing.assert_allclose(np.array(updated["w"]), [-0.5, 0.5], rtol=1e-4)


def test_a_state_goes_into_a_file_and_comes_back() -> None:
    config = _config(weight_decay=0.1)
    parameters = _mlx(_arrays(0))
    before = make_optimizer(config, parameters, _decayed)
    for step in (1, 2, 3):
        parameters = before.update(parameters, _mlx(_arrays(step)), 0.1)
    flat = before.flat_state()
    assert {name for name, array in flat.items() if not isinstance(array, mx.array)} == set()

    again = make_optimizer(config, _mlx(_arrays(9)), _decayed)
    again.load_flat_state(dict(flat))

    assert again.flat_state().keys() == flat.keys()
    one, two = (optimizer.update(parameters, _mlx(_arrays(4)), 0.05) for optimizer in (before, again))
    assert all(mx.array_equal(one[name], two[name]) for name in SHAPES)


def test_a_state_of_other_parameters_is_refused() -> None:
    config = _config()
    state = make_optimizer(config, {"w": mx.ones(1)}, _decayed).flat_state()
    with pytest.raises(KeyError):
        make_optimizer(config, {"v": mx.ones(1)}, _decayed).load_flat_state(state)


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 1e6])
def test_clipping_is_torchs(max_norm: float) -> None:
    gradients = _arrays(0)
    parameters = [torch.nn.Parameter(torch.tensor(array)) for array in gradients.values()]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    our_norm = global_norm(_mlx(gradients))
    scale = clip_scale(our_norm, max_norm)
    assert scale is not None
    clipped = {name: gradient * scale for name, gradient in _mlx(gradients).items()}

    assert our_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    for ours, parameter in zip(clipped.values(), parameters, strict=True):
        np.testing.assert_allclose(np.array(ours), parameter.grad.numpy(), rtol=1e-6)


def test_a_norm_of_zero_does_not_clip() -> None:
    gradients = _mlx(_arrays(0, scale=100))
    assert clip_scale(global_norm(gradients), 0.0) is None
