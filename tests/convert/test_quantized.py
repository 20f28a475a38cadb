"""Adapters on a quantized base: trained on it exactly, and merged into the original or into what was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx_lm import load as load_of_mlx_lm
from mlx_lm.convert import convert as convert_of_mlx_lm
from safetensors.torch import load_file, save_file

from mlx_sft import TrainConfig, UserError, export, load_run, train
from mlx_sft.convert.targets.mlx import convert
from mlx_sft.model.load import load_model
from mlx_sft.model.outline import outline
from mlx_sft.model.quantize import weights_by_name
from mlx_sft.model.weights import Checkpoint
from mlx_sft.training.memory import weight_bytes
from tests.chosen import without_adapter

FORMS = ["4", "8", "mxfp4"]


@pytest.fixture
def base(make_base: Callable[..., Path]) -> Path:
    return make_base("qwen3", tied=True, intermediate_size=128)


@pytest.fixture
def run(settings: dict[str, Any], base: Path) -> Callable[..., Path]:
    """`run(**settings)` → the folder of a finished run that changes the model visibly."""

    def make(**changes: Any) -> Path:
        config = TrainConfig(**settings | {"model": str(base), "lr": 0.05, "dtype": "float32"} | changes)
        return train(config).run_dir

    return make


def _quantized(folder: Path, model: Path) -> Path:
    convert(str(model), folder, quantize="4")
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_base_is_quantized_as_mlx_lm_quantizes(
    base: Path, form: str, tmp_path: Path, token_ids: list, mlx_logits: Callable
) -> None:
    ours = load_model(str(base), "float32", quantize=form)
    how = {"4": {"q_bits": 4}, "8": {"q_bits": 8}, "mxfp4": {"q_mode": "mxfp4"}}[form]
    convert_of_mlx_lm(str(base), str(tmp_path / "theirs"), quantize=True, dtype="float32", **how)
    theirs, _ = load_of_mlx_lm(str(tmp_path / "theirs"))
    assert np.array_equal(mlx_logits(ours.model, token_ids), mlx_logits(theirs, token_ids))
    assert weight_bytes(outline(base, "float32", form)) == sum(
        w.nbytes for _, w in nn.utils.tree_flatten(ours.model.parameters())
    )


@pytest.mark.parametrize("form", [*FORMS, "a folder"])
def test_what_is_trained_on_it_is_the_gradient_of_the_quantized_model(
    base: Path, form: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    """A run on a quantized base has the losses of one on the numbers that its weights stand for."""
    quantize = {"model": str(_quantized(tmp_path / "q", base))} if form == "a folder" else {"quantize": form}
    one = run(out=str(tmp_path / "one"), **quantize)
    plain = export(one, tmp_path / "plain", base="dequantized", verify=False).path
    zero = json.loads((one / "adapter" / "adapter_config.json").read_text())
    assert zero["r"] == 2
    # The same base, its numbers written out: the adapter taken off again.
    dequantized = tmp_path / "dequantized"
    _without_adapter(plain, one, dequantized)
    other = run(out=str(tmp_path / "other"), model=str(dequantized))
    losses = [
        [json.loads(line)["loss"] for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (one, other)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4)
    assert losses[0][-1] < losses[0][0]


def _without_adapter(plain: Path, run: Path, to: Path) -> None:
    """A copy of an exported checkpoint whose quantized weights have no update: those of the run's base."""

    shutil.copytree(plain, to)
    weights = weights_by_name(load_run(run, base=True, dtype="float32").model)
    stored = load_file(to / "model.safetensors")
    save_file(
        {name: torch.tensor(np.array(weights[name].astype(mx.float32))) for name in stored},
        to / "model.safetensors",
        {"format": "pt"},
    )


@pytest.mark.parametrize("form", FORMS)
def test_dequantized_is_exactly_what_was_trained(
    form: str, base: Path, run: Callable[..., Path], tmp_path: Path, token_ids: list,
    mlx_logits: Callable, torch_logits: Callable, torch_model: Callable,
) -> None:  # fmt: skip
    folder = run(quantize=form)
    result = export(folder, tmp_path / "merged", base="dequantized")
    trained = mlx_logits(load_run(folder).model, token_ids)
    np.testing.assert_allclose(
        torch_logits(torch_model(result.path), token_ids), trained, atol=1e-4 * np.abs(trained).max()
    )
    assert result.verification is not None
    assert result.verification.kl < 1e-6
    assert result.verification.kl_limit is not None
    assert {name: t.shape for name, t in Checkpoint.open(result.path).tensors.items()} == {
        name: t.shape for name, t in Checkpoint.open(base).tensors.items()
    }
    before, after = (json.loads((path / "config.json").read_text()) for path in (base, result.path))
    assert {name: after[name] for name in before} == before
    assert not {"quantization", "quantization_config"} & after.keys()


def test_original_adds_the_adapter_to_full_precision_and_reports_what_quantizing_took(
    base: Path, run: Callable[..., Path], tmp_path: Path
) -> None:
    folder = run(quantize="4")
    result = export(folder, tmp_path / "merged")
    assert result.verification is not None
    assert result.verification.kl_limit is None
    assert result.verification.kl > 1e-6
    assert "from the quantized model that was trained" in str(result.verification)
    before, after = load_file(base / "model.safetensors"), load_file(result.path / "model.safetensors")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    adapted = load_run(folder).model.layers[0].self_attn.q_proj
    update = adapted.scale * np.array(adapted.lora_B) @ np.array(adapted.lora_A)
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_allclose(after[name] - before[name], update, atol=1e-6)


def test_a_folder_of_quantized_weights_is_merged_into_its_original_or_written_as_plain_numbers(
    base: Path, run: Callable[..., Path], tmp_path: Path, token_ids: list,
    mlx_logits: Callable, torch_logits: Callable, torch_model: Callable,
) -> None:  # fmt: skip
    quantized = _quantized(tmp_path / "quantized", base)
    folder = run(model=str(quantized))
    trained = mlx_logits(load_run(folder).model, token_ids)

    with pytest.raises(UserError, match="quantized, which an adapter cannot be added to") as caught:
        export(folder, tmp_path / "none")
    assert "--base-model" in caught.value.hint
    plain = export(folder, tmp_path / "plain", base="dequantized")
    np.testing.assert_allclose(
        torch_logits(torch_model(plain.path), token_ids), trained, atol=1e-4 * np.abs(trained).max()
    )
    assert "quantization" not in json.loads((plain.path / "config.json").read_text())
    again = export(folder, tmp_path / "again", base="dequantized", format="mlx", quantize="4")
    assert all(0 < lost < 100 for lost in again.lost.values())
    torch.manual_seed(1)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    shuffled = {name: w[torch.randperm(len(w))] for name, w in load_file(base / "model.safetensors").items()}
    save_file(shuffled, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="computes with another") as caught:
        export(folder, tmp_path / "none", base_model=str(other))
    assert "--base-model" in caught.value.hint
    original = export(folder, tmp_path / "original", base_model=str(base))
    assert original.verification is not None
    assert original.verification.kl_limit is None
    assert {p.name for p in original.path.iterdir()} == {p.name for p in base.iterdir()}


def test_quantizing_after_the_merge_tells_what_it_took(
    base: Path, run: Callable[..., Path], tmp_path: Path, token_ids: list, mlx_logits: Callable, cli: Callable[..., Any]
) -> None:
    folder = run()
    whole = export(folder, tmp_path / "whole", format="mlx")
    trained = mlx_logits(load_run(folder).model, token_ids)
    model, _ = load_of_mlx_lm(str(whole.path))
    np.testing.assert_allclose(mlx_logits(model, token_ids), trained, atol=1e-4 * np.abs(trained).max())
    assert whole.lost == {}

    lost = {bits: export(folder, tmp_path / bits, format="mlx", quantize=bits).lost for bits in ("4", "8")}
    assert lost["4"].keys() == lost["8"].keys()
    assert len(lost["4"]) == 14
    assert all(lost["8"][name] < lost["4"][name] for name in lost["4"])
    model, _ = load_of_mlx_lm(str(tmp_path / "4"))
    assert isinstance(model.layers[0].self_attn.q_proj, nn.QuantizedLinear)

    little = run(out=str(tmp_path / "little"), lr=1e-5)
    result = cli("export", "--run", little, "--to", tmp_path / "little4", "--format", "mlx", "--quantize", "4")
    assert result.exit_code == 0
    assert "by more than training did; give more bits" in result.stderr
    assert result.stdout == f"{tmp_path / 'little4'}\n"


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_moe", "qwen3_5_text", "lfm2"])
def test_a_converted_model_is_the_same_here_and_in_mlx_lm(
    family: str, make_base: Callable[..., Path], tmp_path: Path, token_ids: list, mlx_logits: Callable
) -> None:
    model = make_base(family, tied=family in ("gemma3_text", "lfm2"))
    expected = mlx_logits(load_model(str(model), "float32").model, token_ids)
    folder = convert(str(model), tmp_path / "mlx")
    np.testing.assert_allclose(
        mlx_logits(load_model(str(folder), "float32").model, token_ids), expected, atol=1e-5 * np.abs(expected).max()
    )
    theirs, _ = load_of_mlx_lm(str(folder))
    np.testing.assert_allclose(mlx_logits(theirs, token_ids), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_a_converted_model_has_the_precision_that_was_asked_for_or_its_own(
    dtype: str | None, make_base: Callable[..., Path], cli: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_base(dtype=torch.float16)
    more = ["--dtype", dtype] if dtype else []
    result = cli("convert", "--model", model, "--to", tmp_path / "mlx", *more)
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'mlx'}\n")
    weights = mx.load(str(tmp_path / "mlx" / "model.safetensors"))
    assert {str(w.dtype) for w in weights.values()} == {f"mlx.core.{dtype or 'float16'}"}
    assert cli("convert", "--model", model, "--to", tmp_path / "mlx").exit_code == 1


def test_what_contradicts_itself_is_refused(base: Path, run: Callable[..., Path], tmp_path: Path) -> None:
    folder = run()
    for options, message in (
        ({"base": "dequantized"}, "for a run on a quantized base"),
        ({"base": "dequantized", "base_model": str(base)}, "for a run on a quantized base"),
        ({"format": "peft", "base": "dequantized"}, "--base goes with --format merged or mlx or gguf"),
        ({"quantize": "4"}, "goes with --format mlx"),
    ):
        with pytest.raises(UserError) as caught:
            export(folder, tmp_path / "none", **options)
        assert message in str(caught.value)
        assert caught.value.exit_code == 2
    quantized = _quantized(tmp_path / "quantized", base)
    of_quantized = run(model=str(quantized), out=str(tmp_path / "of-quantized"))
    with pytest.raises(UserError, match="leave one of"):
        export(of_quantized, tmp_path / "none", base="dequantized", base_model=str(base))
    with pytest.raises(UserError, match="quantized already, to 4 bits"):
        load_model(str(quantized), quantize="8")
    with pytest.raises(UserError, match="--method full trains the weights themselves"):
        TrainConfig.resolve(data="x", method="full", quantize=4)


def test_each_number_of_a_converted_model_keeps_its_precision(make_base: Callable[..., Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(make_base("qwen3"), model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({name: value for name, value in config.items() if name != "dtype"}))
    weights = mx.load(str(convert(str(model), tmp_path / "mlx") / "model.safetensors"))
    assert {w.dtype for w in weights.values()} == {mx.float32}


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "fp8"])
def test_other_libraries_forms_are_refused(method: str, base: Path, tmp_path: Path) -> None:

    folder = tmp_path / "other"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(UserError, match=f"by another library .{method}."):
        load_model(str(folder))


def test_another_model_in_place_of_the_base_is_refused(
    base: Path, run: Callable[..., Path], make_base: Callable[..., Path], tmp_path: Path
) -> None:
    folder = run()
    other = make_base("qwen3", tied=True, intermediate_size=128, rms_norm_eps=0.5)
    with pytest.raises(UserError, match="not the model that the run was trained on"):
        export(folder, tmp_path / "none", base_model=str(other))
    shutil.copytree(base, tmp_path / "moved")
    assert export(folder, tmp_path / "merged", base_model=str(tmp_path / "moved")).verification is not None


def test_what_quantizing_takes_of_trained_weights_is_told_of_the_matrices(
    base: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    train(TrainConfig(**without_adapter(settings) | {"model": str(base), "method": "full"}))
    lost = export(settings["out"], tmp_path / "mlx", format="mlx", quantize="4").lost
    assert "model.embed_tokens.weight" in lost
    assert not any("norm" in name for name in lost)


def test_quantized_weights_are_not_trained_themselves(base: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    quantized = _quantized(tmp_path / "quantized", base)
    with pytest.raises(UserError, match="quantized, and cannot be trained"):
        train(TrainConfig(**without_adapter(settings) | {"model": str(quantized), "method": "full"}))
