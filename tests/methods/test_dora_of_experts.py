"""DoRA on the experts of a layer: each expert's rows have norms of their own, as PEFT has it where experts are linear modules."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from mlx_lm.models.switch_layers import SwitchLinear
from safetensors.numpy import load_file

from mlx_sft import export, load_run, train
from mlx_sft.config import TrainConfig
from mlx_sft.errors import UserError
from mlx_sft.methods.adapter_check import PEFT, check_adapter
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.methods.lora_layers import DoraSwitchLinear
from mlx_sft.model.load import load_model
from mlx_sft.model.quantize import plain_weight
from tests.methods.runs import ROWS, check_resumes
from tests.methods.test_prompt import _examples
from tests.parity import assert_close, loss_and_gradients, loss_of_rows, losses_of_run, losses_of_steps

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
]

DORA = {"dora": True, "rank": 3, "alpha": 5.0}
DOWN = "model.layers.0.mlp.experts.down_proj"


class _Expert(torch.nn.Module):
    """One expert of three linear modules, as those of transformers 4 were."""

    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        for name, weight in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = torch.nn.Parameter(weight.clone())
            setattr(self, name, linear)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class _Experts(torch.nn.ModuleList):
    """In the place of transformers 5's stacks: every expert computes all tokens, and those that were not chosen weigh nothing."""

    def forward(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        of_expert = torch.zeros(len(x), len(self)).scatter(1, chosen, weights)
        return sum(of_expert[:, number, None] * expert(x) for number, expert in enumerate(self))


def _apart(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with a module for each expert, of a family that PEFT has no rules for."""
    for layer in model.model.layers:
        stacks = layer.mlp.experts
        halves = (weight.chunk(2) for weight in stacks.gate_up_proj.detach())
        layer.mlp.experts = _Experts(
            _Expert(gate, up, down) for (gate, up), down in zip(halves, stacks.down_proj.detach(), strict=True)
        )
    model.config.model_type = "experts_apart"
    return model


@pytest.fixture(scope="module")
def base(make_base: Callable[..., Path]) -> Path:
    return make_base("qwen3_moe")


@pytest.fixture
def given(base: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "model": str(base), "dtype": "float32", "batch_size": 4, "lr": 5e-3, "scheduler": "constant", "warmup": 0, "max_steps": 10,
        "weight_decay": 0.1, "max_grad_norm": 1.0, "out": str(tmp_path / "run"),
    } | DORA  # fmt: skip


def test_a_run_is_that_of_peft_with_experts_apart(
    base: Path, given: dict[str, Any], torch_model: Callable, torch_logits: Callable, mlx_logits: Callable,
    token_ids: list, tmp_path: Path,
) -> None:  # fmt: skip
    """PEFT opens the run's own files on linear modules; the merged model is the same in transformers 5, which puts experts together."""
    start = train(TrainConfig(**given | {"max_steps": 1, "lr": 0.0, "out": str(tmp_path / "start")}), data=ROWS).run_dir
    theirs = peft.PeftModel.from_pretrained(_apart(torch_model(base)), start / "adapter", is_trainable=True)
    expected = losses_of_steps(theirs, lambda: loss_of_rows(theirs, ROWS), 10, lr=5e-3)
    run = train(TrainConfig(**given), data=ROWS).run_dir
    np.testing.assert_allclose(losses_of_run(run), expected, atol=1e-4)
    assert expected[-1] < expected[0] - 0.1
    ours = mlx_logits(load_run(run).model, token_ids)
    opened = peft.PeftModel.from_pretrained(_apart(torch_model(base)), run / "adapter")
    assert_close(ours, torch.tensor(torch_logits(opened, token_ids)))
    stored = load_file(run / "adapter" / "adapter_model.safetensors")
    named = dict(opened.named_parameters())
    assert sum("experts" in name and "magnitude" in name for name in stored) == 2 * 4 * 3
    assert all(name.replace(".lora_magnitude_vector", ".lora_magnitude_vector.default.weight") in named
               for name in stored if "magnitude" in name)  # fmt: skip

    merged = export(run, tmp_path / "merged").path
    assert_close(ours, torch.tensor(torch_logits(torch_model(merged), token_ids)))
    with pytest.raises(ValueError, match=r"ParamWrapper does not work with use_dora=True"):
        peft.PeftModel.from_pretrained(torch_model(base), run / "adapter")
    for form, why in (
        ("peft", r"PEFT takes no DoRA on model\.layers\.0\.mlp\.experts\.\w+: transformers 5 has a parameter there"),
        ("mlx-lm", r"mlx-lm has no DoRA of experts"),
        ("gguf-adapter", r"lora_magnitude_vector|DoRA"),
    ):
        with pytest.raises(UserError, match=why) as error:
            export(run, tmp_path / form, format=form)
        assert "merged" in str(error.value.hint)
    assert any("DoRA" in str(problem) for problem in check_adapter(str(run)).problems[PEFT])


def test_killed_resumed_and_gone_on_from(base: Path, given: dict[str, Any], tmp_path: Path) -> None:
    """With the start of PiSSA, dropout and single ranks besides."""
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    settings = {
        "init": "pissa",
        "dropout": 0.1,
        "rank_pattern": {"up_proj": 2},
        "rslora": True,
        "data": str(tmp_path / "rows.jsonl"),
    }
    run = train(TrainConfig(**given | settings | {"max_steps": 4, "save_every": 2, "keep": 9})).run_dir
    files = [run / "adapter" / "adapter_model.safetensors"]
    files += [run / "checkpoints" / "step-00000004" / f"{name}.safetensors" for name in ("parameters", "optimizer")]
    check_resumes(run, files, 4)
    again = {"init_adapter": str(run / "adapter"), "max_steps": 1, "lr": 1e-9, "out": str(tmp_path / "again")}
    kept = {name: given[name] for name in ("model", "dtype", "batch_size")}
    on = train(TrainConfig(**kept | again), data=ROWS).run_dir
    for name, value in load_file(on / "adapter" / "adapter_model.safetensors").items():
        np.testing.assert_allclose(value, load_file(files[0])[name], atol=1e-6)


def test_the_cut_and_the_way_of_computing_change_nothing(base: Path) -> None:
    def found(**options: Any) -> tuple[float, dict[str, np.ndarray]]:
        loss, gradients = loss_and_gradients(base, Lora(LoraSettings(**DORA)), None, _examples(), **options)
        return loss.item(), {name: np.array(value) for name, value in gradients.items()}

    loss, gradients = found()
    assert np.abs(gradients[f"{DOWN}.lora_magnitude_vector"]).max() > 0
    for options in ({"token_budget": 1}, {"compiled": True}, {"mode": "blocks"}):
        again = found(**options)
        assert again[0] == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients.items():
            np.testing.assert_allclose(again[1][name], gradient, atol=1e-5 * np.abs(gradient).max(), err_msg=name)


def test_it_starts_as_its_quantized_base_and_trains(
    given: dict[str, Any], mlx_logits: Callable, token_ids: list
) -> None:
    model = load_model(given["model"], "float32", quantize="4").model
    plain = np.array(mlx_logits(model, token_ids))
    method = Lora(LoraSettings(**DORA))
    parameters = method.attach(model, seed=0)
    method.bind(model, parameters)
    np.testing.assert_allclose(mlx_logits(model, token_ids), plain, atol=1e-5 * np.abs(plain).max())
    norms = mx.linalg.norm(plain_weight(method.modules[DOWN].linear), axis=-1)
    assert mx.allclose(parameters[f"{DOWN}.lora_magnitude_vector"], norms, rtol=1e-5)
    losses = losses_of_run(train(TrainConfig(**given | {"quantize": "4", "max_steps": 6}), data=ROWS).run_dir)
    assert losses[-1] < losses[0] - 0.1


def test_each_token_has_the_norms_of_its_expert() -> None:
    """With biases, with dropout, and in half precision, whose products of experts MLX has on GPUs alone."""
    linear = SwitchLinear(16, 8, 3)
    linear.bias = mx.random.normal((3, 8), key=mx.random.key(1))
    layer = DoraSwitchLinear(linear, 2, 1.5, 0.5)
    layer.lora_B = mx.random.normal((3, 8, 2), key=mx.random.key(2))
    layer.lora_A = mx.random.normal((3, 2, 16), key=mx.random.key(3))
    layer.lora_magnitude_vector = mx.random.uniform(1, 2, (3, 8), key=mx.random.key(4))
    x, experts = mx.random.normal((6, 1, 16), key=mx.random.key(5)), mx.array([0, 0, 1, 2, 2, 2])
    for key in (None, mx.random.key(6)):
        layer.drop_with(key)
        kept = x
        if key is not None:
            kept = x * 2 * mx.random.bernoulli(0.5, x.shape, key=key).astype(mx.float32)
        for found in (layer(x, experts, sorted_indices=True), layer(x, experts)):
            for token, expert in enumerate(experts.tolist()):
                weight = linear.weight[expert]
                changed = weight + 1.5 * layer.lora_B[expert] @ layer.lora_A[expert]
                norms = layer.lora_magnitude_vector[expert] / mx.linalg.norm(changed, axis=1)
                expected = norms * (changed @ kept[token, 0]) + weight @ (x - kept)[token, 0] + linear.bias[expert]
                assert mx.allclose(found[token, 0], expected, atol=1e-4)
    linear.set_dtype(mx.bfloat16)
    assert layer(x.astype(mx.bfloat16), experts).dtype == layer._weight_times_A().dtype == mx.bfloat16
