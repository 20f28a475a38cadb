"""Every optimizer: its steps beside PyTorch's, transformers' or its paper's, its state exact, its memory as it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers.optimization import Adafactor

from mlx_sft.config import TrainConfig
from mlx_sft.errors import UserError
from mlx_sft.optimizers import make_optimizer
from mlx_sft.registry import OPTIMIZERS
from mlx_sft.safetensors_file import read_arrays, write_arrays
from tests.graphs import primitives

pytestmark = pytest.mark.parity

Array = NDArray[np.float32]
Arrays = dict[str, Array]

SHAPES = {
    "layers.0.q_proj.lora_A": (4, 6),
    "layers.0.q_proj.lora_B": (8, 4),
    "layers.0.norm.weight": (5,),
    "embed_tokens.weight": (7, 3),
}
EXPERTS = {"layers.0.mlp.experts.up_proj.lora_A": (3, 4, 6)}
DECAY = 0.3


def _arrays(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Arrays:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _mlx(arrays: Arrays) -> dict[str, mx.array]:
    return {name: mx.array(array) for name, array in arrays.items()}


def _decayed(name: str) -> bool:
    return "norm" not in name


def _config(**settings: object) -> TrainConfig:
    return TrainConfig(data="x.jsonl", **settings)


def _ours(config: TrainConfig, shapes: dict[str, tuple[int, ...]] = SHAPES, steps: int = 8) -> list[Arrays]:
    """The parameters after each of some steps."""
    parameters = _mlx(_arrays(0, shapes))
    optimizer = make_optimizer(config, parameters, _decayed)
    found = []
    for step in range(1, steps + 1):
        parameters = optimizer.update(parameters, _mlx(_arrays(step, shapes)), 0.1 / step)
        found.append({name: np.array(value) for name, value in parameters.items()})
    return found


def _theirs(make: Callable[[list[dict]], torch.optim.Optimizer], steps: int = 8) -> list[Arrays]:
    start = _arrays(0)
    parameters = {name: torch.nn.Parameter(torch.tensor(array)) for name, array in start.items()}
    groups = [
        {"params": [p for n, p in parameters.items() if _decayed(n)], "weight_decay": DECAY},
        {"params": [p for n, p in parameters.items() if not _decayed(n)], "weight_decay": 0.0},
    ]
    optimizer = make(groups)
    found = []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / step
        for name, gradient in _arrays(step).items():
            parameters[name].grad = torch.tensor(gradient)
        optimizer.step()
        found.append({name: p.detach().numpy().copy() for name, p in parameters.items()})
    return found


def _assert_equal(ours: list[Arrays], theirs: list[Arrays], tolerance: float = 1e-5) -> None:
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_allclose(one[name], other[name], rtol=tolerance, atol=tolerance, err_msg=f"{name} {step}")


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_torchs(momentum: float, nesterov: bool) -> None:
    config = _config(optimizer="sgd", momentum=momentum, nesterov=nesterov, weight_decay=DECAY)
    _assert_equal(_ours(config), _theirs(lambda groups: torch.optim.SGD(groups, momentum=momentum, nesterov=nesterov)))


@pytest.mark.parametrize("scale_parameter", [False, True])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adafactor_is_transformers(scale_parameter: bool, beta1: float) -> None:
    config = _config(optimizer="adafactor", scale_parameter=scale_parameter, beta1=beta1, weight_decay=DECAY)
    theirs = _theirs(
        lambda groups: Adafactor(
            groups, lr=0.1, relative_step=False, scale_parameter=scale_parameter, beta1=beta1 or None
        )
    )
    _assert_equal(_ours(config), theirs)


def _lion(parameters: Arrays, steps: int, betas: tuple[float, float]) -> list[Arrays]:
    """Algorithm 2 of the paper."""
    momenta = {name: np.zeros_like(value) for name, value in parameters.items()}
    found = []
    for step in range(1, steps + 1):
        rate = 0.1 / step
        updated = {}
        for name, gradient in _arrays(step).items():
            update = np.sign(betas[0] * momenta[name] + (1 - betas[0]) * gradient)
            decay = DECAY * parameters[name] if _decayed(name) else 0
            updated[name] = parameters[name] - rate * (update + decay)
            momenta[name] = betas[1] * momenta[name] + (1 - betas[1]) * gradient
        parameters = updated
        found.append(parameters)
    return found


def test_lion_is_its_papers() -> None:
    config = _config(optimizer="lion", betas=(0.8, 0.95), weight_decay=DECAY)
    _assert_equal(_ours(config), _lion(_arrays(0), 8, (0.8, 0.95)))


def _newton_schulz(matrix: Array) -> Array:
    """Five steps towards U Vᵀ, with the coefficients of the paper."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix) / (np.linalg.norm(matrix) + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


def _muon(matrix: Array, gradients: list[Array], nesterov: bool) -> list[Array]:
    momentum = np.zeros_like(matrix)
    found = []
    for step, gradient in enumerate(gradients, 1):
        rate = 0.1 / step
        momentum = 0.95 * momentum + 0.05 * gradient
        update = 0.95 * momentum + 0.05 * gradient if nesterov else momentum
        stretch = max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
        matrix = matrix * (1 - rate * DECAY) - rate * stretch * _newton_schulz(update)
        found.append(matrix)
    return found


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_its_papers_for_matrices_and_adamw_for_the_rest(nesterov: bool) -> None:
    ours = _ours(_config(optimizer="muon", nesterov=nesterov, weight_decay=DECAY))
    adamw = _ours(_config(optimizer="adamw", weight_decay=DECAY))
    for name in SHAPES:
        if name in ("layers.0.norm.weight", "embed_tokens.weight"):
            expected = [step[name] for step in adamw]
        else:
            expected = _muon(_arrays(0)[name], [_arrays(step)[name] for step in range(1, 9)], nesterov)
        for step, value in enumerate(expected):
            np.testing.assert_allclose(ours[step][name], value, rtol=2e-4, atol=2e-5, err_msg=name)


def test_muon_is_torchs_to_the_bfloat16_in_which_that_iterates() -> None:
    name = "layers.0.q_proj.lora_B"
    parameter = torch.nn.Parameter(torch.tensor(_arrays(0)[name]))
    optimizer = torch.optim.Muon([parameter], lr=0.1, weight_decay=DECAY, momentum=0.95)
    ours = _ours(_config(optimizer="muon", weight_decay=DECAY))
    for step in range(1, 9):
        optimizer.param_groups[0]["lr"] = 0.1 / step
        parameter.grad = torch.tensor(_arrays(step)[name])
        optimizer.step()
        np.testing.assert_allclose(ours[step - 1][name], parameter.detach().numpy(), atol=5e-3)


def test_muon_takes_each_expert_by_itself() -> None:
    (name, shape), *_ = EXPERTS.items()
    together = _ours(_config(optimizer="muon", weight_decay=DECAY), EXPERTS)
    for expert in range(shape[0]):
        gradients = [_arrays(step, EXPERTS)[name][expert] for step in range(1, 9)]
        alone = _muon(_arrays(0, EXPERTS)[name][expert], gradients, nesterov=True)
        for step, value in enumerate(alone):
            np.testing.assert_allclose(together[step][name][expert], value, rtol=2e-4, atol=2e-5)
    for name in ("experts.up_proj.lora_magnitude_vector", "transform.2.bias"):  # vectors, one for each expert or layer
        stack = {name: (4, 8)}
        of_muon, of_adamw = (_ours(_config(optimizer=kind), stack)[-1][name] for kind in ("muon", "adamw"))
        np.testing.assert_array_equal(of_muon, of_adamw)


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": name} for name in OPTIMIZERS.built_in()]
    + [{"optimizer": "sgd", "momentum": 0.9}, {"optimizer": "adafactor", "beta1": 0.9}],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_state_goes_into_a_file_and_comes_back_and_takes_what_it_says(
    settings: dict[str, object], tmp_path: Path
) -> None:
    config = _config(weight_decay=DECAY, **settings)
    shapes = SHAPES | EXPERTS | {"layers.0.up_proj.weight": (64, 96)}
    parameters = _mlx(_arrays(0, shapes))
    before = make_optimizer(config, parameters, _decayed)
    for step in (1, 2, 3):
        parameters = before.update(parameters, _mlx(_arrays(step, shapes)), 0.1)
    flat = before.flat_state()
    kind = OPTIMIZERS[config.optimizer]
    said = kind.state_bytes(config.settings(kind.Settings), shapes)
    assert said == sum(value.nbytes for name, value in flat.items() if not name.endswith("|"))

    again = make_optimizer(config, _mlx(_arrays(9, shapes)), _decayed)
    write_arrays(tmp_path / "optimizer.safetensors", flat)
    again.load_flat_state({name: mx.array(value) for name, value in read_arrays(tmp_path / "optimizer.safetensors")})

    one, two = (optimizer.update(parameters, _mlx(_arrays(4, shapes)), 0.05) for optimizer in (before, again))
    assert all(mx.array_equal(one[name], two[name]) for name in shapes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"optimizer": "lion", "eps": 1e-8},
            "eps: a setting of --optimizer adamw and adamw8bit, and this run has --optimizer lion",
        ),
        ({"optimizer": "sgd", "nesterov": True}, "nesterov: needs a momentum above 0"),
        ({"optimizer": "adam"}, "optimizer: there is adamw, adamw8bit, adafactor, lion, muon, sgd, not 'adam'"),
    ],
)
def test_settings_of_another_optimizer_are_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        _config(**settings)
    assert message in caught.value.what


# Compiled, as on a GPU


def _two(config: TrainConfig, shapes: dict[str, tuple[int, ...]], *, compiled: bool) -> list[Arrays]:
    """The parameters after each of three steps, of which gradients are clipped in two."""
    parameters = _mlx(_arrays(0, shapes))
    optimizer = make_optimizer(config, parameters, _decayed, compiled=compiled)
    found = []
    for step, scale in ((1, None), (2, mx.array(0.25)), (3, mx.array(0.5))):
        parameters = optimizer.update(parameters, _mlx(_arrays(step, shapes)), 0.1 / step, scale)
        found.append({name: np.array(value) for name, value in parameters.items()})
    return found


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_a_compiled_update_is_the_same(name: str) -> None:
    config = _config(optimizer=name, weight_decay=0.1)
    for ours, plain in zip(_two(config, SHAPES, compiled=True), _two(config, SHAPES, compiled=False), strict=True):
        for parameter, value in plain.items():
            np.testing.assert_allclose(ours[parameter], value, rtol=1e-5, atol=1e-6, err_msg=parameter)


@pytest.mark.parametrize("name", OPTIMIZERS.names())
def test_a_compiled_optimizer_goes_on_to_the_bit(name: str) -> None:
    config = _config(optimizer=name)
    parameters = _mlx(_arrays(0))
    before = make_optimizer(config, parameters, _decayed, compiled=True)
    parameters = before.update(parameters, _mlx(_arrays(1)), 0.1)
    again = make_optimizer(config, parameters, _decayed, compiled=True)
    again.load_flat_state(before.flat_state())
    one, two = (optimizer.update(parameters, _mlx(_arrays(2)), 0.05, mx.array(0.5)) for optimizer in (before, again))
    for parameter, value in one.items():
        assert np.array_equal(np.array(value), np.array(two[parameter]))


def test_a_compiled_update_with_its_clipping_takes_one_kernel_an_array(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Counted in the graph that is left to compute; a launch costs as much as some million numbers."""
    shapes = {f"layers.{number}.lora_A": (4, 6) for number in range(30)}
    counts = []
    for compiled in (False, True):
        parameters = _mlx(_arrays(0, shapes))
        optimizer = make_optimizer(_config(), parameters, _decayed, compiled=compiled)
        mx.eval(optimizer.flat_state())
        monkeypatch.setattr(mx, "eval", lambda *_: None)
        updated = optimizer.update(parameters, _mlx(_arrays(1, shapes)), 0.1, mx.array(0.5))
        monkeypatch.undo()
        counts.append(primitives(tmp_path / "graph.dot", *updated.values(), *optimizer.flat_state().values()))
    assert counts[0] > 15 * len(shapes)
    assert counts[1] <= 1.2 * len(shapes)
