"""What is composed is what PEFT composes, and for `cat` the exact sum."""

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
from transformers import AutoModelForCausalLM

from mlx_sft.errors import UserError
from mlx_sft.load import load_adapter
from mlx_sft.methods import mlx_lm_files
from mlx_sft.methods.compose import merge_adapters
from mlx_sft.methods.lora import Lora, LoraSettings
from mlx_sft.methods.peft_files import read_adapter, write_adapter
from mlx_sft.model.linears import linear_modules
from mlx_sft.model.load import load_model
from mlx_sft.model.outline import outline
from tests.methods.test_adapters_in import of_peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

MODULE = "model.layers.0.self_attn.q_proj"


def _adapter(
    folder: Path, rank: int = 2, base: str = "m", seed: int = 0, modules: tuple[str, ...] = (MODULE,), **more: Any
) -> str:
    settings = LoraSettings(rank=rank, alpha=3.0, dropout=0.0, rslora=False, target=["q_proj"], init="kaiming", **more)
    random = np.random.default_rng(seed)
    parameters = {
        f"{module}.{half}": mx.array(random.normal(size=shape).astype(np.float32))
        for module in modules
        for half, shape in (("lora_A", (rank, 8)), ("lora_B", (6, rank)))
    }
    if settings.dora:
        parameters[f"{MODULE}.lora_magnitude_vector"] = mx.ones((6,))
    write_adapter(folder, settings, parameters, base)
    return str(folder)


def _update(folder: str | Path, module: str = MODULE) -> np.ndarray:
    settings, parameters = read_adapter(folder)
    lora_A, lora_B = (np.array(parameters[f"{module}.{half}"], np.float64) for half in ("lora_A", "lora_B"))
    product: np.ndarray = settings.scale_of(module) * lora_B @ lora_A
    return product


@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_it_is_what_peft_composes(
    method: Any, make_base: Callable[..., Path], make_adapter: Callable[..., Any], tmp_path: Path, torch_logits: Callable,
    token_ids: list[list[int]],
) -> None:  # fmt: skip
    base = make_base()
    folders = {}
    for name, alpha in (("a", 8.0), ("b", 3.0)):
        settings = LoraSettings(rank=3, alpha=alpha, dropout=0.0, rslora=False, target=["all-linear"], init="kaiming")
        parameters = make_adapter(base, settings)
        factor = 1 if name == "a" else -0.5
        write_adapter(tmp_path / name, settings, {n: factor * p[..., ::-1] for n, p in parameters.items()}, str(base))
        folders[name] = str(tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(model, folders["a"], adapter_name="a")
    theirs.load_adapter(folders["b"], adapter_name="b")
    theirs.add_weighted_adapter(["a", "b"], [0.7, -0.3], "both", combination_type=method, svd_rank=4)
    theirs.set_adapter("both")
    expected = torch_logits(theirs.eval(), token_ids)

    rank = 4 if method == "svd" else None
    merged = merge_adapters(
        [f"{folders['a']}:0.7", f"{folders['b']}:-0.3"], tmp_path / "both", method=method, rank=rank
    )

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ours = torch_logits(peft.PeftModel.from_pretrained(model, merged).eval(), token_ids)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_cat_is_the_exact_sum_of_adapters_of_any_ranks_and_modules(tmp_path: Path) -> None:
    other = "model.layers.1.self_attn.q_proj"
    one = _adapter(tmp_path / "a", rank=2)
    two = _adapter(tmp_path / "b", rank=3, seed=1, modules=(MODULE, other))
    merged = merge_adapters([f"{one}:0.25", two], tmp_path / "both", method="cat")
    np.testing.assert_allclose(_update(merged), 0.25 * _update(one) + _update(two), atol=1e-6)
    np.testing.assert_allclose(_update(merged, other), _update(two, other), atol=1e-6)
    config = json.loads((merged / "adapter_config.json").read_text())
    assert {config["r"], *config["rank_pattern"].values()} == {5, 3}
    assert config["base_model_name_or_path"] == "m"


@pytest.mark.parametrize("rank", [6, 10**9])
def test_a_rank_that_no_sum_of_them_has_is_refused_before_anything_is_computed(rank: int, tmp_path: Path) -> None:
    folders = [_adapter(tmp_path / "a", rank=2), _adapter(tmp_path / "b", rank=3, seed=1)]
    with pytest.raises(UserError, match=rf"--rank {rank} is more than the sum of these adapters has, .* at most 5"):
        merge_adapters(folders, tmp_path / "c", method="svd", rank=rank)


def test_svd_with_rank_enough_is_the_exact_sum(tmp_path: Path) -> None:
    folders = [_adapter(tmp_path / "a", rank=2), _adapter(tmp_path / "b", rank=3, seed=1)]
    expected = sum(map(_update, folders))
    np.testing.assert_allclose(
        _update(merge_adapters(folders, tmp_path / "c", method="svd", rank=5)), expected, atol=1e-5
    )
    low = _update(merge_adapters(folders, tmp_path / "d", method="svd", rank=1))
    assert np.linalg.matrix_rank(low, tol=1e-4) == 1
    values = np.linalg.svd(expected, compute_uv=False)
    assert np.linalg.norm(low - expected) == pytest.approx(np.linalg.norm(values[1:]), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"rank": 3}, {"method": "linear"}, "matrices of different shapes"),
        ({"base": "other"}, {"method": "cat"}, "belongs to other, and .* to m"),
        ({"dora": True}, {"method": "cat"}, "DoRA cannot be added up"),
        ({}, {"method": "cat", "rank": 3}, "decides the rank itself"),
    ],
)
def test_what_does_not_fit_is_named(
    changes: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folders = [_adapter(tmp_path / "a"), _adapter(tmp_path / "b", **changes)]
    with pytest.raises(UserError, match=message):
        merge_adapters(folders, tmp_path / "both", **options)
    assert not (tmp_path / "both").exists()


def test_one_adapter_and_a_folder_in_use_are_refused(tmp_path: Path) -> None:
    one = _adapter(tmp_path / "a")
    with pytest.raises(UserError, match="one adapter alone"):
        merge_adapters([one], tmp_path / "both")
    with pytest.raises(UserError, match="already holds something"):
        merge_adapters([one, one], one)


def test_the_command_ends_with_the_folder(cli: Callable[..., Any], tmp_path: Path) -> None:
    folders = [_adapter(tmp_path / "a:b"), _adapter(tmp_path / "b", seed=1)]
    result = cli("adapters", "merge", f"{folders[0]}:0.5", folders[1], "--to", tmp_path / "c", "--method", "cat")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'c'}\n")
    np.testing.assert_allclose(_update(tmp_path / "c"), 0.5 * _update(folders[0]) + _update(folders[1]), atol=1e-6)
    assert cli("adapters", "merge", f"{folders[0]}:nan", folders[1], "--to", tmp_path / "d").exit_code == 2


def test_what_peft_would_lose_is_refused(
    make_base: Callable[..., Path], make_adapter: Callable, tmp_path: Path
) -> None:
    base = make_base("qwen2_moe")
    settings = LoraSettings(rank=2, alpha=4.0)
    write_adapter(tmp_path / "a", settings, make_adapter(base, settings), str(base))
    with pytest.raises(UserError, match=r"PEFT has no place for the adapter on .*experts") as caught:
        merge_adapters([str(tmp_path / "a")] * 2, tmp_path / "both", method="cat")
    assert "adapters check" in caught.value.hint
    assert not (tmp_path / "both").exists()


def test_adapters_of_mlx_lm_and_on_parameters_of_experts_are_composed(
    make_base: Callable[..., Path], tmp_path: Path, mlx_logits: Callable, token_ids: list
) -> None:
    base = make_base("qwen3_moe")
    of_peft(
        base, tmp_path / "a", target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    method, parameters = Lora.read(tmp_path / "a")
    assert method.needs_model(parameters)
    trained = method.of_model(load_model(str(base), "float32").model, parameters, tmp_path)
    mlx_lm_files.write_adapter(tmp_path / "b", method.settings, trained, str(base), mlx_names_of(base), 2)
    merged = merge_adapters([f"{tmp_path / 'a'}:0.25", f"{tmp_path / 'b'}:0.75"], tmp_path / "both", method="cat")
    expected = mlx_logits(load_adapter(tmp_path / "a", dtype="float32").model, token_ids)
    np.testing.assert_allclose(
        mlx_logits(load_adapter(merged, dtype="float32").model, token_ids),
        expected,
        rtol=0,
        atol=1e-5 * np.abs(expected).max(),
    )


def mlx_names_of(base: Path) -> dict[str, str]:
    return {name: path for name, (path, _) in linear_modules(outline(base, "float32").model).items()}
